r"""Srinivasan sampling process: fractional parts meet in pairs until each is 0 or 1.

One particle is open. The next one comes, with fraction b, meets the open one, with fraction a, and one of the two
is closed at 0 (a + b at most 1) or at 1 (a + b above 1) while the other stays open with what is left, with the
probabilities that keep both means. The outcome is negatively associated, which systematic resampling is not in
general: its error vanishes for any order of the particles.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.resampling.base import check, share
from probinfer.resampling.counts import ancestors_of, bounds_of, expected_offspring, relative_weights

__all__ = ["ssp", "ssp_bounds"]


@partial(jax.jit, static_argnames="num")
def ssp(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Choose draw i floor or ceil of :math:`num\,W_i` times, the counts negatively associated.

    Linear in n, but one particle after the other; ancestors come sorted.

    Args:
        key: random key.
        log_weights: unnormalised log weights, minus infinity allowed.
        num: how many to choose, at least 1; need not be n.

    Returns:
        ancestors: indices into the sample, none of weight zero.
        log_weights: all equal to log(sum of the weights / num); minus infinity or NaN with ancestors 0, 1, ...
            when every weight is zero or one is NaN or plus infinity.

    Raises:
        TypeError: the log weights are not floating.
        ValueError: they are no vector, there are none, or ``num`` is not positive.

    References:
        Srinivasan (2001); Gerber, Chopin and Whiteley (2019), section 5.
    """
    check(log_weights, num)
    relative = relative_weights(log_weights)
    never = jnp.asarray(-1, jnp.int32)
    uniforms = jax.random.uniform(key, log_weights.shape, log_weights.dtype)
    bounds = ssp_bounds(uniforms, expected_offspring(relative, num), num, never, jnp.asarray(False))
    return share(log_weights, ancestors_of(bounds, num), num)


def ssp_bounds(uniforms: Array, expected: Array, num: int, marked: Array, up: Array) -> Array:
    """Return cumulative offspring counts, given that particle ``marked`` is rounded up or not; -1: no condition.

    ``uniforms[i]`` decides when particle i comes; the first one is not used.
    """
    copies = jnp.floor(expected)
    fractions = expected - copies
    copies = copies.astype(jnp.int32)
    index = jnp.arange(expected.shape[0], dtype=jnp.int32)
    items = (index[1:], fractions[1:], uniforms[1:])
    meet = partial(_meet, marked=marked, up=up)
    settled: tuple[Array, Array]
    last, settled = jax.lax.scan(meet, (index[0], fractions[0]), items)
    closed, ones = settled
    # the fractions sum to an integer: the last open one is what is missing from num
    left = jnp.clip(num - jnp.sum(copies, dtype=jnp.int32) - jnp.sum(ones, dtype=jnp.int32), 0, 1)
    counts = copies.at[closed].add(ones).at[last[0]].add(left)
    return bounds_of(jnp.cumsum(counts, dtype=jnp.int32), expected > 0, num)


def _meet(carry: tuple, item: tuple, marked: Array, up: Array) -> tuple:
    (opened, a), (incoming, b, uniform) = carry, item
    total = a + b
    one = total > 1
    value = one.astype(a.dtype)
    rest = total - value
    stay = jnp.where(one, (1 - a) / (2 - total), jnp.where(total > 0, a / total, jnp.ones_like(a)))
    # Doob's transform: a fraction is the probability of ending at 1
    first, second = opened == marked, incoming == marked
    chance_rest, chance_value = jnp.where(up, rest, 1 - rest), jnp.where(up, value, 1 - value)
    if_stay = stay * jnp.where(first, chance_rest, jnp.where(second, chance_value, 1))
    if_swap = (1 - stay) * jnp.where(second, chance_rest, jnp.where(first, chance_value, 1))
    keep = uniform * (if_stay + if_swap) < if_stay
    kept, closed = jnp.where(keep, opened, incoming), jnp.where(keep, incoming, opened)
    return (kept, rest), (closed, one.astype(jnp.int32))
