r"""Srinivasan sampling process: fractional parts meet in pairs until each is 0 or 1.

One particle is open, with fraction a. It meets the next particle, with fraction b. One of the two is closed, at 0 if
a + b is at most 1 and at 1 otherwise, and the other stays open with the remainder; the probabilities preserve both
means. The counts are negatively associated, unlike those of systematic resampling in general, so the error vanishes
for any order of the particles.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.resampling.base import check, equal_weights
from probinfer.resampling.counts import (
    ancestors_from_counts,
    cumulative_counts,
    expected_offspring,
    relative_weights,
)

__all__ = ["ssp", "ssp_counts"]


@partial(jax.jit, static_argnames="num")
def ssp(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Choose draw i floor or ceil of :math:`num\,W_i` times, the counts negatively associated.

    Cost linear in n, but sequential over the particles; the ancestors are sorted.

    Args:
        key: random key.
        log_weights: unnormalized log weights, minus infinity allowed.
        num: number of draws to choose, at least 1; may differ from n.

    Returns:
        ancestors: indices into the sample, none of weight zero.
        log_weights: all equal to log(sum of the weights / num); minus infinity or NaN with ancestors 0, 1, ...
            when every weight is zero or one is NaN or plus infinity.

    Raises:
        TypeError: the log weights are not floating point.
        ValueError: they are not a vector, there are none, or ``num`` is not positive.

    References:
        Srinivasan (2001); Gerber, Chopin and Whiteley (2019), section 5.
    """
    check(log_weights, num)
    relative = relative_weights(log_weights)
    unconditional = jnp.asarray(-1, jnp.int32)
    uniforms = jax.random.uniform(key, log_weights.shape, log_weights.dtype)
    counts = ssp_counts(uniforms, expected_offspring(relative, num), num, unconditional, jnp.asarray(False))
    return equal_weights(log_weights, ancestors_from_counts(counts, num), num)


def ssp_counts(uniforms: Array, expected: Array, num: int, marked: Array, up: Array) -> Array:
    """Return cumulative offspring counts, given that particle ``marked`` is rounded up or not; -1: no condition.

    ``uniforms[i]`` decides the meeting of particle i with the open one; the first is not used.
    """
    copies = jnp.floor(expected)
    fractions = expected - copies
    copies = copies.astype(jnp.int32)
    index = jnp.arange(expected.shape[0], dtype=jnp.int32)
    items = (index[1:], fractions[1:], uniforms[1:])
    meet = partial(_meet, marked=marked, up=up)
    outcomes: tuple[Array, Array]
    last, outcomes = jax.lax.scan(meet, (index[0], fractions[0]), items)
    closed, rounded = outcomes
    # The fractions sum to an integer, so the last open particle gets what is missing from num.
    missing = jnp.clip(num - jnp.sum(copies, dtype=jnp.int32) - jnp.sum(rounded, dtype=jnp.int32), 0, 1)
    offspring = copies.at[closed].add(rounded).at[last[0]].add(missing)
    return cumulative_counts(jnp.cumsum(offspring, dtype=jnp.int32), expected > 0, num)


def _meet(carry: tuple, item: tuple, marked: Array, up: Array) -> tuple:
    """Let the open particle meet the next one: close one of them, and carry the other."""
    (opened, a), (incoming, b, uniform) = carry, item
    total = a + b
    closes_at_one = total > 1
    value = closes_at_one.astype(a.dtype)
    remainder = total - value
    # Probability that the open particle stays open, which preserves both means
    stay = jnp.where(closes_at_one, (1 - a) / (2 - total), jnp.where(total > 0, a / total, jnp.ones_like(a)))
    # Doob's transform: a fraction is the probability of ending at 1, so it weighs both outcomes of the marked particle
    first, second = opened == marked, incoming == marked
    weight_open, weight_closed = jnp.where(up, remainder, 1 - remainder), jnp.where(up, value, 1 - value)
    mass_stay = stay * jnp.where(first, weight_open, jnp.where(second, weight_closed, 1))
    mass_swap = (1 - stay) * jnp.where(second, weight_open, jnp.where(first, weight_closed, 1))
    stays = uniform * (mass_stay + mass_swap) < mass_stay
    open_particle, closed = jnp.where(stays, opened, incoming), jnp.where(stays, incoming, opened)
    return (open_particle, remainder), (closed, closes_at_one.astype(jnp.int32))
