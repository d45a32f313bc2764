r"""Conditional schemes: the distribution of the other ancestors, given that the reference is chosen.

Particle Gibbs keeps one path. To leave the posterior invariant, its resampling must have the distribution of an
unconditional scheme, given that one slot descends from the reference. Let the scheme choose draw i :math:`O_i` times,
and let a uniformly random permutation assign the copies to the slots; then slot 0 descends from draw i with probability
:math:`W_i`, and given that it descends from the reference r the counts have the distribution

.. math:: P(O \mid r) = P(O)\, O_r / (num\, W_r).

Schemes that depend on the order of the draws are applied to a uniformly random order, since a reference that always
comes first is not exchangeable with the others (multinomial resampling does not depend on it). By convention the
reference is draw 0, and slot 0 descends from it. The other ancestors are sorted and then rotated at random, so that
each other slot has the same distribution.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.resampling.base import check, equal_weights_with_reference
from probinfer.resampling.counts import (
    ancestors_from_counts,
    cumulative,
    cumulative_counts,
    expected_offspring,
    relative_weights,
    uniform_points_below,
)
from probinfer.resampling.pairwise import ssp_counts
from probinfer.resampling.points import systematic_counts

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
        log_weights: unnormalized log weights; draw 0 is the reference.
        num: number of draws to choose, at least 1; may differ from n.

    Returns:
        ancestors: indices into the sample, of which the first is 0, none with weight zero.
        log_weights: all equal to log(sum of the weights / num). They are minus infinity if every weight is zero and NaN
            if one is NaN or plus infinity, both with ancestors 0, 1, ...; and NaN if only the reference has weight
            zero.

    Raises:
        TypeError: the log weights are not floating point.
        ValueError: they are not a vector, there are none, or ``num`` is not positive.

    References:
        Andrieu, Doucet and Holenstein (2010), section 4.3.
    """
    check(log_weights, num)
    relative = relative_weights(log_weights)
    ends = cumulative(expected_offspring(relative, num - 1), num - 1)
    key_points, key_shift = jax.random.split(key)
    counts = cumulative_counts(uniform_points_below(key_points, ends, num - 1, num), relative > 0, num - 1)
    others = ancestors_from_counts(counts, num)[: num - 1]
    return equal_weights_with_reference(log_weights, _insert_reference(key_shift, others), num)


