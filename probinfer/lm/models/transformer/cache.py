"""Keys and values of the tokens that belong to one particle alone, and their fork by ancestors.

Two ways to fork, with the same result. "copy" gathers every row into new memory. "moved" writes only the rows that
change, into the memory of the old ones, in an order in which no row is overwritten before it is read. Fewest rows
change where each survivor keeps its slot: deal the ancestors by ``probinfer.resampling.in_place`` first.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.errors import close_matches
from probinfer.core.types import Array, Bool, Int, Shaped, pytree

__all__ = ["WAYS", "Cache", "fork", "moves", "write"]

WAYS = ("copy", "moved")


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
    """Put S tokens of each row at the row's own place; what lies beyond the end is dropped.

    Args:
        store: keys or values.
        new: those of the new tokens.
        start: first position of each row.

    Returns:
        The store, changed in place where it is donated or carried by a loop.
    """
    rows = jnp.arange(new.shape[0], dtype=start.dtype)[:, None]
    places = start[:, None] + jnp.arange(new.shape[1], dtype=start.dtype)
    return store.at[rows, :, places].set(new.astype(store.dtype), mode="drop")


def fork(cache: Cache, ancestors: Int[Array, " m"], way: str | None = None) -> Cache:
    """Row m becomes a copy of row ``ancestors[m]``.

    Args:
        cache: N rows.
        ancestors: M row numbers.
        way: "copy" or "moved", see above; where M is not N, rows are always gathered. ``None``: "moved" for one array
            a layer, "copy" for all layers in one, as measured.

    Returns:
        A cache of M rows.

    Raises:
        ValueError: an unknown way.
    """
    way = way or ("copy" if cache.rows else "moved")
    if way not in WAYS:
        raise ValueError(f"unknown way to fork {way!r}{close_matches(way, WAYS)}")
    num = jax.tree.leaves(cache)[0].shape[cache.rows]
    if way == "copy" or ancestors.shape[0] != num:
        return _gathered(cache, ancestors)
    return _moved(cache, ancestors)


def _gathered(cache, ancestors):
    return jax.tree.map(lambda leaf: jnp.take(leaf, ancestors, axis=cache.rows, mode="clip"), cache)


@jax.custom_batching.custom_vmap
def _moved(cache, ancestors):
    """Copy row after row in the order of ``moves``; then what is left of cycles, all rows of them at once."""
    axis, (slots, count, cyclic) = cache.rows, moves(ancestors)

    def move(index, cache):
        slot = slots[index]

        def moved(leaf):
            row = lax.dynamic_index_in_dim(leaf, ancestors[slot], axis)
            return lax.dynamic_update_index_in_dim(leaf, row, slot, axis)

        return jax.tree.map(moved, cache)

    cache = lax.fori_loop(0, count, move, cache)
    rest = jnp.where(cyclic, ancestors, jnp.arange(ancestors.shape[0], dtype=ancestors.dtype))
    any_cycle = jnp.any(cyclic).astype(jnp.int32)

    def last(leaf):
        # a loop of one round or none, since a branch would copy the store on its way in and out
        return lax.fori_loop(0, any_cycle, lambda _, leaf: jnp.take(leaf, rest, axis, mode="clip"), leaf)

    return jax.tree.map(last, cache)


@_moved.def_vmap
def _moved_batch(size, batched, cache, ancestors):
    """Several caches: their rows are those of one larger cache."""

    def spread(leaf, has):
        return leaf if has else jnp.broadcast_to(leaf, (size, *leaf.shape))

    cache, ancestors = jax.tree.map(spread, (cache, ancestors), tuple(batched))
    whole = jax.tree.map(lambda _: True, cache)
    if cache.rows:
        return jax.vmap(_gathered)(cache, ancestors), whole
    num = ancestors.shape[1]
    flat = jax.tree.map(lambda leaf: leaf.reshape(size * num, *leaf.shape[2:]), cache)
    shift = num * jnp.arange(size, dtype=ancestors.dtype)[:, None]
    flat = _moved(flat, (ancestors + shift).reshape(-1))
    return jax.tree.map(lambda leaf: leaf.reshape(size, num, *leaf.shape[1:]), flat), whole


def moves(ancestors: Int[Array, " n"]) -> tuple[Int[Array, " n"], Int[Array, ""], Bool[Array, " n"]]:
    """Order the copies ``row i <- row ancestors[i]`` such that none overwrites a row that is still to be read.

    First the slots that nobody reads, then those whose readers are done. What then remains are cycles.

    Args:
        ancestors: row numbers below N.

    Returns:
        The slots in their order, how many of them there are, and which slots lie on cycles.
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

    def one_more(state):
        pending, reads, slots, count = state
        slot = jnp.argmax(ready(state)).astype(jnp.int32)
        reads = reads.at[source[slot]].add(-1)
        return pending.at[slot].set(False), reads, slots.at[count].set(slot), count + 1

    state = (pending & ~free, reads, slots, jnp.sum(free, dtype=jnp.int32))
    pending, _, slots, count = lax.while_loop(lambda state: jnp.any(ready(state)), one_more, state)
    return slots, count, pending
