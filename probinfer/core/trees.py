"""Trees of arrays: choosing between two of them, and a function of one member over a batch of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.arguments import check_mode
from probinfer.core.types import ArrayTree

__all__ = ["map_or_vmap", "select"]


def select(condition: Any, new: ArrayTree, old: ArrayTree) -> ArrayTree:
    """Return the leaves of ``new`` where the condition holds, and those of ``old`` elsewhere.

    Args:
        condition: a truth value, or an array that broadcasts against every leaf.
        new: a tree of arrays.
        old: a tree of the same structure.
    """
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def map_or_vmap(fn: Callable, mode: str, *args: ArrayTree) -> ArrayTree:
    """Apply a function along leading axes: one member after another, or side by side.

    Args:
        fn: function of one member, such as a chain, a restart or a draw.
        mode: ``"map"`` (``jax.lax.map``), ``"vmap"``, or ``"auto"``: one after another on a CPU, where a loop is
            faster than batched small matrices, and side by side elsewhere.
        *args: trees with a leading axis.

    Raises:
        ValueError: the mode is unknown.
    """
    check_mode(mode)
    if mode == "map" or (mode == "auto" and jax.default_backend() == "cpu"):
        return jax.lax.map(lambda members: fn(*members), args)
    return jax.vmap(fn)(*args)
