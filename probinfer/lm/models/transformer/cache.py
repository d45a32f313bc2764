"""Keys and values of the private tokens of each particle, and their fork by ancestors.

There are two methods to fork, with the same result. "copy" gathers every row into new memory. "moved" writes only the
rows that change, into the memory of the old ones, in an order in which no row is overwritten before it is read. The
number of rows that change is smallest if each survivor keeps its slot, as ``probinfer.resampling.in_place`` arranges.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.errors import close_matches
from probinfer.core.types import Array, Bool, Int, Shaped, pytree

__all__ = ["FORK_METHODS", "Cache", "copy_order", "fork", "write"]

FORK_METHODS = ("copy", "moved")


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


def write(
    store: Shaped[Array, "n k t d"], new: Shaped[Array, "n s k d"], start: Int[Array, " n"]
) -> Shaped[Array, "n k t d"]:
    """Write S tokens of each row at the position of the row; tokens beyond the end are dropped.

    Args:
        store: keys or values.
        new: keys or values of the new tokens.
        start: first position of each row.

    Returns:
        The store, changed in place if it is donated or carried by a loop.
    """
    rows = jnp.arange(new.shape[0], dtype=start.dtype)[:, None]
    positions = start[:, None] + jnp.arange(new.shape[1], dtype=start.dtype)
    return store.at[rows, :, positions].set(new.astype(store.dtype), mode="drop")


def fork(cache: Cache, ancestors: Int[Array, " m"], method: str | None = None) -> Cache:
    """Row m of the result is a copy of row ``ancestors[m]``.

    Args:
        cache: a cache of N rows.
        ancestors: M row numbers.
        method: "copy" or "moved", see above; if M is not N, rows are always gathered. ``None``: "moved" for one array
            for each layer, "copy" for all layers in one array, which are the faster ones.

    Returns:
        A cache of M rows.

    Raises:
        ValueError: the method is unknown.
    """
    method = method or ("copy" if cache.rows else "moved")
    if method not in FORK_METHODS:
        raise ValueError(f"unknown method to fork {method!r}{close_matches(method, FORK_METHODS)}")
    num = jax.tree.leaves(cache)[0].shape[cache.rows]
    if method == "copy" or ancestors.shape[0] != num:
        return _gather_rows(cache, ancestors)
    return _move_rows(cache, ancestors)


def _gather_rows(cache, ancestors):
    return jax.tree.map(lambda leaf: jnp.take(leaf, ancestors, axis=cache.rows, mode="clip"), cache)


@jax.custom_batching.custom_vmap
def _move_rows(cache, ancestors):
    """Copy row after row in the order of ``copy_order``; then all rows on cycles at once."""
    axis, (slots, count, cyclic) = cache.rows, copy_order(ancestors)

    def move(index, cache):
        slot = slots[index]

        def move_row(leaf):
            row = lax.dynamic_index_in_dim(leaf, ancestors[slot], axis)
            return lax.dynamic_update_index_in_dim(leaf, row, slot, axis)

        return jax.tree.map(move_row, cache)

    cache = lax.fori_loop(0, count, move, cache)
    sources = jnp.where(cyclic, ancestors, jnp.arange(ancestors.shape[0], dtype=ancestors.dtype))
    any_cycle = jnp.any(cyclic).astype(jnp.int32)

    def move_cycles(leaf):
        # a loop of one round or none, since a branch would copy the store on its way in and out
        return lax.fori_loop(0, any_cycle, lambda _, leaf: jnp.take(leaf, sources, axis, mode="clip"), leaf)

    return jax.tree.map(move_cycles, cache)


@_move_rows.def_vmap
def _move_rows_batched(size, batched, cache, ancestors):
    """Move the rows of several caches as rows of one larger cache."""

    def broadcast(leaf, has):
        return leaf if has else jnp.broadcast_to(leaf, (size, *leaf.shape))

    cache, ancestors = jax.tree.map(broadcast, (cache, ancestors), tuple(batched))
    out_batched = jax.tree.map(lambda _: True, cache)
    if cache.rows:
        return jax.vmap(_gather_rows)(cache, ancestors), out_batched
    num = ancestors.shape[1]
    flat = jax.tree.map(lambda leaf: leaf.reshape(size * num, *leaf.shape[2:]), cache)
    shift = num * jnp.arange(size, dtype=ancestors.dtype)[:, None]
    flat = _move_rows(flat, (ancestors + shift).reshape(-1))
    return jax.tree.map(lambda leaf: leaf.reshape(size, num, *leaf.shape[1:]), flat), out_batched


def copy_order(ancestors: Int[Array, " n"]) -> tuple[Int[Array, " n"], Int[Array, ""], Bool[Array, " n"]]:
    """Order the copies ``row i <- row ancestors[i]`` so that none overwrites a row that is still to be read.

    First come slots that no other slot reads, then slots whose readers are done. The remaining slots are on cycles.

    Args:
        ancestors: row numbers below N.

    Returns:
        The slots in order, their number, and whether each slot is on a cycle.
    """
    num = ancestors.shape[0]
    source = ancestors.astype(jnp.int32)
    pending = source != jnp.arange(num, dtype=jnp.int32)
    reads = jnp.zeros(num, jnp.int32).at[source].add(pending.astype(jnp.int32))
    free = pending & (reads == 0)
    slots = jnp.argsort(~free, stable=True).astype(jnp.int32)
    reads = reads.at[source].add(-free.astype(jnp.int32))

    def ready(state):
        return state[0] & (state[1] == 0)

    def append_slot(state):
        pending, reads, slots, count = state
        slot = jnp.argmax(ready(state)).astype(jnp.int32)
        reads = reads.at[source[slot]].add(-1)
        return pending.at[slot].set(False), reads, slots.at[count].set(slot), count + 1

    state = (pending & ~free, reads, slots, jnp.sum(free, dtype=jnp.int32))
    pending, _, slots, count = lax.while_loop(lambda state: jnp.any(ready(state)), append_slot, state)
    return slots, count, pending
