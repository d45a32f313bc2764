"""One statistic for every scalar of a tree of draws, and the normal scores that most of them start from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from probinfer.core.algorithms import as_partial
from probinfer.core.types import Array, ArrayTree, Float

__all__ = ["normal_scores", "per_quantity"]

_BATCH = 32  # quantities whose Fourier transforms are held at the same time


def per_quantity(statistic: Callable[[Array], Array], draws: ArrayTree, least_draws: int = 4) -> ArrayTree:
    """Apply a function of one quantity's draws (chain, draw) -> () to every scalar of a tree.

    A quantity with a draw that is NaN or infinite has no statistic: NaN.

    Args:
        statistic: the function.
        draws: pytree with leaves (chain, draw, ...).
        least_draws: of a chain; with fewer there is no statistic: NaN.

    Raises:
        ValueError: a leaf lacks the two leading axes.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(draws):
        if leaf.ndim < 2:
            raise ValueError(
                f"draws must have leading axes (chain, draw), got shape {leaf.shape} at "
                f"'{jax.tree_util.keystr(path)}'; a single chain is draws[None]"
            )
    statistic = as_partial(statistic)
    return jax.tree.map(lambda leaf: _leaf_statistic(statistic, _floating(leaf), least_draws), draws)


def _floating(leaf: Array) -> Array:
    return leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(jnp.result_type(float))


@partial(jax.jit, static_argnums=2)
def _leaf_statistic(statistic: Callable, leaf: Array, least_draws: int) -> Array:
    event = leaf.shape[2:]
    if leaf.size == 0 or leaf.shape[1] < least_draws:
        return jnp.full(event, jnp.nan, leaf.dtype)
    columns = jnp.moveaxis(leaf.reshape(*leaf.shape[:2], -1), 2, 0)
    num = len(columns)
    batches = -(-num // _BATCH)
    one = jax.vmap(partial(_of_finite, statistic))
    if batches == 1:
        return one(columns).reshape(event)
    # Batches of one size, so that the statistic is compiled once; the last one is filled up.
    size = -(-num // batches)
    filled = jnp.pad(columns, ((0, batches * size - num), (0, 0), (0, 0)), mode="edge")
    stacked = filled.reshape(batches, size, *columns.shape[1:])
    return jax.lax.map(one, stacked).reshape(-1)[:num].reshape(event)


def _of_finite(statistic: Callable, draws: Array) -> Array:
    value = statistic(draws)
    return jnp.where(jnp.all(jnp.isfinite(draws)), value, jnp.asarray(jnp.nan, value.dtype))


def normal_scores(draws: Float[Array, "chain draw"]) -> Float[Array, "chain draw"]:
    """Return the normal quantiles of the ranks among all draws, ties by their average rank; NaN if a draw is."""
    ordered = jnp.sort(draws.ravel())
    below = jnp.searchsorted(ordered, draws.ravel(), side="left")
    up_to = jnp.searchsorted(ordered, draws.ravel(), side="right")
    rank = (below + up_to + 1).astype(draws.dtype) / 2  # ties share their average rank
    scores = jax.scipy.special.ndtri((rank - 0.375) / (draws.size + 0.25))
    return jnp.where(jnp.any(jnp.isnan(draws)), jnp.nan, scores).reshape(draws.shape)
