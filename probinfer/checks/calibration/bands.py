r"""Simultaneous bands for the empirical distribution of ranks, and the p-value that goes with them.

S ranks that are uniform on {0, ..., L} fall into L + 1 cells. At an edge m the number of ranks below it is
Binomial(S, m / (L + 1)); the statistic is the smallest of their two-sided tail probabilities. Band and p-value need the
same probability: that all counts of a sample stay between given limits. It is computed exactly by dynamic programming.
Independent Poisson counts in the cells, given that their sum is S, are a multinomial sample, so a step of the program
is a convolution with a Poisson density, and the last step conditions on the sum.

A continuous probability integral transform u is a rank in any number of cells: floor(u * num_cells).

References:
    Säilynoja, Bürkner and Vehtari (2022), "Graphical test for discrete uniformity and its applications in goodness
    of fit evaluation and multiple sample comparison", sections 2.2-2.3. Moscovich and Nadler (2017), "Fast
    calculation of boundary crossing probabilities for Poisson processes", for the Poisson form.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import bdtr, bdtrik, gammaln

__all__ = ["Band", "ecdf_band", "ecdf_pvalue", "staying_probability"]

_MAX_EDGES = 512  # edges at which the counts are compared
_ROUNDING = 1e-13  # of one minus a probability


class Band(NamedTuple):
    """Simultaneous limits of the empirical distribution function of uniform ranks.

    Attributes:
        points: evaluation points of the function, ``edges / num_cells`` (K,).
        lower: smallest value inside the band (K,).
        upper: largest value inside the band (K,).
        level: requested probability of staying inside.
        coverage: probability with which the whole function stays inside, at least ``level``.
        edges: number of cells below each point (K,).
    """

    points: Float[np.ndarray, " K"]
    lower: Float[np.ndarray, " K"]
    upper: Float[np.ndarray, " K"]
    level: float
    coverage: float
    edges: Int[np.ndarray, " K"]


@lru_cache(maxsize=256)
def ecdf_band(num_samples: int, num_cells: int, *, level: float = 0.95) -> Band:
    r"""Return the narrowest band that a sample of uniform ranks leaves with probability at most 1 - level.

    At each edge z the count lies between the :math:`\gamma/2` and :math:`1-\gamma/2` quantiles of
    Binomial(S, z), with the largest :math:`\gamma` that attains the level. A sample leaves the band if and
    only if ``ecdf_pvalue`` is at most 1 - level.

    Args:
        num_samples: number S of ranks.
        num_cells: number of values that a rank can take: L + 1 for ranks among L draws.
        level: probability of staying inside.

    Raises:
        ValueError: there are no samples or fewer than two cells, or the level is not between 0 and 1.

    References:
        Säilynoja et al. (2022), equations 8-12 (limits, and the search for gamma).
    """
    _check(num_samples, num_cells)
    if not 0 < level < 1:
        raise ValueError(f"the level of a band must lie between 0 and 1, got {level}")
    gamma = _gamma(num_samples, num_cells, level)
    edges = _edges(num_cells)
    low, high = _limits(gamma, num_samples, num_cells)
    coverage = _coverage(gamma, num_samples, num_cells)
    return Band(
        points=edges / num_cells,
        lower=low / num_samples,
        upper=high / num_samples,
        level=level,
        coverage=coverage,
        edges=edges,
    )


def ecdf_pvalue(ranks: Int[np.ndarray, " S"], num_cells: int) -> float:
    r"""Return the probability that uniform ranks deviate from the diagonal at least as much as these.

    The statistic is :math:`\min_k 2 \min\{F_k(c_k),\, 1 - F_k(c_k - 1)\}` with the counts :math:`c_k` below the
    edges and their binomial distribution functions :math:`F_k`; its distribution is computed, not simulated.

    Args:
        ranks: values in {0, ..., num_cells - 1}.
        num_cells: number of values that a rank can take.

    Raises:
        ValueError: there are no samples or fewer than two cells, or a rank is outside its range.

    References:
        Säilynoja et al. (2022), equation 8.
    """
    _check(len(ranks), num_cells)
    if ranks.min() < 0 or ranks.max() >= num_cells:
        raise ValueError(
            f"ranks must lie in 0 ... {num_cells - 1}, got {ranks.min()} ... {ranks.max()}; drop failed simulations"
        )
    statistic = _statistic(_counts_below(ranks, num_cells), len(ranks), num_cells)
    # A single edge deviates this far with half the statistic's probability: a bound if 1 - coverage rounds to zero.
    return float(np.clip(1 - _coverage(statistic, len(ranks), num_cells), statistic / 2, 1))


def staying_probability(
    low: Int[np.ndarray, " K"], high: Int[np.ndarray, " K"], mass: Float[np.ndarray, " K+1"], num_samples: int
) -> float:
    r"""Return the probability that cumulative multinomial counts stay within limits.

    Args:
        low: smallest allowed count in the first k cells, non-decreasing (K,).
        high: largest allowed count (K,).
        mass: probabilities of the cells (K + 1,), of sum one.
        num_samples: number S of samples.

    Returns:
        :math:`P(\mathrm{low}_k \le N_1 + \dots + N_k \le \mathrm{high}_k\ \forall k)` for N ~ Multinomial(S, mass).
    """
    if np.any(low > high):
        return 0.0
    low = np.append(low, num_samples)
    high = np.append(high, num_samples)
    steps = np.arange(int(np.max(high - np.append(0, low[:-1]))) + 1)
    rate = np.maximum(num_samples * mass, 1e-300)[:, None]
    kernels = np.exp(steps * np.log(rate) - rate - gammaln(steps + 1))
    # mass_inside[i]: probability of the cumulative count first + i, with all earlier counts inside their limits
    first, mass_inside = 0, np.ones(1)
    for k, (smallest, largest) in enumerate(zip(low, high, strict=True)):
        convolved = np.convolve(mass_inside, kernels[k, : largest - first + 1])
        mass_inside, first = convolved[smallest - first : largest - first + 1], smallest
    log_total = num_samples * np.log(num_samples) - num_samples - gammaln(num_samples + 1)
    # Condition on the sum, which is Poisson(S)
    return float(min(mass_inside[0] / np.exp(log_total), 1.0))


def _check(num_samples: int, num_cells: int) -> None:
    if num_samples < 1:
        raise ValueError("there are no ranks to judge; run more simulations")
    if num_cells < 2:
        raise ValueError(f"ranks need at least two possible values, got {num_cells}; take more draws")


@lru_cache(maxsize=64)
def _edges(num_cells: int) -> np.ndarray:
    """Return the inner edges of the cells, or an evenly spaced subset if there are many."""
    return np.unique(np.linspace(0, num_cells, min(num_cells, _MAX_EDGES) + 1).round().astype(int))[1:-1]


def _counts_below(ranks: np.ndarray, num_cells: int) -> np.ndarray:
    return np.searchsorted(np.sort(ranks), _edges(num_cells), side="left")


def _statistic(counts: np.ndarray, num_samples: int, num_cells: int) -> float:
    edges = _edges(num_cells)
    below = bdtr(counts, num_samples, edges / num_cells)
    above = bdtr(num_samples - counts, num_samples, (num_cells - edges) / num_cells)
    return float(2 * np.min(np.minimum(below, above)))


def _limits(gamma: float, num_samples: int, num_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and the largest count whose two-sided tail probability exceeds gamma, at each edge."""
    edges = _edges(num_cells)
    low = _first_above(gamma / 2, num_samples, edges / num_cells)
    high = num_samples - _first_above(gamma / 2, num_samples, (num_cells - edges) / num_cells)
    return np.maximum.accumulate(low), np.minimum.accumulate(high[::-1])[::-1]


