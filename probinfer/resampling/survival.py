"""Killing: a draw survives in its own slot with probability w / max w, else it is replaced by a fresh draw."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.resampling.base import check, share, share_with_reference
from probinfer.resampling.counts import (
    ancestors_of,
    bounds_of,
    cumulative,
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

    :math:`E O_i = w_i/m + W_i\sum_j(1 - w_j/m) = n W_i`. Nearly equal weights move nearly nobody, which is what
    filters in small time steps and large states want. About linear in n; survivors keep their slots.

    Args:
        key: random key.
        log_weights: unnormalised log weights, minus infinity allowed.
        num: how many to choose: n, since slots are kept.

    Returns:
        ancestors: indices into the sample, none of weight zero; ``ancestors[i] == i`` for survivors.
        log_weights: all equal to log(sum of the weights / num); minus infinity or NaN with ancestors 0, 1, ...
            when every weight is zero or one is NaN or plus infinity.

    Raises:
        TypeError: the log weights are not floating.
        ValueError: they are no vector, there are none, or ``num`` is not their number.

    References:
        Del Moral (2004), Feynman-Kac Formulae; Karppinen, Singh and Vihola (2023), section 5.
    """
    _check_slots(log_weights, num)
    key_survive, key_refill = jax.random.split(key)
    relative = relative_weights(log_weights)
    empty = jax.random.uniform(key_survive, (num,), log_weights.dtype) >= relative
    return share(log_weights, _refill(key_refill, relative, empty), num)


@partial(jax.jit, static_argnames="num")
def conditional_killing(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Do as ``killing``, given that a uniformly chosen slot K descends from draw 0.

    :math:`P(K=k) = (1 - w_k/m)/n` for :math:`k \ne 0` and :math:`P(K=0) = (1 - w_0/m + \sum_j w_j/m)/n`; given
    K the other slots behave as ever. The contents of slots 0 and K are then exchanged. It treats all draws alike,
    so nothing is permuted.

    Args:
        key: random key.
        log_weights: unnormalised log weights; draw 0 is the reference.
        num: how many to choose: n, since slots are kept.

    Returns:
        The ancestors, ``ancestors[0] == 0``, and their log weights, as for ``killing``; NaN if the weight of the
        reference alone is zero.

    Raises:
        TypeError: the log weights are not floating.
        ValueError: they are no vector, there are none, or ``num`` is not their number.

    References:
        Karppinen, Singh and Vihola (2023), Conditional particle filters with bridge backward sampling.
    """
    _check_slots(log_weights, num)
    key_survive, key_slot, key_refill = jax.random.split(key, 3)
    relative = relative_weights(log_weights)
    index = jnp.arange(num, dtype=jnp.int32)
    chances = (1 - relative).at[0].add(jnp.sum(relative))
    slot = _slot(key_slot, chances)
    empty = jax.random.uniform(key_survive, (num,), log_weights.dtype) >= relative
    ancestors = _refill(key_refill, relative, empty & (index != slot))
    # what stood in slot 0 goes where the reference was found
    ancestors = jnp.where(index == slot, ancestors[0], ancestors).at[0].set(0)
    return share_with_reference(log_weights, ancestors, num)


def _slot(key: Array, chances: Array) -> Array:
    """Draw one slot by its chance; they sum to the number of slots."""
    key_cell, key_place = jax.random.split(key)
    num = chances.shape[0]
    cell = jax.random.randint(key_cell, (), 0, num, jnp.int32)
    place = jax.random.uniform(key_place, (), chances.dtype)
    whole, fraction = cumulative(chances, num)
    passed = (whole < cell) | ((whole == cell) & (fraction <= place))
    return jnp.minimum(jnp.sum(passed, dtype=jnp.int32), num - 1)


def _refill(key: Array, relative: Array, empty: Array) -> Array:
    """Put a multinomial sample, as large as there are empty slots, into these slots; it is sorted, so rotated."""
    key_points, key_shift = jax.random.split(key)
    num = relative.shape[0]
    number = jnp.sum(empty, dtype=jnp.int32)
    ends = cumulative(expected_offspring(relative, number), number)
    below = uniform_points_below(key_points, ends, number, num)
    fresh = ancestors_of(bounds_of(below, relative > 0, number), num)
    several = jnp.maximum(number, 1).astype(jnp.uint32)
    rank = jnp.cumsum(empty, dtype=jnp.int32).astype(jnp.uint32)
    shift = jax.random.bits(key_shift, (), jnp.uint32) % several
    return jnp.where(empty, fresh[(rank + shift) % several], jnp.arange(num, dtype=jnp.int32))


def _check_slots(log_weights: Array, num: int) -> None:
    check(log_weights, num)
    if num != log_weights.shape[0]:
        raise ValueError(
            f"killing keeps survivors in their slots, so num must be the number of draws, {log_weights.shape[0]}; "
            f"got num={num}: use systematic or ssp to change the number"
        )
