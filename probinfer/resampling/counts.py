r"""Cumulative expected offspring without rounding, and the step from counts to ancestors.

A particle of normalised weight :math:`W_i` owns the interval :math:`[C_{i-1}, C_i)` of the line from 0 to num,
:math:`C_i = num\sum_{k\le i} W_k`; a scheme throws num points on that line. A floating-point cumulative sum is
neither monotone nor flat at zeros (XLA associates it as it likes), and in single precision it is wrong by whole
offspring for a million particles. So :math:`C_i` is kept as an integer and a fraction, both summed as integers.
Which particle a point falls to is never looked up: the number of points below :math:`C_i` is counted for every i.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Int
from probinfer.numerics import weights
from probinfer.resampling.sums import running_count, running_sum

__all__ = [
    "Cumulative",
    "ancestors_of",
    "bounds_of",
    "cumulative",
    "expected_offspring",
    "in_place",
    "relative_weights",
    "uniform_points_below",
]

_SUM_BITS = 50  # of the 53 of a double


class Cumulative(NamedTuple):
    """The ends C_i of the intervals, as ``whole + fraction``."""

    whole: Array
    fraction: Array

    @property
    def exact(self) -> bool:
        """Whether they are monotone, flat at weights of zero, and end in num."""
        return self.fraction.dtype == jnp.float64


def relative_weights(log_weights: Array) -> Array:
    """Return w_i / max w, zero for all if there is no finite maximum."""
    relative, largest = weights.relative(log_weights)
    return jnp.where(jnp.isfinite(largest), relative, jnp.zeros_like(relative))


def expected_offspring(relative: Array, num: int | Array) -> Array:
    """Return num W_i, equal to an integer where it is one up to rounding."""
    total = jnp.sum(relative)
    number = jnp.asarray(num, relative.dtype)
    expected = relative * number / jnp.where(total > 0, total, jnp.ones_like(total))
    nearest = jnp.round(expected)
    slack = 8 * jnp.finfo(relative.dtype).eps * expected
    return jnp.where(jnp.abs(expected - nearest) <= slack, nearest, expected)


def cumulative(expected: Array, num: int | Array) -> Cumulative:
    """Sum expected offspring exactly; what rounding left missing from ``num`` is spread in proportion."""
    if expected.dtype == jnp.float64:
        return _cumulative_double(expected, num)
    return _cumulative_fixed(expected, num)


def _cumulative_double(expected: Array, num: int | Array) -> Cumulative:
    """Round to multiples of a power of two whose sums are exact in any order: monotone, and flat at zeros."""
    unit = _unit(num)
    ends = running_sum(jnp.round(expected / unit) * unit)
    total = jnp.maximum(ends[-1], unit)
    ends = jnp.clip(ends + (num - ends[-1]) * (ends / total), 0, num)
    whole = jnp.floor(ends)
    return Cumulative(whole.astype(jnp.int32), ends - whole)


def _unit(num: int | Array) -> Array | float:
    if isinstance(num, int):
        return 2.0 ** (num.bit_length() - _SUM_BITS)
    exponent = jnp.frexp(num.astype(jnp.float64))[1] - _SUM_BITS
    return jnp.ldexp(jnp.ones((), jnp.float64), exponent)


def _cumulative_fixed(expected: Array, num: int | Array) -> Cumulative:
    """Sum whole numbers and fractions as integers."""
    dtype = expected.dtype
    whole = jnp.floor(expected)
    fixed = jnp.round((expected - whole) * 2.0**32).astype(jnp.uint32)
    wrapped = jnp.cumsum(fixed, dtype=jnp.uint32)
    carries = (wrapped < fixed).astype(jnp.int32)
    whole = jnp.cumsum(whole.astype(jnp.int32) + carries, dtype=jnp.int32)
    fraction = wrapped.astype(dtype) * 2.0**-32
    ends = whole.astype(dtype) + fraction
    missing = (num - whole[-1]).astype(dtype) - fraction[-1]
    fraction = fraction + missing * (ends / jnp.maximum(ends[-1], jnp.finfo(dtype).tiny))
    carry = jnp.floor(fraction)
    return Cumulative(jnp.clip(whole + carry.astype(jnp.int32), 0, num), fraction - carry)


def uniform_points_below(key: Array, ends: Cumulative, number: int | Array, capacity: int) -> Array:
    """Throw ``number`` independent uniform points on [0, number) and count those below every C_i.

    The unit cells in which they fall are drawn first. Their places inside the cells are independent of that, so
    points need not be sorted: cell k takes the next of a list of uniforms. The loop is as long as the fullest
    cell, about log(number) / log(log(number)).
    """
    key_cell, key_place = jax.random.split(key)
    cells = jax.random.randint(key_cell, (capacity,), 0, jnp.maximum(number, 1), jnp.int32)
    cells = jnp.where(jnp.arange(capacity, dtype=jnp.int32) < number, cells, capacity + 1)
    occupancy = jnp.zeros(capacity + 1, jnp.int32).at[cells].add(1, mode="drop")
    places = jax.random.uniform(key_place, (capacity,), ends.fraction.dtype)
    starts = (jnp.cumsum(occupancy, dtype=jnp.int32) - occupancy)[ends.whole]
    inside = occupancy[ends.whole]

    def add(rank, below):
        place = places[jnp.minimum(starts + rank, capacity - 1)]
        return below + ((rank < inside) & (place < ends.fraction)).astype(jnp.int32)

    return jax.lax.fori_loop(0, jnp.max(occupancy), add, starts)


def bounds_of(below: Array, alive: Array, num: int | Array, exact: bool = False) -> Array:
    """Return how many draws descend from particles 0 ... i: monotone, flat at dead ones, num from the last on.

    ``exact``: the counts are so already, since they come from sums without rounding.
    """
    if exact:
        return below
    bounds = jax.lax.cummax(jnp.where(alive, jnp.clip(below, 0, num), 0).astype(jnp.int32))
    index = jnp.arange(alive.shape[0], dtype=jnp.int32)
    last = jnp.max(jnp.where(alive, index, 0))
    return jnp.where(index >= last, jnp.asarray(num, jnp.int32), bounds)


def ancestors_of(bounds: Array, num: int) -> Array:
    """Return the ancestor of draws 0 ... num - 1: how many particles have a bound of at most j."""
    passed = jnp.zeros(num, jnp.int32).at[bounds].add(1, mode="drop", indices_are_sorted=True)
    return running_count(passed)


def in_place(ancestors: Int[Array, " n"]) -> Int[Array, " n"]:
    """Deal the same ancestors to other slots: whoever is chosen at all keeps its own slot once.

    ``in_place(a)[i] == i`` for every i in a; the further copies fill the slots of those not chosen. As few rows move
    as can be, and a slot 0 that descends from draw 0 stays so.

    Args:
        ancestors: indices into a sample of the same size n.
    """
    size = ancestors.shape[0]
    counts = jnp.zeros(size, jnp.int32).at[ancestors].add(1)
    copies = ancestors_of(jnp.cumsum(jnp.maximum(counts - 1, 0), dtype=jnp.int32), size)
    free = counts == 0
    rank = jnp.cumsum(free, dtype=jnp.int32) - 1
    return jnp.where(free, copies[jnp.maximum(rank, 0)], jnp.arange(size, dtype=jnp.int32))
