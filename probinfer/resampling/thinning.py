"""Optimal resampling: fewer draws, none twice, heavy ones with the weight that they have."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.numerics import weights
from probinfer.resampling.base import check
from probinfer.resampling.counts import ancestors_of
from probinfer.resampling.points import systematic_bounds

__all__ = ["optimal"]


@partial(jax.jit, static_argnames="num")
def optimal(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Keep ``num`` of n different candidates: draw i with probability :math:`\min(w_i/c, 1)`.

    The threshold c solves :math:`\sum_i\min(w_i/c, 1) = num`. Draws above it are kept with their weight, the
    others have weight c if they are chosen. Among the unbiased schemes without duplicates this one has the least
    mean squared error of the weights: for candidates that were enumerated, of which two copies are worth no more
    than one. Costs one sort; ancestors come sorted, not more than one for a draw.

    Args:
        key: random key.
        log_weights: unnormalised log weights, minus infinity allowed.
        num: how many to keep, between 1 and n.

    Returns:
        ancestors: indices into the sample, none of weight zero.
        log_weights: ``max(log w, log c)`` of each. If fewer than ``num`` weights are positive, all of those draws
            are kept with their weights, and the ancestors left over repeat the last with log weight minus
            infinity. When every weight is zero all are minus infinity, when one is NaN or plus infinity all are
            NaN; the ancestors are then 0, 1, ...

    Raises:
        TypeError: the log weights are not floating.
        ValueError: they are no vector, there are none, or ``num`` is not between 1 and their number.

    References:
        Fearnhead and Clifford (2003), section 3.
    """
    check(log_weights, num)
    size = log_weights.shape[0]
    if num > size:
        raise ValueError(
            f"optimal resampling keeps different draws: num must be at most {size}, got num={num}"
        )
    log_sum = weights.normalize(log_weights).log_sum
    finite = jnp.isfinite(log_sum)
    usable = jnp.where(finite, log_weights, jnp.zeros_like(log_weights))
    log_threshold = _log_threshold(usable, num)
    bounds = _bounds(key, usable, log_threshold, num)
    ancestors = jnp.where(finite, ancestors_of(bounds, num), jnp.arange(num, dtype=jnp.int32))
    surplus = jnp.arange(num) >= jnp.sum(log_weights > -jnp.inf)
    kept = jnp.where(surplus, -jnp.inf, jnp.maximum(log_weights[ancestors], log_threshold))
    return ancestors.astype(jnp.int32), jnp.where(finite, kept, log_sum).astype(log_weights.dtype)


def _log_threshold(log_weights: Array, num: int) -> Array:
    """Return log c. With the k heaviest kept, c is the sum of the others over num - k; take the least k that fits."""
    descending = -jnp.sort(-log_weights)
    shifted = descending - descending[0]
    rest = jax.lax.cumlogsumexp(shifted, reverse=True)[:num]
    candidates = rest - jnp.log(jnp.arange(num, 0, -1).astype(rest.dtype))
    slack = 4 * jnp.finfo(rest.dtype).eps
    fits = (shifted[:num] <= candidates + slack).at[-1].set(True)
    return descending[0] + candidates[jnp.argmax(fits)]


def _bounds(key: Array, log_weights: Array, log_threshold: Array, num: int) -> Array:
    """Return cumulative counts, each draw counted at most once."""
    alive = log_weights > -jnp.inf
    none = log_threshold == -jnp.inf
    expected = jnp.exp(log_weights - jnp.where(none, jnp.zeros_like(log_threshold), log_threshold))
    sure = alive & (none | (expected >= 1 - 8 * jnp.finfo(expected.dtype).eps))
    doubtful = alive & ~sure
    number = jnp.minimum(num - jnp.sum(sure, dtype=jnp.int32), jnp.sum(doubtful, dtype=jnp.int32))
    offset = jax.random.uniform(key, (), expected.dtype)
    drawn = systematic_bounds(jnp.where(doubtful, expected, jnp.zeros_like(expected)), offset, number)
    # rounding must not choose one twice: steps of a bound are 0 or 1
    rank = jnp.cumsum(doubtful, dtype=jnp.int32)
    drawn = rank + jnp.minimum(jax.lax.cummin(drawn - rank), 0)
    drawn = jnp.maximum(drawn, number - (rank[-1] - rank))
    bounds = drawn + jnp.cumsum(sure, dtype=jnp.int32)
    index = jnp.arange(bounds.shape[0], dtype=jnp.int32)
    return jnp.where(index >= jnp.max(jnp.where(alive, index, 0)), num, bounds)