def _first_above(tail: float, num_samples: int, z: np.ndarray) -> np.ndarray:
    """Return the smallest count c with P(Binomial(S, z) <= c) > tail, by the same function as the statistic."""
    guess = np.nan_to_num(bdtrik(tail, num_samples, z), nan=0.0)
    count = np.clip(np.floor(guess) - 2, 0, num_samples).astype(int)
    for _ in range(5):
        count = np.where((bdtr(count, num_samples, z) <= tail) & (count < num_samples), count + 1, count)
    return count


def _coverage(gamma: float, num_samples: int, num_cells: int) -> float:
    low, high = _limits(gamma, num_samples, num_cells)
    mass = np.diff(_edges(num_cells), prepend=0, append=num_cells) / num_cells
    return staying_probability(low, high, mass, num_samples)


@lru_cache(maxsize=256)
def _gamma(num_samples: int, num_cells: int, level: float) -> float:
    """Return the largest two-sided pointwise probability with the simultaneous coverage, by bisection of its log."""
    low, high = np.log((1 - level) / (4 * _MAX_EDGES * num_samples)), 0.0
    while high - low > 1e-7:
        middle = (low + high) / 2
        inside = _coverage(float(np.exp(middle)), num_samples, num_cells) >= level - _ROUNDING
        low, high = (middle, high) if inside else (low, middle)
    return float(np.exp(low))
