r"""Conditional schemes: what else is chosen, given that the reference is.

Particle Gibbs keeps one path. Its resampling must have the law of an unconditional scheme, given that one slot
descends from the reference, or the posterior is not left unchanged. Let the scheme choose draw i :math:`O_i` times
and let a uniformly random permutation deal the copies to the slots; then slot 0 descends from draw i with
probability :math:`W_i`, and given that it descends from the reference r the counts have the law

.. math:: P(O \mid r) = P(O)\, O_r / (num\, W_r).

Schemes that look at the order of the draws are applied to a uniformly random order of them, since a reference that
always comes first is not an exchangeable one (multinomial resampling does not look). By convention the reference
is draw 0, and slot 0 descends from it. The others come sorted and are rotated at random, so that each other slot has
the same law.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.resampling.base import check, share_with_reference
from probinfer.resampling.counts import (
    ancestors_of,
    bounds_of,
    cumulative,
    expected_offspring,
    relative_weights,
    uniform_points_below,
)
from probinfer.resampling.pairwise import ssp_bounds
from probinfer.resampling.points import systematic_bounds

__all__ = [
    "conditional_multinomial",
    "conditional_ssp",
    "conditional_stratified",
    "conditional_systematic",
]


@partial(jax.jit, static_argnames="num")
def conditional_multinomial(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    """Choose ``num - 1`` draws independently by the weights, and draw 0.

    Args:
        key: random key.
        log_weights: unnormalised log weights; draw 0 is the reference.
        num: how many to choose, at least 1; need not be n.

    Returns:
        ancestors: indices into the sample, the first one 0, none of weight zero.
        log_weights: all equal to log(sum of the weights / num); minus infinity or NaN with ancestors 0, 1, ...
            when every weight is zero or one is NaN or plus infinity, and NaN if the weight of the reference alone
            is zero.

    Raises:
        TypeError: the log weights are not floating.
        ValueError: they are no vector, there are none, or ``num`` is not positive.

    References:
        Andrieu, Doucet and Holenstein (2010), section 4.3.
    """
    check(log_weights, num)
    relative = relative_weights(log_weights)
    ends = cumulative(expected_offspring(relative, num - 1), num - 1)
    key_points, key_turn = jax.random.split(key)
    bounds = bounds_of(uniform_points_below(key_points, ends, num - 1, num), relative > 0, num - 1)
    others = ancestors_of(bounds, num)[: num - 1]
    return share_with_reference(log_weights, _lead(key_turn, others), num)


@partial(jax.jit, static_argnames="num")
def conditional_stratified(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    """Do as ``stratified`` on randomly ordered draws, given draw 0: one point is uniform on its interval.

    Args:
        key: random key.
        log_weights: unnormalised log weights; draw 0 is the reference.
        num: how many to choose, at least 1; need not be n.

    Returns:
        The ancestors, the first one 0, and their log weights, as for ``conditional_multinomial``.

    Raises:
        TypeError: the log weights are not floating.
        ValueError: they are no vector, there are none, or ``num`` is not positive.

    References:
        Chopin and Singh (2015), On particle Gibbs sampling, section 5; Karppinen, Singh and Vihola (2023).
    """
    check(log_weights, num)
    key_order, key_places, key_turn = jax.random.split(key, 3)
    order, position = _random_order(key_order, log_weights.shape[0])
    expected = expected_offspring(relative_weights(log_weights), num)[order]
    whole, fraction = cumulative(expected, num)
    cell, start = _start(whole, fraction, position)
    places = jax.random.uniform(key_places, (num + 1,), expected.dtype)
    point = start + places[num] * expected[position]
    cell = jnp.minimum(cell + jnp.floor(point).astype(jnp.int32), num - 1)
    places = places.at[cell].set(point - jnp.floor(point))
    below = whole + (places[jnp.minimum(whole, num - 1)] < fraction).astype(jnp.int32)
    bounds = bounds_of(below, expected > 0, num)
    return share_with_reference(log_weights, _others(key_turn, bounds, order, position, num), num)


@partial(jax.jit, static_argnames="num")
def conditional_systematic(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    """Do as ``systematic`` on randomly ordered draws, given draw 0: one point is uniform on its interval.

    Args:
        key: random key.
        log_weights: unnormalised log weights; draw 0 is the reference.
        num: how many to choose, at least 1; need not be n.

    Returns:
        The ancestors, the first one 0, and their log weights, as for ``conditional_multinomial``.

    Raises:
        TypeError: the log weights are not floating.
        ValueError: they are no vector, there are none, or ``num`` is not positive.

    References:
        Chopin and Singh (2015), On particle Gibbs sampling, section 5; Karppinen, Singh and Vihola (2023).
    """
    check(log_weights, num)
    key_order, key_point, key_turn = jax.random.split(key, 3)
    order, position = _random_order(key_order, log_weights.shape[0])
    expected = expected_offspring(relative_weights(log_weights), num)[order]
    _, start = _start(*cumulative(expected, num), position)
    length = expected[position]
    part, place = jax.random.uniform(key_point, (2,), expected.dtype)
    # the point lies in the whole cells of the interval, where any offset serves, or in what is left of it
    point = jnp.where(part * length < jnp.floor(length), place, start + place * (length - jnp.floor(length)))
    bounds = systematic_bounds(expected, point - jnp.floor(point), num)
    return share_with_reference(log_weights, _others(key_turn, bounds, order, position, num), num)


@partial(jax.jit, static_argnames="num")
def conditional_ssp(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Do as ``ssp`` on randomly ordered draws, given draw 0.

    With k whole expected copies and the fraction f the reference is rounded up with probability
    :math:`f(k+1)/(f+k)`; given that, the pairs meet by Doob's transform of the process.

    Args:
        key: random key.
        log_weights: unnormalised log weights; draw 0 is the reference.
        num: how many to choose, at least 1; need not be n.

    Returns:
        The ancestors, the first one 0, and their log weights, as for ``conditional_multinomial``.

    Raises:
        TypeError: the log weights are not floating.
        ValueError: they are no vector, there are none, or ``num`` is not positive.

    References:
        Gerber, Chopin and Whiteley (2019), section 5; Karppinen, Singh and Vihola (2023).
    """
    check(log_weights, num)
    key_order, key_pairs, key_turn = jax.random.split(key, 3)
    order, position = _random_order(key_order, log_weights.shape[0])
    expected = expected_offspring(relative_weights(log_weights), num)[order]
    copies = jnp.floor(expected[position])
    fraction = expected[position] - copies
    uniforms = jax.random.uniform(key_pairs, expected.shape, expected.dtype)
    up = uniforms[0] * expected[position] < fraction * (copies + 1)  # no pair meets at place 0
    bounds = ssp_bounds(uniforms, expected, num, position, up)
    return share_with_reference(log_weights, _others(key_turn, bounds, order, position, num), num)


def _random_order(key: Array, size: int) -> tuple[Array, Array]:
    """Return a uniformly random order of the draws and where the reference stands in it."""
    order = jax.random.permutation(key, jnp.arange(size, dtype=jnp.int32))
    return order, jnp.argmin(order).astype(jnp.int32)


def _start(whole: Array, fraction: Array, position: Array) -> tuple[Array, Array]:
    """Return the cell in which the interval of a particle starts, and where inside it."""
    before = jnp.maximum(position - 1, 0)
    first = position == 0
    return jnp.where(first, 0, whole[before]), jnp.where(first, 0, fraction[before])


def _others(key: Array, bounds: Array, order: Array, position: Array, num: int) -> Array:
    """Take one copy of the reference for slot 0, and the other draws for the other slots."""
    index = jnp.arange(bounds.shape[0], dtype=jnp.int32)
    fewer = jax.lax.cummax(jnp.maximum(bounds - (index >= position).astype(jnp.int32), 0))
    return _lead(key, order[ancestors_of(fewer, num)[: num - 1]])


def _lead(key: Array, others: Array) -> Array:
    size = others.shape[0]
    turn = (jax.random.bits(key, (), jnp.uint32) % max(size, 1)).astype(jnp.int32)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.roll(others, turn)])
