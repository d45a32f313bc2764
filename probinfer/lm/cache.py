"""Keys and values of the tokens that belong to one particle alone, and their fork by ancestors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer.types import Array, Int, pytree

__all__ = ["Cache", "fork", "write"]


@pytree
class Cache:
    """Keys and values of private tokens.

    Attributes:
        keys: one array (N, K, T, D) for each layer, or all of them in one (L, N, K, T, D).
        values: likewise.
    """

    keys: Any
    values: Any

    @property
    def rows(self) -> int:
        """The axis of the particles in each leaf."""
        return 0 if isinstance(self.keys, tuple) else 1


def write(store: Array, new: Array, start: Int[Array, "n"]) -> Array:
    """Put the keys of S tokens of each row at its own place; what lies beyond the end is dropped.

    Args:
        store: (N, K, T, D).
        new: (N, S, K, D).
        start: first position of each row.

    Returns:
        The store, changed in place where it is donated or carried by a loop.
    """
    rows = jnp.arange(new.shape[0], dtype=start.dtype)[:, None]
    places = start[:, None] + jnp.arange(new.shape[1], dtype=start.dtype)
    return store.at[rows, :, places].set(new.astype(store.dtype), mode="drop")


def fork(cache: Cache, ancestors: Int[Array, "m"]) -> Cache:
    """Row m becomes a copy of row ``ancestors[m]``.

    Args:
        cache: N rows.
        ancestors: M row numbers.

    Returns:
        A cache of M rows.
    """
    return jax.tree.map(lambda leaf: jnp.take(leaf, ancestors, axis=cache.rows, mode="clip"), cache)
