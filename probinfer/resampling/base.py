"""What a resampling scheme is, and the two things that all of them do: refuse bad input, share the weight."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from probinfer.core.types import Array
from probinfer.numerics import weights

__all__ = ["ConditionalScheme", "Scheme", "check", "share", "share_with_reference"]

Scheme = Callable[[Array, Array, int], tuple[Array, Array]]
ConditionalScheme = Scheme


def check(log_weights: Array, num: int) -> None:
    """Refuse what cannot be resampled: no vector of floats, or nothing to choose.

    Raises:
        TypeError: the log weights are not floating.
        ValueError: they are no vector, there are none, or ``num`` is not positive.
    """
    if not jnp.issubdtype(log_weights.dtype, jnp.floating):
        raise TypeError(
            f"log weights must be floating numbers, got dtype {log_weights.dtype}: pass log(weights), not counts"
        )
    if log_weights.ndim != 1:
        raise ValueError(
            f"expected one vector of log weights (n,), got shape {log_weights.shape}: lift batches by jax.vmap"
        )
    if num < 1 or log_weights.shape[0] < 1:
        raise ValueError(
            f"resampling needs num >= 1 and at least one weight, got num={num} and {log_weights.shape[0]} weights"
        )


def share(log_weights: Array, ancestors: Array, num: int) -> tuple[Array, Array]:
    """Give every chosen draw the weight sum / num; without a distribution the ancestors are 0, 1, ..."""
    return _share(weights.normalize(log_weights).log_sum, ancestors, log_weights.shape[0], num)


def share_with_reference(log_weights: Array, ancestors: Array, num: int) -> tuple[Array, Array]:
    """Do as ``share``; NaN where draw 0, which must survive, has weight zero and others have not."""
    log_sum = weights.normalize(log_weights).log_sum
    impossible = (log_weights[0] == -jnp.inf) & (log_sum > -jnp.inf)
    log_sum = jnp.where(impossible, jnp.asarray(jnp.nan, log_sum.dtype), log_sum)
    return _share(log_sum, ancestors, log_weights.shape[0], num)


def _share(log_sum: Array, ancestors: Array, size: int, num: int) -> tuple[Array, Array]:
    ancestors = jnp.where(jnp.isfinite(log_sum), ancestors, jnp.arange(num, dtype=jnp.int32) % size)
    return ancestors.astype(jnp.int32), jnp.full(num, log_sum - jnp.log(jnp.asarray(num, log_sum.dtype)))
