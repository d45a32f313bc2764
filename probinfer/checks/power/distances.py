r"""What could a distance between laws have seen? The smallest bias and error of width that a statistic finds.

Near the null a statistic that sums a function of pairs is :math:`T = T_0 + T_1 + E`: what it is if the laws are one,
of which relabelled or randomly signed draws are a sample; a mean-zero normal sum over single draws; and the distance
of the laws itself. So its power is the mean of :math:`\Phi((E + g(T_0 - c))/\mathrm{sd}\,T_1)` over the null
distribution, c the critical value. E and the standard deviation are those of the draws at hand, shifted or stretched.
Both sets together are then wider than before, and so are relabelled draws: by the factor g.

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
from probinfer.checks.power.ranks import Detectable, smallest
from probinfer.core.types import Array, Float

__all__ = [
    "ROWS",
    "Alternative",
    "detectable_in_pairs",
    "detectable_of_scores",
    "detectable_on_lines",
    "errors_found",
    "power_against",
]

ROWS = 256  # draws that are shifted and stretched
_COORDINATES = 8  # in which a shift is tried
_POWER = 0.9
_FARTHEST = 16.0  # standard deviations
_WIDEST = 4.0  # logarithm of a factor on the width
_WHERE = "the bias in one coordinate, the width in all"


class Alternative(NamedTuple):
    """A statistic under a planted error, beside what it is without.

    Attributes:
        mean: how much larger it is on average.
        deviation: standard deviation of what single draws add to it.
        growth: factor on what relabelled draws give.
    """

    mean: float
    deviation: float
    growth: float = 1.0


def power_against(one: Alternative, null: Float[np.ndarray, " m"], critical: float) -> float:
    """Return the probability that the statistic exceeds the critical value.

    Args:
        one: the planted error.
        null: statistics without an error.
        critical: the largest statistic that is no difference.
    """
    deviation = max(one.deviation, 1e-12 * abs(critical), 1e-300)
    return float(np.mean(ndtr((one.mean + one.growth * (null - critical)) / deviation)))


def errors_found(
    biased: Callable[[float], Alternative],
    stretched: Callable[[float], Alternative],
    null: Float[np.ndarray, " m"],
    critical: float,
    level: float,
    *,
    where: str = _WHERE,
) -> Detectable:
    """Return the smallest errors that a statistic finds with probability 0.9.

    Args:
        biased: bias in standard deviations -> what it does to the statistic.
        stretched: factor on all widths -> the same.
        null: statistics without an error.
        critical: the largest statistic that is no difference.
        level: probability of a false alarm.
        where: what is wrong by that much, in words.
    """

    def found(one: Alternative) -> bool:
        return power_against(one, null, critical) >= _POWER

    return Detectable(
        smallest(lambda size: found(biased(size)), _FARTHEST),
        float(np.exp(-smallest(lambda size: found(stretched(float(np.exp(-size)))), _WIDEST))),
        float(np.exp(smallest(lambda size: found(stretched(float(np.exp(size)))), _WIDEST))),
        _POWER,
        level,
        where,
    )


def detectable_in_pairs(
    block_fn: Any, sign: int, pooled: Pooled, null: Float[np.ndarray, " m"], critical: float, level: float
) -> Detectable:
    """Return what an unbiased distance of pairs finds: a shift of one set by so much, or its stretching.

    The shift is that of the coordinate in which it is hardest to see, of eight at most.

    Args:
        block_fn: as in ``pair_statistics``.
        sign: 1 if it is a similarity (a kernel), -1 if it is a distance.
        pooled: both sets.
        null: statistics of relabelled draws.
        critical: the largest statistic that is no difference.
        level: probability of a false alarm.
    """
    rows = pooled.rows[:: -(-len(pooled.rows) // ROWS)]
    sizes = _independent(pooled)

    def against(moved: Array) -> Alternative:
        mean, of_a, of_b = map(float, _projected(block_fn, rows, moved))
        growth = float(_spread_of_pairs(block_fn, jnp.where(half, moved, rows))) / apart
        return Alternative(sign * mean, float(np.sqrt(of_a / sizes[0] + of_b / sizes[1])), growth)

    half = jnp.arange(len(rows))[:, None] % 2 == 0
    apart = max(float(_spread_of_pairs(block_fn, rows)), 1e-300)
    spread = jnp.std(rows, axis=0)

    def biased(size: float, axis: int) -> Alternative:
        return against(rows.at[:, axis].add(size * spread[axis]))

    middle = jnp.mean(rows, axis=0)
    worst = min(_axes(rows.shape[1]), key=lambda axis: biased(0.5, axis).mean)
    return errors_found(
        partial(biased, axis=worst), lambda s: against(middle + s * (rows - middle)), null, critical, level
    )


@jax.jit
def _projected(block_fn: Any, b: Array, a: Array) -> tuple[Array, Array, Array]:
    """Mean of the statistic if one set has the law of a, the other that of b, and variances of its projections."""
    within_a, within_b, between = (_off_diagonal(block_fn, *pair) for pair in ((a, a), (b, b), (a, b)))
    size = len(a) - 1.0
    of_a = 2 * (jnp.sum(within_a, axis=1) - jnp.sum(between, axis=1)) / size
    of_b = 2 * (jnp.sum(within_b, axis=1) - jnp.sum(between, axis=0)) / size
    return (jnp.mean(of_a) + jnp.mean(of_b)) / 2, jnp.var(of_a), jnp.var(of_b)


@jax.jit
def _spread_of_pairs(block_fn: Any, rows: Array) -> Array:
    """Root mean square of the values of pairs less the means of either draw: how far relabelled draws spread."""
    values, count = _off_diagonal(block_fn, rows, rows), len(rows)
    means = jnp.sum(values, axis=1) / (count - 1.0)
    alone = values - means[:, None] - means[None, :] + jnp.mean(means)
    square = jnp.sum(jnp.where(jnp.eye(count, dtype=bool), 0, alone) ** 2)
    return jnp.sqrt(square / (count * (count - 1.0)))


def _off_diagonal(block_fn: Any, rows: Array, columns: Array) -> Array:
    """Values of different draws; a draw and its own copy are not independent."""
    values = jnp.sum(block_fn(rows, columns), axis=0)
    return values - jnp.diag(jnp.diagonal(values))


def detectable_on_lines(
    lines: Float[np.ndarray, "P D"],
    pooled: Pooled,
    null: Float[np.ndarray, " m"],
    critical: float,
    level: float,
) -> Detectable:
    r"""Return what the sliced Wasserstein distance finds.

    A shift :math:`\delta` of one set adds :math:`2 w^\top\delta\, w^\top(\bar a - \bar b) + (w^\top\delta)^2` along w,
    a factor s on its widths about :math:`(s - 1)\, w^\top(S_a - S_b) w + (s - 1)^2\, w^\top S w` with covariances S.
    What relabelled draws give grows with the covariance of both sets together.

    Args:
        lines: unit vectors w.
        pooled: both sets.
        null: statistics of relabelled draws.
        critical: the largest statistic that is no difference.
        level: probability of a false alarm.
    """
    rows = np.asarray(pooled.rows, float)
    covariance = np.atleast_2d(np.cov(rows.T))
    second = lines.T @ lines / len(lines)
    inverse = sum(1 / size for size in _independent(pooled))
    share = pooled.sizes[0] / sum(pooled.sizes)
    spread = np.sqrt(np.diag(covariance))
    across = np.sqrt(inverse * np.einsum("ij,jk,ki->i", second, covariance, second))
    squares = np.einsum("np,np->n", rows - rows.mean(axis=0), (rows - rows.mean(axis=0)) @ second)

    def biased(size: float, axis: int) -> Alternative:
        shift = size * spread[axis]
        more = shift**2 * second[axis, axis]
        growth = 1 + more * share * (1 - share) / squares.mean()
        return Alternative(float(more), float(2 * shift * across[axis]), float(growth))

    def stretched(factor: float) -> Alternative:
        deviation = abs(factor - 1) * np.sqrt(inverse * squares.var())
        growth = 1 + share * (factor**2 - 1)
        return Alternative(float((factor - 1) ** 2 * squares.mean()), float(deviation), float(growth))

    worst = min(_axes(len(spread)), key=lambda axis: biased(0.5, axis).mean)
    return errors_found(partial(biased, axis=worst), stretched, null, critical, level)


def detectable_of_scores(
    values: Callable[[Array], Array],
    rows: Float[Array, "n D"],
    independent: float,
    null: Float[np.ndarray, " m"],
    critical: float,
    level: float,
) -> Detectable:
    """Return what a kernel Stein discrepancy finds.

    The draws at hand are themselves a little off; the mean over an error and its opposite leaves that out. Random
    signs spread more over draws that misfit, and the critical value grows with them.

    Args:
        values: draws to the Stein kernel of their pairs (n, n).
        rows: some of the draws.
        independent: independent draws that all of them are worth.
        null: statistics under random signs, less the sum over single draws.
        critical: the largest statistic that is no misfit, less the same.
        level: probability of a false alarm.
    """
    middle, spread = jnp.mean(rows, axis=0), jnp.std(rows, axis=0)
    base_mean, _, base_spread = _stein_moments(values(rows))

    def against(pair: list[Array]) -> Alternative:
        means, deviations, spreads = np.mean([_stein_moments(values(moved)) for moved in pair], axis=0)
        wider = (spreads / base_spread - 1) * critical
        return Alternative(float(means - base_mean - wider), float(2 * deviations / np.sqrt(independent)))

    def biased(size: float, axis: int) -> Alternative:
        return against([rows.at[:, axis].add(sign * size * spread[axis]) for sign in (-1, 1)])

    def stretched(factor: float) -> Alternative:
        return against([middle + s * (rows - middle) for s in (factor, 1 / factor)])

    worst = min(_axes(rows.shape[1]), key=lambda axis: biased(0.5, axis).mean)
    return errors_found(partial(biased, axis=worst), stretched, null, critical, level)


def _stein_moments(values: Array) -> tuple[float, float, float]:
    """Mean over pairs, standard deviation of the means over one of them, root mean square of the pairs."""
    found = np.array(values, float)
    np.fill_diagonal(found, 0)
    means = found.sum(axis=1) / (len(found) - 1)
    square = np.sum(found**2) / (len(found) * (len(found) - 1))
    return float(means.mean()), float(means.std()), float(np.sqrt(square))


def _axes(dims: int) -> list[int]:
    return np.unique(np.linspace(0, dims - 1, min(dims, _COORDINATES)).astype(int)).tolist()


def _independent(pooled: Pooled) -> list[float]:
    """How many independent draws each set is worth; a block is of eight correlation times at least."""
    return [size * min(1.0, 8 / pooled.block) for size in pooled.sizes]
