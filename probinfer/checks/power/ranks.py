r"""Power of a rank check: the smallest error of a posterior that it detects with a given probability.

The power is that for a normal posterior: the true value is standard normal, the draws come from N(b, s^2), so b is a
bias in posterior standard deviations and s a factor on the width. The value :math:`u = F_q(\theta^*)` then has the
distribution function :math:`G(u) = \Phi(b + s\,\Phi^{-1}(u))`, and a rank among L draws lies below m with
probability :math:`E[G(V)]`, V ~ Beta(m, L + 1 - m), the m-th smallest of L uniforms. The power of the band is one
minus the probability of staying inside, by the same dynamic program as the band: nothing is simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import betaincinv, ndtr, ndtri

from probinfer.checks.calibration.bands import ecdf_band, staying_probability

__all__ = [
    "MAX_ERRORS",
    "Detectable",
    "band_power",
    "detectable_errors",
    "in_normal_quantity",
    "leaving_probability",
    "min_simulations",
    "of_kernel",
    "simulations_needed",
    "smallest_detected",
]

_NODES = 32  # nodes of the quadrature over V
# A check that cannot detect errors of this size cannot tell.
MAX_ERRORS = {"bias": 1.0, "too_narrow": 0.5, "too_wide": 2.0}
_MAX_SIMULATIONS = 1 << 17


class Detectable(NamedTuple):
    """Smallest errors of a normal posterior that are detected with the given power.

    Attributes:
        bias: shift, in posterior standard deviations; infinite if none is detected.
        too_narrow: largest factor below 1 on the standard deviation that is detected; 0 if none.
        too_wide: smallest factor above 1 that is detected; infinite if none.
        power: probability of detecting each error.
        level: probability of a false alarm.
        where: description of the quantity that the errors refer to.
        largest_bias: a check that cannot detect a bias of this size cannot tell.
    """

    bias: float
    too_narrow: float
    too_wide: float
    power: float
    level: float
    where: str = "in a normal quantity"
    largest_bias: float = MAX_ERRORS["bias"]

    @property
    def enough(self) -> bool:
        """Whether ``largest_bias`` and a width wrong by a factor of two would be detected."""
        return (
            self.bias <= self.largest_bias
            and self.too_narrow >= MAX_ERRORS["too_narrow"]
            and self.too_wide <= MAX_ERRORS["too_wide"]
        )

    def __str__(self) -> str:
        parts = [f"a bias of {self.bias:.2f} sd"] if np.isfinite(self.bias) else []
        if self.too_narrow > 0:
            parts.append(f"a width too narrow by the factor {self.too_narrow:.2f}")
        if np.isfinite(self.too_wide):
            parts.append(f"too wide by {self.too_wide:.2f}")
        if not parts:
            return "could have found neither a bias nor a wrong width"
        text = f"could have found {', '.join(parts)} (each with probability {self.power:g}, {self.where})"
        return text if np.isfinite(self.bias) else f"{text}, but no bias"


def band_power(
    num_samples: int, num_cells: int, level: float, *, bias: float = 0.0, scale: float = 1.0
) -> float:
    """Return the probability that the band rejects a normal posterior with this bias and width.

    Args:
        num_samples: number S of simulations.
        num_cells: L + 1 for L draws.
        level: probability of a false alarm.
        bias: of the draws, in true posterior standard deviations.
        scale: standard deviation of the draws over the true one, positive.

    Raises:
        ValueError: as ``ecdf_band``, or the scale is not positive.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    cumulative = _cumulative(num_cells, bias, scale, ecdf_band(1, num_cells).edges)
    return leaving_probability(num_samples, num_cells, level, cumulative)


def leaving_probability(
    num_samples: int, num_cells: int, level: float, cumulative: Float[np.ndarray, " K"]
) -> float:
    """Return the probability that ranks of a given distribution leave their band.

    Args:
        num_samples: number S of simulations.
        num_cells: L + 1 for L draws.
        level: probability of a false alarm.
        cumulative: probability of a rank below each edge of the band.

    Raises:
        ValueError: as ``ecdf_band``.
    """
    band = ecdf_band(num_samples, num_cells, level=1 - level)
    mass = np.maximum(np.diff(cumulative, prepend=0.0, append=1.0), 0)
    low, high = (np.rint(num_samples * limit).astype(int) for limit in (band.lower, band.upper))
    return 1 - staying_probability(low, high, mass, num_samples)


