r"""Cumulative expected offspring without rounding, and the conversion of counts to ancestors.

A particle with normalized weight :math:`W_i` has the interval :math:`[C_{i-1}, C_i)` of the line from 0 to num, where
:math:`C_i = num\sum_{k\le i} W_k`; a scheme places num points on that line. A floating-point cumulative sum is neither
monotone nor constant at zero weights (XLA may associate it in any order), and in single precision it is wrong by whole
offspring for a million particles. So :math:`C_i` is stored as an integer and a fraction, both summed as integers. No
scheme searches for the particle of a point: it counts the points below :math:`C_i` for every i.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, Int
from probinfer.numerics import weights
from probinfer.resampling.sums import cumulative_exact_sum, cumulative_int_sum

__all__ = [
    "CumulativeOffspring",
    "ancestors_from_counts",
    "cumulative",
    "cumulative_counts",
    "expected_offspring",
    "in_place",
    "relative_weights",
    "uniform_points_below",
]

_SUM_BITS = 50  # of the 53 of a double


class CumulativeOffspring(NamedTuple):
    """Ends C_i of the intervals, as ``integer + fraction``.

    Attributes:
        integer: integer parts (n,).
        fraction: fractional parts (n,), in [0, 1).
    """

    integer: Int[Array, " n"]
    fraction: Float[Array, " n"]

    @property
    def exact(self) -> bool:
        """Whether they are monotone, constant at zero weights, and end in num."""
        return self.fraction.dtype == jnp.float64


def relative_weights(log_weights: Array) -> Array:
    """Return w_i / max w; all zero if the maximum is not finite."""
    relative, largest = weights.relative_weights(log_weights)
    return jnp.where(jnp.isfinite(largest), relative, jnp.zeros_like(relative))


def expected_offspring(relative: Array, num: int | Array) -> Array:
    """Return num W_i, rounded to an integer where it is within rounding error of one."""
    total = jnp.sum(relative)
    num_points = jnp.asarray(num, relative.dtype)
    expected = relative * num_points / jnp.where(total > 0, total, jnp.ones_like(total))
    nearest = jnp.round(expected)
    tolerance = 8 * jnp.finfo(relative.dtype).eps * expected
    return jnp.where(jnp.abs(expected - nearest) <= tolerance, nearest, expected)


def cumulative(expected: Array, num: int | Array) -> CumulativeOffspring:
    """Sum expected offspring exactly; the rounding error of the total is distributed in proportion."""
    if expected.dtype == jnp.float64:
        return _cumulative_double(expected, num)
    return _cumulative_fixed(expected, num)


def _cumulative_double(expected: Array, num: int | Array) -> CumulativeOffspring:
    """Round to multiples of a power of two, whose sums are exact in any order: monotone, and constant at zeros."""
    unit = _unit(num)
    ends = cumulative_exact_sum(jnp.round(expected / unit) * unit)
    total = jnp.maximum(ends[-1], unit)
    ends = jnp.clip(ends + (num - ends[-1]) * (ends / total), 0, num)
    integer = jnp.floor(ends)
    return CumulativeOffspring(integer.astype(jnp.int32), ends - integer)


def _unit(num: int | Array) -> Array | float:
    if isinstance(num, int):
        return 2.0 ** (num.bit_length() - _SUM_BITS)
    exponent = jnp.frexp(num.astype(jnp.float64))[1] - _SUM_BITS
    return jnp.ldexp(jnp.ones((), jnp.float64), exponent)


def _cumulative_fixed(expected: Array, num: int | Array) -> CumulativeOffspring:
    """Sum integer parts, and fractions as 32-bit integers with carries."""
    dtype = expected.dtype
    integer = jnp.floor(expected)
    fixed_point = jnp.round((expected - integer) * 2.0**32).astype(jnp.uint32)
    wrapped = jnp.cumsum(fixed_point, dtype=jnp.uint32)
    carries = (wrapped < fixed_point).astype(jnp.int32)
    integer = jnp.cumsum(integer.astype(jnp.int32) + carries, dtype=jnp.int32)
    fraction = wrapped.astype(dtype) * 2.0**-32
    ends = integer.astype(dtype) + fraction
    missing = (num - integer[-1]).astype(dtype) - fraction[-1]
    fraction = fraction + missing * (ends / jnp.maximum(ends[-1], jnp.finfo(dtype).tiny))
    carry = jnp.floor(fraction)
    return CumulativeOffspring(jnp.clip(integer + carry.astype(jnp.int32), 0, num), fraction - carry)


def uniform_points_below(
    key: Array, ends: CumulativeOffspring, num_points: int | Array, capacity: int
) -> Array:
    """Sample ``num_points`` independent uniform points on [0, num_points) and count those below every C_i.

    The unit cells of the points are sampled first. Their positions inside the cells are independent of the cells, so
    points need not be sorted: each cell takes the next of a list of uniforms. The loop is as long as the fullest
    cell, about log(n) / log(log(n)) of n points.
    """
    key_cell, key_position = jax.random.split(key)
    cells = jax.random.randint(key_cell, (capacity,), 0, jnp.maximum(num_points, 1), jnp.int32)
    cells = jnp.where(jnp.arange(capacity, dtype=jnp.int32) < num_points, cells, capacity + 1)
    occupancy = jnp.zeros(capacity + 1, jnp.int32).at[cells].add(1, mode="drop")
    positions = jax.random.uniform(key_position, (capacity,), ends.fraction.dtype)
    starts = (jnp.cumsum(occupancy, dtype=jnp.int32) - occupancy)[ends.integer]
    num_in_cell = occupancy[ends.integer]

    def count_point(rank, below):
        position = positions[jnp.minimum(starts + rank, capacity - 1)]
        return below + ((rank < num_in_cell) & (position < ends.fraction)).astype(jnp.int32)

    return jax.lax.fori_loop(0, jnp.max(occupancy), count_point, starts)


def cumulative_counts(below: Array, alive: Array, num: int | Array, exact: bool = False) -> Array:
    """Return how many draws descend from particles 0 ... i: monotone, constant at dead particles, num from the last.

    With ``exact`` the counts have these properties already, since they come from sums without rounding.
    """
    if exact:
        return below
    counts = jax.lax.cummax(jnp.where(alive, jnp.clip(below, 0, num), 0).astype(jnp.int32))
    index = jnp.arange(alive.shape[0], dtype=jnp.int32)
    last = jnp.max(jnp.where(alive, index, 0))
    return jnp.where(index >= last, jnp.asarray(num, jnp.int32), counts)


def ancestors_from_counts(counts: Array, num: int) -> Array:
    """Return the ancestors of draws 0 ... num - 1 from cumulative counts: the number of counts of at most j."""
    increments = jnp.zeros(num, jnp.int32).at[counts].add(1, mode="drop", indices_are_sorted=True)
    return cumulative_int_sum(increments)


def in_place(ancestors: Int[Array, " n"]) -> Int[Array, " n"]:
    """Permute the ancestors so that every chosen draw stays in its own slot once.

    ``in_place(a)[i] == i`` for every i in a; further copies fill the slots of draws that were not chosen. The smallest
    possible number of rows moves, and if slot 0 descends from draw 0, it still does.

    Args:
        ancestors: indices into a sample of the same size n.
    """
    size = ancestors.shape[0]
    counts = jnp.zeros(size, jnp.int32).at[ancestors].add(1)
    copies = ancestors_from_counts(jnp.cumsum(jnp.maximum(counts - 1, 0), dtype=jnp.int32), size)
    free = counts == 0
    rank = jnp.cumsum(free, dtype=jnp.int32) - 1
    return jnp.where(free, copies[jnp.maximum(rank, 0)], jnp.arange(size, dtype=jnp.int32))
