r"""What could a rank check have seen? The smallest error of a posterior that it finds with given power.

The yardstick is a normal posterior: the true value is standard normal, the draws come from N(b, s^2), so b is a bias
in posterior standard deviations and s a factor on the width. The value :math:`u = F_q(\theta^*)` then has the
distribution function :math:`G(u) = \Phi(b + s\,\Phi^{-1}(u))`, and a rank among L draws lies below m with
probability :math:`E[G(V)]`, V ~ Beta(m, L + 1 - m), the m-th smallest of L uniforms. The power of the band is one
minus the probability of staying inside, by the same dynamic programme as the band: nothing is simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv, ndtr, ndtri

from probinfer.checks.bands import ecdf_band, staying_probability

__all__ = ["Detectable", "band_power", "detectable_errors", "simulations_needed"]

_NODES = 32  # of the quadrature over V
_LARGEST = {"bias": 1.0, "too_narrow": 0.5, "too_wide": 2.0}  # a check that misses these cannot tell
_MAX_SIMULATIONS = 1 << 17


class Detectable(NamedTuple):
    """Smallest errors of a normal posterior that are found with the given power.

    Attributes:
        bias: shift, in posterior standard deviations; infinite if none is found.
        too_narrow: largest factor below 1 on the standard deviation that is found; 0 if none.
        too_wide: smallest factor above 1 that is found; infinite if none.
        power: probability of finding each of them.
        level: probability of a false alarm at which they are found.
    """

    bias: float
    too_narrow: float
    too_wide: float
    power: float
    level: float

    @property
    def enough(self) -> bool:
        """Whether a bias of one standard deviation and a width wrong by a factor of two would be found."""
        return (
            self.bias <= _LARGEST["bias"]
            and self.too_narrow >= _LARGEST["too_narrow"]
            and self.too_wide <= _LARGEST["too_wide"]
        )

    def __str__(self) -> str:
        if not np.isfinite(self.bias):
            return "no bias could have been found"
        parts = [f"a bias of {self.bias:.2f} sd"]
        if self.too_narrow > 0:
            parts.append(f"a width too narrow by the factor {self.too_narrow:.2f}")
        if np.isfinite(self.too_wide):
            parts.append(f"too wide by {self.too_wide:.2f}")
        return (
            "could have found "
            + ", ".join(parts)
            + f" (each with probability {self.power:g}, in a normal quantity)"
        )


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
        ValueError: as ``ecdf_band``, or a scale that is not positive.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    band = ecdf_band(num_samples, num_cells, level=1 - level)
    cumulative = _cumulative(num_cells, bias, scale, band.edges)
    mass = np.maximum(np.diff(cumulative, prepend=0.0, append=1.0), 0)
    low, high = (np.rint(num_samples * limit).astype(int) for limit in (band.lower, band.upper))
    return 1 - staying_probability(low, high, mass, num_samples)


@lru_cache(maxsize=256)
def detectable_errors(num_samples: int, num_cells: int, level: float, *, power: float = 0.9) -> Detectable:
    """Return the smallest bias and the smallest errors of width that the band finds with the given power.

    Args:
        num_samples: number S of simulations.
        num_cells: L + 1 for L draws.
        level: probability of a false alarm of one quantity; that of the family over their number under Holm's rule.
        power: probability of finding the error.

    Raises:
        ValueError: as ``ecdf_band``, or a power not between the level and 1.
    """
    if not level < power < 1:
        raise ValueError(f"power must lie between the level {level} and 1, got {power}")

    def found(log_scale: float, bias: float = 0.0) -> bool:
        return band_power(num_samples, num_cells, level, bias=bias, scale=float(np.exp(log_scale))) >= power

    return Detectable(
        _smallest(lambda size: found(0.0, size), 8.0),
        float(np.exp(-_smallest(lambda size: found(-size), 8.0))),
        float(np.exp(_smallest(found, 8.0))),
        power,
        level,
    )


@lru_cache(maxsize=256)
def simulations_needed(num_cells: int, level: float, *, power: float = 0.9) -> int | None:
    """Return how many simulations find a bias of one sd and a width wrong by a factor of two; None: no number does.

    Args:
        num_cells: L + 1 for L draws.
        level: probability of a false alarm of one quantity.
        power: probability of finding each error.

    Raises:
        ValueError: as ``ecdf_band``.
    """

    def enough(num: int) -> bool:
        errors = ({"bias": 1.0}, {"scale": _LARGEST["too_narrow"]}, {"scale": _LARGEST["too_wide"]})
        return all(band_power(num, num_cells, level, **error) >= power for error in errors)

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


def _smallest(found: Callable[[float], bool], largest: float) -> float:
    """Smallest size that is found, to 1 %; infinite if ``largest`` is not."""
    low, high = 0.0, 0.125
    while not found(high):
        low, high = high, 2 * high
        if low >= largest:
            return float("inf")
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def _cumulative(num_cells: int, bias: float, scale: float, edges: np.ndarray) -> np.ndarray:
    """P(rank < m) at the edges m for draws from N(bias, scale^2) and a standard normal truth."""
    nodes, weights = _normal_nodes(num_cells, len(edges))
    if bias == 0 and scale == 1:
        return edges / num_cells
    return ndtr(bias + scale * nodes) @ weights


@lru_cache(maxsize=16)
def _normal_nodes(num_cells: int, num_edges: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal scores of quantiles of Beta(m, L + 1 - m) at Gauss-Legendre nodes (K, nodes), and the weights."""
    edges = ecdf_band(1, num_cells).edges
    at, weights = np.polynomial.legendre.leggauss(_NODES)
    quantiles = betaincinv(edges[:, None], num_cells - edges[:, None], (at + 1) / 2)
    return ndtri(quantiles), weights / 2