@lru_cache(maxsize=256)
def detectable_errors(num_samples: int, num_cells: int, level: float, *, power: float = 0.9) -> Detectable:
    """Return the smallest bias and the smallest errors of width that the band detects with the given power.

    Args:
        num_samples: number S of simulations.
        num_cells: L + 1 for L draws.
        level: probability of a false alarm of one quantity: under Holm's rule, that of the family over its size.
        power: probability of detecting each error.

    Raises:
        ValueError: as ``ecdf_band``, or the power is not between the level and 1.
    """
    if not level < power < 1:
        raise ValueError(f"power must lie between the level {level} and 1, got {power}")

    def detected(log_scale: float, bias: float = 0.0) -> bool:
        return band_power(num_samples, num_cells, level, bias=bias, scale=float(np.exp(log_scale))) >= power

    return Detectable(
        bias=smallest_detected(lambda size: detected(0.0, size), 8.0),
        too_narrow=float(np.exp(-smallest_detected(lambda size: detected(-size), 8.0))),
        too_wide=float(np.exp(smallest_detected(detected, 8.0))),
        power=power,
        level=level,
    )


@lru_cache(maxsize=256)
def simulations_needed(num_cells: int, level: float, *, power: float = 0.9) -> int | None:
    """Return how many simulations detect a bias of one sd and a width wrong by a factor of two; None: no number does.

    Args:
        num_cells: L + 1 for L draws.
        level: probability of a false alarm of one quantity.
        power: probability of detecting each error.

    Raises:
        ValueError: as ``ecdf_band``.
    """
    errors: tuple[dict[str, float], ...] = (
        {"bias": MAX_ERRORS["bias"]},
        {"scale": MAX_ERRORS["too_narrow"]},
        {"scale": MAX_ERRORS["too_wide"]},
    )
    return min_simulations(
        lambda num: all(band_power(num, num_cells, level, **error) >= power for error in errors)
    )


def min_simulations(enough: Callable[[int], bool]) -> int | None:
    """Return the smallest sufficient number of simulations, to 2 %; None if no number up to 131 072 is sufficient.

    Args:
        enough: whether a number is sufficient; monotone.
    """
    high = 8
    while not enough(high):
        high *= 2
        if high > _MAX_SIMULATIONS:
            return None
    low = high // 2
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def in_normal_quantity(num_cells: int, num_samples: int, level: float) -> tuple[Detectable, int | None]:
    """Return the errors that ranks of a normal quantity detect, and the simulations needed if these are too large.

    Args:
        num_cells: L + 1 for L draws.
        num_samples: number S of simulations.
        level: probability of a false alarm of one quantity.

    Raises:
        ValueError: as ``ecdf_band``.
    """
    errors = detectable_errors(num_samples, num_cells, level)
    return errors, None if errors.enough else simulations_needed(num_cells, level)


def of_kernel(
    num_cells: int, num_samples: int, level: float, *, chain: bool
) -> tuple[Detectable, int | None]:
    """Return the errors that the joint test of a kernel detects, and the lanes needed if these are too large.

    The true value is ranked among the states of its chain as among posterior draws. The end of the chain is itself
    ranked, among draws from the prior.

    Args:
        num_cells: L + 1 for L draws.
        num_samples: number S of lanes.
        level: probability of a false alarm of one quantity.
        chain: whether the true value is ranked along the chain.

    Raises:
        ValueError: as ``ecdf_band``.
    """
    errors, needed = in_normal_quantity(num_cells, num_samples, level)
    if chain:
        return errors._replace(where="in a normal quantity, the sd that of its posterior"), needed
    narrow, wide = 1 / errors.too_wide, 1 / errors.too_narrow if errors.too_narrow > 0 else float("inf")
    where = "in a normal quantity, the sd that of its prior, wider than the posterior's"
    return errors._replace(too_narrow=narrow, too_wide=wide, where=where), needed


def smallest_detected(detected: Callable[[float], bool], largest: float) -> float:
    """Return the smallest size that is detected, to 1 %; infinite if the search exceeds ``largest``.

    Args:
        detected: whether a size is detected; monotone.
        largest: end of the search.
    """
    low, high = 0.0, 0.125
    while not detected(high):
        low, high = high, 2 * high
        if low >= largest:
            return float("inf")
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if detected(middle) else (middle, high)
    return high


def _cumulative(num_cells: int, bias: float, scale: float, edges: np.ndarray) -> np.ndarray:
    """Return P(rank < m) at the edges m for draws from N(bias, scale^2) and a standard normal true value."""
    nodes, weights = _normal_nodes(num_cells, len(edges))
    if bias == 0 and scale == 1:
        return edges / num_cells
    return ndtr(bias + scale * nodes) @ weights


@lru_cache(maxsize=16)
def _normal_nodes(num_cells: int, num_edges: int) -> tuple[np.ndarray, np.ndarray]:
    """Return normal scores of Beta(m, L + 1 - m) quantiles at Gauss-Legendre nodes (K, nodes), and the weights."""
    edges = ecdf_band(1, num_cells).edges
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    quantiles = betaincinv(edges[:, None], num_cells - edges[:, None], (nodes + 1) / 2)
    return ndtri(quantiles), weights / 2
