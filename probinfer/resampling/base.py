"""The type of a resampling scheme, and what all schemes share: checks of the input, and equal weights."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from probinfer.core.types import Array
from probinfer.numerics import weights

__all__ = ["ConditionalScheme", "Scheme", "check", "equal_weights", "equal_weights_with_reference"]

Scheme = Callable[[Array, Array, int], tuple[Array, Array]]
ConditionalScheme = Scheme


def check(log_weights: Array, num: int) -> None:
    """Check the input of a scheme.

    Raises:
        TypeError: the log weights are not floating point.
        ValueError: they are not a vector, there are none, or ``num`` is not positive.
    """
    if not jnp.issubdtype(log_weights.dtype, jnp.floating):
        raise TypeError(
            f"log weights must be floating numbers, got dtype {log_weights.dtype}: pass log(weights), not counts"
        )
    if log_weights.ndim != 1:
        raise ValueError(
            f"expected one vector of log weights (n,), got shape {log_weights.shape}: use jax.vmap for batches"
        )
    if num < 1 or log_weights.shape[0] < 1:
        raise ValueError(
            f"resampling needs num >= 1 and at least one weight, got num={num} and {log_weights.shape[0]} weights"
        )


def equal_weights(log_weights: Array, ancestors: Array, num: int) -> tuple[Array, Array]:
    """Give every chosen draw the weight sum / num; if the sum is zero or not finite, the ancestors are 0, 1, ..."""
    return _equal_weights(weights.normalize(log_weights).log_sum, ancestors, log_weights.shape[0], num)


def equal_weights_with_reference(log_weights: Array, ancestors: Array, num: int) -> tuple[Array, Array]:
    """Do as ``equal_weights``; NaN if draw 0, which must survive, has weight zero and others do not."""
    log_sum = weights.normalize(log_weights).log_sum
    impossible = (log_weights[0] == -jnp.inf) & (log_sum > -jnp.inf)
    log_sum = jnp.where(impossible, jnp.asarray(jnp.nan, log_sum.dtype), log_sum)
    return _equal_weights(log_sum, ancestors, log_weights.shape[0], num)


def _equal_weights(log_sum: Array, ancestors: Array, size: int, num: int) -> tuple[Array, Array]:
    ancestors = jnp.where(jnp.isfinite(log_sum), ancestors, jnp.arange(num, dtype=jnp.int32) % size)
    return ancestors.astype(jnp.int32), jnp.full(num, log_sum - jnp.log(jnp.asarray(num, log_sum.dtype)))
