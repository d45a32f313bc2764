"""Killing: a draw survives in its slot with probability w / max w, otherwise it is replaced by a fresh draw."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.resampling.base import check, equal_weights, equal_weights_with_reference
from probinfer.resampling.counts import (
    ancestors_from_counts,
    cumulative,
    cumulative_counts,
    expected_offspring,
    relative_weights,
    uniform_points_below,
)

__all__ = ["conditional_killing", "killing"]


@partial(jax.jit, static_argnames="num")
def killing(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Keep draw i in slot i with probability :math:`w_i/\max_k w_k`; refill the empty slots by the weights.

    With :math:`m = \max_k w_k`, :math:`E O_i = w_i/m + W_i\sum_j(1 - w_j/m) = n W_i`. With nearly equal weights few
    draws move, which suits filters with small time steps or large states. Cost about linear in n.

    Args:
        key: random key.
        log_weights: unnormalized log weights, minus infinity allowed.
        num: number of draws to choose: n, since slots are kept.

    Returns:
        ancestors: indices into the sample, none with weight zero; ``ancestors[i] == i`` for survivors.
        log_weights: all equal to log(sum of the weights / num); minus infinity or NaN with ancestors 0, 1, ...
            when every weight is zero or one is NaN or plus infinity.

    Raises:
        TypeError: the log weights are not floating point.
        ValueError: they are not a vector, there are none, or ``num`` is not their number.

    References:
        Del Moral (2004), Feynman-Kac Formulae; Karppinen, Singh and Vihola (2023), section 5.
    """
    _check_slots(log_weights, num)
    key_survive, key_refill = jax.random.split(key)
    relative = relative_weights(log_weights)
    empty = jax.random.uniform(key_survive, (num,), log_weights.dtype) >= relative
    return equal_weights(log_weights, _refill(key_refill, relative, empty), num)


@partial(jax.jit, static_argnames="num")
def conditional_killing(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Do as ``killing``, given that a uniformly chosen slot K descends from draw 0.

    :math:`P(K=k) = (1 - w_k/m)/n` for :math:`k \ne 0` and :math:`P(K=0) = (1 - w_0/m + \sum_j w_j/m)/n`; given
    K the other slots are unchanged in distribution. The ancestors of slots 0 and K are then exchanged. The scheme
    treats all draws alike, so nothing is permuted.

    Args:
        key: random key.
        log_weights: unnormalized log weights; draw 0 is the reference.
        num: number of draws to choose: n, since slots are kept.

    Returns:
        The ancestors, with ``ancestors[0] == 0``, and their log weights, as for ``killing``; NaN if only the reference
        has weight zero.

    Raises:
        TypeError: the log weights are not floating point.
        ValueError: they are not a vector, there are none, or ``num`` is not their number.

    References:
        Karppinen, Singh and Vihola (2023), Conditional particle filters with bridge backward sampling.
    """
    _check_slots(log_weights, num)
    key_survive, key_slot, key_refill = jax.random.split(key, 3)
    relative = relative_weights(log_weights)
    index = jnp.arange(num, dtype=jnp.int32)
    slot_weights = (1 - relative).at[0].add(jnp.sum(relative))
    slot = _sample_slot(key_slot, slot_weights)
    empty = jax.random.uniform(key_survive, (num,), log_weights.dtype) >= relative
    ancestors = _refill(key_refill, relative, empty & (index != slot))
    # Exchange slots 0 and K
    ancestors = jnp.where(index == slot, ancestors[0], ancestors).at[0].set(0)
    return equal_weights_with_reference(log_weights, ancestors, num)


def _sample_slot(key: Array, slot_weights: Array) -> Array:
    """Sample one slot by weights that sum to the number of slots."""
    key_cell, key_position = jax.random.split(key)
    num = slot_weights.shape[0]
    # A uniform point on [0, num), as a cell and a position inside it
    cell = jax.random.randint(key_cell, (), 0, num, jnp.int32)
    position = jax.random.uniform(key_position, (), slot_weights.dtype)
    integer, fraction = cumulative(slot_weights, num)
    passed = (integer < cell) | ((integer == cell) & (fraction <= position))
    return jnp.minimum(jnp.sum(passed, dtype=jnp.int32), num - 1)


def _refill(key: Array, relative: Array, empty: Array) -> Array:
    """Fill the empty slots with a multinomial sample; it is sorted, so it is rotated at random."""
    key_points, key_shift = jax.random.split(key)
    num = relative.shape[0]
    num_empty = jnp.sum(empty, dtype=jnp.int32)
    ends = cumulative(expected_offspring(relative, num_empty), num_empty)
    below = uniform_points_below(key_points, ends, num_empty, num)
    fresh = ancestors_from_counts(cumulative_counts(below, relative > 0, num_empty), num)
    modulus = jnp.maximum(num_empty, 1).astype(jnp.uint32)
    rank = jnp.cumsum(empty, dtype=jnp.int32).astype(jnp.uint32)
    shift = jax.random.bits(key_shift, (), jnp.uint32) % modulus
    return jnp.where(empty, fresh[(rank + shift) % modulus], jnp.arange(num, dtype=jnp.int32))


def _check_slots(log_weights: Array, num: int) -> None:
    check(log_weights, num)
    if num != log_weights.shape[0]:
        raise ValueError(
            f"killing keeps survivors in their slots, so num must be the number of draws, {log_weights.shape[0]}; "
            f"got num={num}: use systematic or ssp to change the number"
        )
