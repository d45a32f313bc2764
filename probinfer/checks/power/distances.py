r"""Power of distances between distributions: the smallest bias and error of width that a statistic detects.

Near the null a statistic that sums a function of pairs is :math:`T = T_0 + T_1 + E`. Here :math:`T_0` has the null
distribution, sampled by relabeled or randomly signed draws; :math:`T_1` is a mean-zero normal sum over single draws;
and E is the distance between the distributions. So the power is the mean of
:math:`\Phi((E + g(T_0 - c))/\mathrm{sd}\,T_1)` over the null distribution, with the critical value c. E and the
standard deviation are computed from the draws at hand, shifted or scaled. Both sets together are then wider than
before, and so is the null distribution, by the factor g.

References:
    Hoeffding (1948), "A class of statistics with asymptotically normal distribution", for the projection on single
    draws.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from probinfer.checks.discrepancy.permutation import Pooled
from probinfer.checks.power.ranks import Detectable, smallest_detected
from probinfer.core.types import Array, Float

__all__ = [
    "MAX_ROWS",
    "Alternative",
    "detectable_in_pairs",
    "detectable_of_scores",
    "detectable_on_lines",
    "power_against",
    "smallest_errors",
]

MAX_ROWS = 256  # draws that are shifted and scaled
_MAX_COORDINATES = 8  # coordinates in which a shift is tried
_POWER = 0.9
_MAX_BIAS = 16.0  # standard deviations
_MAX_LOG_SCALE = 4.0  # logarithm of a factor on the width
_WHERE = "the bias in one coordinate, the width in all"


class Alternative(NamedTuple):
    """Change of a statistic under an error of the draws.

    Attributes:
        mean: increase of the mean, E.
        deviation: standard deviation of the sum over single draws, sd T_1.
        growth: factor g on the null distribution.
    """

    mean: float
    deviation: float
    growth: float = 1.0


def power_against(alternative: Alternative, null: Float[np.ndarray, " m"], critical: float) -> float:
    """Return the probability that the statistic exceeds the critical value.

    Args:
        alternative: change of the statistic under the error.
        null: statistics without an error.
        critical: the largest statistic that is no difference.
    """
    deviation = max(alternative.deviation, 1e-12 * abs(critical), 1e-300)
    return float(np.mean(ndtr((alternative.mean + alternative.growth * (null - critical)) / deviation)))


def smallest_errors(
    biased: Callable[[float], Alternative],
    scaled: Callable[[float], Alternative],
    null: Float[np.ndarray, " m"],
    critical: float,
    level: float,
    *,
    where: str = _WHERE,
) -> Detectable:
    """Return the smallest errors that a statistic detects with probability 0.9.

    Args:
        biased: bias in standard deviations -> change of the statistic.
        scaled: factor on all widths -> change of the statistic.
        null: statistics without an error.
        critical: the largest statistic that is no difference.
        level: probability of a false alarm.
        where: description of the quantity that the errors refer to.
    """

    def detected(alternative: Alternative) -> bool:
        return power_against(alternative, null, critical) >= _POWER

    narrow = smallest_detected(lambda size: detected(scaled(float(np.exp(-size)))), _MAX_LOG_SCALE)
    wide = smallest_detected(lambda size: detected(scaled(float(np.exp(size)))), _MAX_LOG_SCALE)
    return Detectable(
        bias=smallest_detected(lambda size: detected(biased(size)), _MAX_BIAS),
        too_narrow=float(np.exp(-narrow)),
        too_wide=float(np.exp(wide)),
        power=_POWER,
        level=level,
        where=where,
    )


def detectable_in_pairs(
    block_fn: Any, sign: int, pooled: Pooled, null: Float[np.ndarray, " m"], critical: float, level: float
) -> Detectable:
    """Return the shift and the scaling of one set that an unbiased distance of pairs detects.

    The shift is in the coordinate in which it is hardest to detect, among at most eight.

    Args:
        block_fn: as in ``pair_statistics``.
        sign: 1 if it is a similarity (a kernel), -1 if it is a distance.
        pooled: both sets.
        null: statistics of relabeled draws.
        critical: the largest statistic that is no difference.
        level: probability of a false alarm.
    """
    rows = pooled.rows[:: -(-len(pooled.rows) // MAX_ROWS)]
    sizes = _effective_sizes(pooled)

    half = jnp.arange(len(rows))[:, None] % 2 == 0
    null_deviation = max(float(_pair_deviation(block_fn, rows)), 1e-300)
    deviation = jnp.std(rows, axis=0)

    def compare(changed: Array) -> Alternative:
        mean, variance_a, variance_b = map(float, _pair_moments(block_fn, rows, changed))
        growth = float(_pair_deviation(block_fn, jnp.where(half, changed, rows))) / null_deviation
        return Alternative(sign * mean, float(np.sqrt(variance_a / sizes[0] + variance_b / sizes[1])), growth)

    def biased(size: float, axis: int) -> Alternative:
        return compare(rows.at[:, axis].add(size * deviation[axis]))

    mean_row = jnp.mean(rows, axis=0)
    hardest_axis = min(_axes(rows.shape[1]), key=lambda axis: biased(0.5, axis).mean)
    return smallest_errors(
        partial(biased, axis=hardest_axis),
        lambda s: compare(mean_row + s * (rows - mean_row)),
        null,
        critical,
        level,
    )


@jax.jit
def _pair_moments(block_fn: Any, b: Array, a: Array) -> tuple[Array, Array, Array]:
    """Return the mean of the statistic between the distributions of a and b, and the variances of its projections."""
    within_a, within_b, between = (_off_diagonal(block_fn, *pair) for pair in ((a, a), (b, b), (a, b)))
    size = len(a) - 1.0
    projection_a = 2 * (jnp.sum(within_a, axis=1) - jnp.sum(between, axis=1)) / size
    projection_b = 2 * (jnp.sum(within_b, axis=1) - jnp.sum(between, axis=0)) / size
    return (jnp.mean(projection_a) + jnp.mean(projection_b)) / 2, jnp.var(projection_a), jnp.var(projection_b)


@jax.jit
def _pair_deviation(block_fn: Any, rows: Array) -> Array:
    """Return the root mean square of doubly centered values of pairs, the scale of the null distribution."""
    values, count = _off_diagonal(block_fn, rows, rows), len(rows)
    means = jnp.sum(values, axis=1) / (count - 1.0)
    centered = values - means[:, None] - means[None, :] + jnp.mean(means)
    square = jnp.sum(jnp.where(jnp.eye(count, dtype=bool), 0, centered) ** 2)
    return jnp.sqrt(square / (count * (count - 1.0)))


def _off_diagonal(block_fn: Any, rows: Array, columns: Array) -> Array:
    """Return the values of distinct draws; a draw and its copy are not independent."""
    values = jnp.sum(block_fn(rows, columns), axis=0)
    return values - jnp.diag(jnp.diagonal(values))


def detectable_on_lines(
    lines: Float[np.ndarray, "P D"],
    pooled: Pooled,
    null: Float[np.ndarray, " m"],
    critical: float,
    level: float,
) -> Detectable:
    r"""Return the errors that the sliced Wasserstein distance detects.

    A shift :math:`\delta` of one set adds :math:`2 w^\top\delta\, w^\top(\bar a - \bar b) + (w^\top\delta)^2` along w,
    a factor s on its widths about :math:`(s - 1)\, w^\top(S_a - S_b) w + (s - 1)^2\, w^\top S w` with covariances S.
    The null distribution grows with the covariance of both sets together.

    Args:
        lines: unit vectors w.
        pooled: both sets.
        null: statistics of relabeled draws.
        critical: the largest statistic that is no difference.
        level: probability of a false alarm.
    """
    rows = np.asarray(pooled.rows, float)
    covariance = np.atleast_2d(np.cov(rows.T))
    line_moment = lines.T @ lines / len(lines)
    inverse_sizes = sum(1 / size for size in _effective_sizes(pooled))
    share = pooled.sizes[0] / sum(pooled.sizes)
    deviation = np.sqrt(np.diag(covariance))
    shift_deviation = np.sqrt(inverse_sizes * np.einsum("ij,jk,ki->i", line_moment, covariance, line_moment))
    squares = np.einsum("np,np->n", rows - rows.mean(axis=0), (rows - rows.mean(axis=0)) @ line_moment)

    def biased(size: float, axis: int) -> Alternative:
        shift = size * deviation[axis]
        mean = shift**2 * line_moment[axis, axis]
        growth = 1 + mean * share * (1 - share) / squares.mean()
        return Alternative(float(mean), float(2 * shift * shift_deviation[axis]), float(growth))

    def scaled(factor: float) -> Alternative:
        scale_deviation = abs(factor - 1) * np.sqrt(inverse_sizes * squares.var())
        growth = 1 + share * (factor**2 - 1)
        return Alternative(float((factor - 1) ** 2 * squares.mean()), float(scale_deviation), float(growth))

    hardest_axis = min(_axes(len(deviation)), key=lambda axis: biased(0.5, axis).mean)
    return smallest_errors(partial(biased, axis=hardest_axis), scaled, null, critical, level)


def detectable_of_scores(
    values: Callable[[Array], Array],
    rows: Float[Array, "n D"],
    num_independent: float,
    null: Float[np.ndarray, " m"],
    critical: float,
    level: float,
) -> Detectable:
    """Return the errors that a kernel Stein discrepancy detects.

    The draws at hand have a small error of their own; averaging over an error and its opposite removes it. Random signs
    give larger values for draws that misfit, and the critical value grows with them.

    Args:
        values: draws -> the Stein kernel of their pairs (n, n).
        rows: some of the draws.
        num_independent: effective number of independent draws of the whole set.
        null: statistics under random signs, minus the sum over single draws.
        critical: the largest statistic that is no misfit, minus the same.
        level: probability of a false alarm.
    """
    mean_row, deviation = jnp.mean(rows, axis=0), jnp.std(rows, axis=0)
    base_mean, _, base_scale = _stein_moments(values(rows))

    def compare(pair: list[Array]) -> Alternative:
        mean, projection_deviation, scale = np.mean(
            [_stein_moments(values(changed)) for changed in pair], axis=0
        )
        critical_increase = (scale / base_scale - 1) * critical
        return Alternative(
            float(mean - base_mean - critical_increase),
            float(2 * projection_deviation / np.sqrt(num_independent)),
        )

    def biased(size: float, axis: int) -> Alternative:
        return compare([rows.at[:, axis].add(sign * size * deviation[axis]) for sign in (-1, 1)])

    def scaled(factor: float) -> Alternative:
        return compare([mean_row + s * (rows - mean_row) for s in (factor, 1 / factor)])

    hardest_axis = min(_axes(rows.shape[1]), key=lambda axis: biased(0.5, axis).mean)
    return smallest_errors(partial(biased, axis=hardest_axis), scaled, null, critical, level)


def _stein_moments(values: Array) -> tuple[float, float, float]:
    """Return the mean over pairs, the standard deviation of its projections, and the root mean square over pairs."""
    off_diagonal = np.array(values, float)
    np.fill_diagonal(off_diagonal, 0)
    means = off_diagonal.sum(axis=1) / (len(off_diagonal) - 1)
    square = np.sum(off_diagonal**2) / (len(off_diagonal) * (len(off_diagonal) - 1))
    return float(means.mean()), float(means.std()), float(np.sqrt(square))


def _axes(dims: int) -> list[int]:
    return np.unique(np.linspace(0, dims - 1, min(dims, _MAX_COORDINATES)).astype(int)).tolist()


def _effective_sizes(pooled: Pooled) -> list[float]:
    """Return the effective number of independent draws of each set; a block has at least eight correlation times."""
    return [size * min(1.0, 8 / pooled.block) for size in pooled.sizes]
