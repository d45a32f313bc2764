"""Optimal resampling: fewer draws without duplicates, where heavy draws keep their weights."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.numerics import weights
from probinfer.resampling.base import check
from probinfer.resampling.counts import ancestors_from_counts
from probinfer.resampling.points import systematic_counts

__all__ = ["optimal"]


@partial(jax.jit, static_argnames="num")
def optimal(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Keep ``num`` of n different candidates: draw i with probability :math:`\min(w_i/c, 1)`.

    The threshold c solves :math:`\sum_i\min(w_i/c, 1) = num`. Draws above it keep their weight; the others have weight
    c if they are chosen. Among unbiased schemes without duplicates, the mean squared error of the weights is minimal.
    It is meant for enumerated candidates, of which a second copy adds nothing. Cost of one sort; the ancestors are
    sorted, at most one per draw.

    Args:
        key: random key.
        log_weights: unnormalized log weights, minus infinity allowed.
        num: number of draws to keep, between 1 and n.

    Returns:
        ancestors: indices into the sample, none with weight zero.
        log_weights: ``max(log w, log c)`` of each. If fewer than ``num`` weights are positive, these draws keep their
            weights, and the surplus ancestors repeat the last with log weight minus infinity. If every weight is zero
            all are minus infinity, and if one is NaN or plus infinity all are NaN; the ancestors are then 0, 1, ...

    Raises:
        TypeError: the log weights are not floating point.
        ValueError: they are not a vector, there are none, or ``num`` is not between 1 and their number.

    References:
        Fearnhead and Clifford (2003), section 3.
    """
    check(log_weights, num)
    size = log_weights.shape[0]
    if num > size:
        raise ValueError(
            f"optimal resampling keeps distinct draws: num must be at most {size}, got num={num}"
        )
    log_sum = weights.normalize(log_weights).log_sum
    finite = jnp.isfinite(log_sum)
    usable = jnp.where(finite, log_weights, jnp.zeros_like(log_weights))
    log_threshold = _log_threshold(usable, num)
    counts = _cumulative_counts(key, usable, log_threshold, num)
    ancestors = jnp.where(finite, ancestors_from_counts(counts, num), jnp.arange(num, dtype=jnp.int32))
    surplus = jnp.arange(num) >= jnp.sum(log_weights > -jnp.inf)
    new_log_weights = jnp.where(surplus, -jnp.inf, jnp.maximum(log_weights[ancestors], log_threshold))
    return ancestors.astype(jnp.int32), jnp.where(finite, new_log_weights, log_sum).astype(log_weights.dtype)


def _log_threshold(log_weights: Array, num: int) -> Array:
    """Return log c: the sum of all but the k heaviest weights over num - k, with the smallest valid k."""
    descending = -jnp.sort(-log_weights)
    shifted = descending - descending[0]
    log_rest = jax.lax.cumlogsumexp(shifted, reverse=True)[:num]
    candidates = log_rest - jnp.log(jnp.arange(num, 0, -1).astype(log_rest.dtype))
    tolerance = 4 * jnp.finfo(log_rest.dtype).eps
    valid = (shifted[:num] <= candidates + tolerance).at[-1].set(True)
    return descending[0] + candidates[jnp.argmax(valid)]


def _cumulative_counts(key: Array, log_weights: Array, log_threshold: Array, num: int) -> Array:
    """Return cumulative counts, in which each draw counts at most once."""
    alive = log_weights > -jnp.inf
    no_threshold = log_threshold == -jnp.inf
    expected = jnp.exp(log_weights - jnp.where(no_threshold, jnp.zeros_like(log_threshold), log_threshold))
    certain = alive & (no_threshold | (expected >= 1 - 8 * jnp.finfo(expected.dtype).eps))
    uncertain = alive & ~certain
    # Choose among the light draws by systematic resampling
    num_random = jnp.minimum(num - jnp.sum(certain, dtype=jnp.int32), jnp.sum(uncertain, dtype=jnp.int32))
    offset = jax.random.uniform(key, (), expected.dtype)
    random_counts = systematic_counts(
        jnp.where(uncertain, expected, jnp.zeros_like(expected)), offset, num_random
    )
    # Rounding must not choose a draw twice: cumulative counts increase by 0 or 1.
    rank = jnp.cumsum(uncertain, dtype=jnp.int32)
    random_counts = rank + jnp.minimum(jax.lax.cummin(random_counts - rank), 0)
    random_counts = jnp.maximum(random_counts, num_random - (rank[-1] - rank))
    # Add the heavy draws
    counts = random_counts + jnp.cumsum(certain, dtype=jnp.int32)
    index = jnp.arange(counts.shape[0], dtype=jnp.int32)
    return jnp.where(index >= jnp.max(jnp.where(alive, index, 0)), num, counts)
