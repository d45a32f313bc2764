"""Schemes that place points on the line of cumulative weights: multinomial, stratified, systematic, residual."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.resampling.base import check, equal_weights
from probinfer.resampling.counts import (
    ancestors_from_counts,
    cumulative,
    cumulative_counts,
    expected_offspring,
    relative_weights,
    uniform_points_below,
)

__all__ = ["multinomial", "residual", "stratified", "systematic"]


@partial(jax.jit, static_argnames="num")
def multinomial(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Choose ``num`` draws independently, draw i with probability :math:`W_i`.

    The scheme with independent draws, and the most variable one. Cost about linear in n + num; the ancestors are
    sorted.

    Args:
        key: random key.
        log_weights: unnormalized log weights, minus infinity allowed.
        num: number of draws to choose, at least 1; may differ from n.

    Returns:
        ancestors: indices into the sample, none with weight zero.
        log_weights: all equal to log(sum of the weights / num). If every weight is zero they are minus infinity, and
            if one is NaN or plus infinity they are NaN (see ``weights.status``); the ancestors are then 0, 1, ...

    Raises:
        TypeError: the log weights are not floating point.
        ValueError: they are not a vector, there are none, or ``num`` is not positive.

    References:
        Gordon, Salmond and Smith (1993).
    """
    check(log_weights, num)
    relative = relative_weights(log_weights)
    ends = cumulative(expected_offspring(relative, num), num)
    counts = cumulative_counts(uniform_points_below(key, ends, num, num), relative > 0, num, ends.exact)
    return equal_weights(log_weights, ancestors_from_counts(counts, num), num)


@partial(jax.jit, static_argnames="num")
def stratified(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Choose with one independent uniform point in each of the cells :math:`[j/num, (j+1)/num)`.

    Never more variable than multinomial, for any order of the draws. Linear; ancestors come sorted.

    Args:
        key: random key.
        log_weights: unnormalized log weights, minus infinity allowed.
        num: number of draws to choose, at least 1; may differ from n.

    Returns:
        The ancestors and their equal log weights, as for ``multinomial``.

    Raises:
        TypeError: the log weights are not floating point.
        ValueError: they are not a vector, there are none, or ``num`` is not positive.

    References:
        Kitagawa (1996).
    """
    check(log_weights, num)
    relative = relative_weights(log_weights)
    ends = cumulative(expected_offspring(relative, num), num)
    uniforms = jax.random.uniform(key, (num,), log_weights.dtype)
    below = ends.integer + (uniforms[jnp.minimum(ends.integer, num - 1)] < ends.fraction).astype(jnp.int32)
    counts = cumulative_counts(below, relative > 0, num, ends.exact)
    return equal_weights(log_weights, ancestors_from_counts(counts, num), num)


@partial(jax.jit, static_argnames="num")
def systematic(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Choose draw i either floor or ceil of :math:`num\,W_i` times, on average :math:`num\,W_i` times.

    With one uniform number u, the ancestors are where the cumulative normalized weight passes
    :math:`(u + j)/num,\; j = 0 \dots num-1`. Cost linear in n + num; the ancestors are sorted.

    Args:
        key: random key.
        log_weights: unnormalized log weights, minus infinity allowed.
        num: number of draws to choose, at least 1; may differ from n.

    Returns:
        The ancestors and their equal log weights, as for ``multinomial``.

    Raises:
        TypeError: the log weights are not floating point.
        ValueError: they are not a vector, there are none, or ``num`` is not positive.

    References:
        Kitagawa (1996); Carpenter, Clifford and Fearnhead (1999).
    """
    check(log_weights, num)
    relative = relative_weights(log_weights)
    offset = jax.random.uniform(key, (), log_weights.dtype)
    counts = systematic_counts(expected_offspring(relative, num), offset, num)
    return equal_weights(log_weights, ancestors_from_counts(counts, num), num)


def systematic_counts(expected: Array, offset: Array, num: int | Array) -> Array:
    """Return how many of the points offset + j, j = 0 ... num - 1, lie below C_i."""
    ends = cumulative(expected, num)
    below = ends.integer + (offset < ends.fraction).astype(jnp.int32)
    return cumulative_counts(below, expected > 0, num, ends.exact)


@partial(jax.jit, static_argnames="num")
def residual(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Choose draw i :math:`\lfloor num\,W_i\rfloor` times, and the rest independently by the fractional parts.

    Never more variable than multinomial. Cost about linear in n + num; the ancestors are sorted.

    Args:
        key: random key.
        log_weights: unnormalized log weights, minus infinity allowed.
        num: number of draws to choose, at least 1; may differ from n.

    Returns:
        The ancestors and their equal log weights, as for ``multinomial``.

    Raises:
        TypeError: the log weights are not floating point.
        ValueError: they are not a vector, there are none, or ``num`` is not positive.

    References:
        Liu and Chen (1998).
    """
    check(log_weights, num)
    relative = relative_weights(log_weights)
    expected = expected_offspring(relative, num)
    certain_counts = jnp.cumsum(jnp.floor(expected).astype(jnp.int32), dtype=jnp.int32)
    fractions = expected - jnp.floor(expected)
    num_random = jnp.maximum(num - certain_counts[-1], 0)
    ends = cumulative(fractions, num_random)
    below = uniform_points_below(key, ends, num_random, num)
    residual_counts = cumulative_counts(below, fractions > 0, num_random, ends.exact)
    counts = cumulative_counts(certain_counts + residual_counts, relative > 0, num)
    return equal_weights(log_weights, ancestors_from_counts(counts, num), num)
