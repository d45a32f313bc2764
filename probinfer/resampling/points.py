"""Schemes that throw points on the line of cumulative weights: multinomial, stratified, systematic, residual."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.resampling.base import check, share
from probinfer.resampling.counts import (
    ancestors_of,
    bounds_of,
    cumulative,
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

    The most variable scheme; the one with independent draws. About linear in n + num; ancestors come sorted.

    Args:
        key: random key.
        log_weights: unnormalised log weights, minus infinity allowed.
        num: how many to choose, at least 1; need not be n.

    Returns:
        ancestors: indices into the sample, none of weight zero.
        log_weights: all equal to log(sum of the weights / num). When every weight is zero they are minus
            infinity, when one is NaN or plus infinity they are NaN (see ``weights.status``); the ancestors are
            then 0, 1, ...

    Raises:
        TypeError: the log weights are not floating.
        ValueError: they are no vector, there are none, or ``num`` is not positive.

    References:
        Gordon, Salmond and Smith (1993).
    """
    check(log_weights, num)
    relative = relative_weights(log_weights)
    ends = cumulative(expected_offspring(relative, num), num)
    bounds = bounds_of(uniform_points_below(key, ends, num, num), relative > 0, num, ends.exact)
    return share(log_weights, ancestors_of(bounds, num), num)


@partial(jax.jit, static_argnames="num")
def stratified(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Choose with one independent uniform point in each of the cells :math:`[j/num, (j+1)/num)`.

    Never more variable than multinomial, for any order of the draws. Linear; ancestors come sorted.

    Args:
        key: random key.
        log_weights: unnormalised log weights, minus infinity allowed.
        num: how many to choose, at least 1; need not be n.

    Returns:
        The ancestors and their equal log weights, as for ``multinomial``.

    Raises:
        TypeError: the log weights are not floating.
        ValueError: they are no vector, there are none, or ``num`` is not positive.

    References:
        Kitagawa (1996).
    """
    check(log_weights, num)
    relative = relative_weights(log_weights)
    ends = cumulative(expected_offspring(relative, num), num)
    places = jax.random.uniform(key, (num,), log_weights.dtype)
    below = ends.whole + (places[jnp.minimum(ends.whole, num - 1)] < ends.fraction).astype(jnp.int32)
    return share(log_weights, ancestors_of(bounds_of(below, relative > 0, num, ends.exact), num), num)


@partial(jax.jit, static_argnames="num")
def systematic(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Choose draw i either floor or ceil of :math:`num\,W_i` times, on average :math:`num\,W_i` times.

    One uniform number u; the ancestors are where the cumulative normalised weight passes
    :math:`(u + j)/num,\; j = 0 \dots num-1`. Linear in n + num; ancestors come sorted.

    Args:
        key: random key.
        log_weights: unnormalised log weights, minus infinity allowed.
        num: how many to choose, at least 1; need not be n.

    Returns:
        The ancestors and their equal log weights, as for ``multinomial``.

    Raises:
        TypeError: the log weights are not floating.
        ValueError: they are no vector, there are none, or ``num`` is not positive.

    References:
        Kitagawa (1996); Carpenter, Clifford and Fearnhead (1999).
    """
    check(log_weights, num)
    relative = relative_weights(log_weights)
    offset = jax.random.uniform(key, (), log_weights.dtype)
    bounds = systematic_bounds(expected_offspring(relative, num), offset, num)
    return share(log_weights, ancestors_of(bounds, num), num)


def systematic_bounds(expected: Array, offset: Array, num: int | Array) -> Array:
    """Return how many of the points offset + j, j = 0 ... num - 1, lie below C_i."""
    ends = cumulative(expected, num)
    below = ends.whole + (offset < ends.fraction).astype(jnp.int32)
    return bounds_of(below, expected > 0, num, ends.exact)


@partial(jax.jit, static_argnames="num")
def residual(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Choose draw i :math:`\lfloor num\,W_i\rfloor` times, and the rest independently by the fractional parts.

    Never more variable than multinomial. About linear in n + num; ancestors come sorted.

    Args:
        key: random key.
        log_weights: unnormalised log weights, minus infinity allowed.
        num: how many to choose, at least 1; need not be n.

    Returns:
        The ancestors and their equal log weights, as for ``multinomial``.

    Raises:
        TypeError: the log weights are not floating.
        ValueError: they are no vector, there are none, or ``num`` is not positive.

    References:
        Liu and Chen (1998).
    """
    check(log_weights, num)
    relative = relative_weights(log_weights)
    expected = expected_offspring(relative, num)
    copies = jnp.cumsum(jnp.floor(expected).astype(jnp.int32), dtype=jnp.int32)
    fractions = expected - jnp.floor(expected)
    rest = jnp.maximum(num - copies[-1], 0)
    ends = cumulative(fractions, rest)
    drawn = bounds_of(uniform_points_below(key, ends, rest, num), fractions > 0, rest, ends.exact)
    bounds = bounds_of(copies + drawn, relative > 0, num)
    return share(log_weights, ancestors_of(bounds, num), num)