@partial(jax.jit, static_argnames="num")
def conditional_stratified(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    """Do as ``stratified`` on randomly ordered draws, given draw 0: one point is uniform on its interval.

    Args:
        key: random key.
        log_weights: unnormalized log weights; draw 0 is the reference.
        num: number of draws to choose, at least 1; may differ from n.

    Returns:
        The ancestors, of which the first is 0, and their log weights, as for ``conditional_multinomial``.

    Raises:
        TypeError: the log weights are not floating point.
        ValueError: they are not a vector, there are none, or ``num`` is not positive.

    References:
        Chopin and Singh (2015), On particle Gibbs sampling, section 5; Karppinen, Singh and Vihola (2023).
    """
    check(log_weights, num)
    key_order, key_positions, key_shift = jax.random.split(key, 3)
    order, position = _random_order(key_order, log_weights.shape[0])
    expected = expected_offspring(relative_weights(log_weights), num)[order]
    integer, fraction = cumulative(expected, num)
    # One point is uniform on the interval of the reference; it replaces the point of its cell
    cell, start = _interval_start(integer, fraction, position)
    uniforms = jax.random.uniform(key_positions, (num + 1,), expected.dtype)
    point = start + uniforms[num] * expected[position]
    cell = jnp.minimum(cell + jnp.floor(point).astype(jnp.int32), num - 1)
    uniforms = uniforms.at[cell].set(point - jnp.floor(point))
    below = integer + (uniforms[jnp.minimum(integer, num - 1)] < fraction).astype(jnp.int32)
    counts = cumulative_counts(below, expected > 0, num)
    ancestors = _ancestors_with_reference(key_shift, counts, order, position, num)
    return equal_weights_with_reference(log_weights, ancestors, num)


@partial(jax.jit, static_argnames="num")
def conditional_systematic(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    """Do as ``systematic`` on randomly ordered draws, given draw 0: one point is uniform on its interval.

    Args:
        key: random key.
        log_weights: unnormalized log weights; draw 0 is the reference.
        num: number of draws to choose, at least 1; may differ from n.

    Returns:
        The ancestors, of which the first is 0, and their log weights, as for ``conditional_multinomial``.

    Raises:
        TypeError: the log weights are not floating point.
        ValueError: they are not a vector, there are none, or ``num`` is not positive.

    References:
        Chopin and Singh (2015), On particle Gibbs sampling, section 5; Karppinen, Singh and Vihola (2023).
    """
    check(log_weights, num)
    key_order, key_point, key_shift = jax.random.split(key, 3)
    order, position = _random_order(key_order, log_weights.shape[0])
    expected = expected_offspring(relative_weights(log_weights), num)[order]
    _, start = _interval_start(*cumulative(expected, num), position)
    length = expected[position]
    selector, uniform = jax.random.uniform(key_point, (2,), expected.dtype)
    # The point lies in the full cells of the interval, where its offset is uniform, or in the rest of the interval.
    in_full_cells = selector * length < jnp.floor(length)
    point = jnp.where(in_full_cells, uniform, start + uniform * (length - jnp.floor(length)))
    counts = systematic_counts(expected, point - jnp.floor(point), num)
    ancestors = _ancestors_with_reference(key_shift, counts, order, position, num)
    return equal_weights_with_reference(log_weights, ancestors, num)


@partial(jax.jit, static_argnames="num")
def conditional_ssp(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Do as ``ssp`` on randomly ordered draws, given draw 0.

    With the integer part k and the fraction f of its expected copies, the reference is rounded up with probability
    :math:`f(k+1)/(f+k)`; given that, the pairs meet according to Doob's transform of the process.

    Args:
        key: random key.
        log_weights: unnormalized log weights; draw 0 is the reference.
        num: number of draws to choose, at least 1; may differ from n.

    Returns:
        The ancestors, of which the first is 0, and their log weights, as for ``conditional_multinomial``.

    Raises:
        TypeError: the log weights are not floating point.
        ValueError: they are not a vector, there are none, or ``num`` is not positive.

    References:
        Gerber, Chopin and Whiteley (2019), section 5; Karppinen, Singh and Vihola (2023).
    """
    check(log_weights, num)
    key_order, key_pairs, key_shift = jax.random.split(key, 3)
    order, position = _random_order(key_order, log_weights.shape[0])
    expected = expected_offspring(relative_weights(log_weights), num)[order]
    copies = jnp.floor(expected[position])
    fraction = expected[position] - copies
    uniforms = jax.random.uniform(key_pairs, expected.shape, expected.dtype)
    up = uniforms[0] * expected[position] < fraction * (copies + 1)  # uniforms[0] decides no meeting
    counts = ssp_counts(uniforms, expected, num, position, up)
    ancestors = _ancestors_with_reference(key_shift, counts, order, position, num)
    return equal_weights_with_reference(log_weights, ancestors, num)


def _random_order(key: Array, size: int) -> tuple[Array, Array]:
    """Return a uniformly random order of the draws, and the position of the reference in it."""
    order = jax.random.permutation(key, jnp.arange(size, dtype=jnp.int32))
    return order, jnp.argmin(order).astype(jnp.int32)


def _interval_start(integer: Array, fraction: Array, position: Array) -> tuple[Array, Array]:
    """Return the cell in which the interval of a particle starts, and the position of the start inside the cell."""
    previous = jnp.maximum(position - 1, 0)
    is_first = position == 0
    return jnp.where(is_first, 0, integer[previous]), jnp.where(is_first, 0, fraction[previous])


def _ancestors_with_reference(key: Array, counts: Array, order: Array, position: Array, num: int) -> Array:
    """Assign one copy of the reference to slot 0, and the other ancestors to the other slots."""
    index = jnp.arange(counts.shape[0], dtype=jnp.int32)
    other_counts = jax.lax.cummax(jnp.maximum(counts - (index >= position).astype(jnp.int32), 0))
    return _insert_reference(key, order[ancestors_from_counts(other_counts, num)[: num - 1]])


def _insert_reference(key: Array, others: Array) -> Array:
    """Rotate the other ancestors at random, and put the reference into slot 0."""
    size = others.shape[0]
    shift = (jax.random.bits(key, (), jnp.uint32) % max(size, 1)).astype(jnp.int32)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.roll(others, shift)])
