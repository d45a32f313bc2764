"""Elementwise bisection, for quantiles and maxima of concave functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Bool, Float

__all__ = ["bisect", "check_levels"]


def bisect(
    is_below: Callable[[Array], Bool[Array, "..."]],
    low: Float[Array, "..."],
    high: Float[Array, "..."],
    *,
    num_steps: int,
) -> Float[Array, "..."]:
    """The point in [low, high] at which ``is_below`` turns from true to false, elementwise.

    Args:
        is_below: whether points are below the one that is searched.
        low: lower ends.
        high: upper ends.
        num_steps: number of halvings of the intervals.

    Returns:
        The middles of the last intervals.
    """

    def halve(_, bracket):
        low, high = bracket
        middle = 0.5 * (low + high)
        below = is_below(middle)
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, num_steps, halve, (low, high))
    return 0.5 * (low + high)


def check_levels(q: Any, dtype: Any) -> Array:
    """Probabilities of quantiles as an array.

    Raises:
        ValueError: a concrete ``q`` is outside (0, 1).
    """
    q = jnp.asarray(q, dtype)
    if not isinstance(q, jax.core.Tracer) and not bool(jnp.all((q > 0) & (q < 1))):
        raise ValueError("quantiles are defined for 0 < q < 1")
    return q
