"""Particles as one table: positions ravelled and restored, checked at the boundary, scored with masks.

A cloud is a tree of leaves ``(N, ...)``. Inside a step it is a table ``(N, d)``, in float32 at least, made once a
step. A particle whose log density or gradient is not finite has no score: it is left out of everything that the
others feel, and does not move in that step.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import check_finite, check_floating
from probinfer.core.types import Array, ArrayTree, Bool, Float, PRNGKey
from probinfer.targets.transforms import leaf_names

__all__ = [
    "Scores",
    "check_positions",
    "check_spread",
    "like_one",
    "masked_mean",
    "ravel",
    "scores_of",
    "unravel",
]

_CHUNK = 1024  # particles scored side by side: bounds the memory of the model's intermediate results


class Scores(NamedTuple):
    """Log densities ``(N,)``, their gradients ``(N, d)``, and which particles have finite ones ``(N,)``."""

    values: Float[Array, " N"]
    gradients: Float[Array, "N d"]
    valid: Bool[Array, " N"]


def check_positions(positions: ArrayTree) -> None:
    """Refuse what is not a cloud of two or more particles.

    Args:
        positions: a tree of leaves (N, ...).

    Raises:
        TypeError: a leaf is not floating point.
        ValueError: no leaves or no coordinates, leading axes that differ, fewer than two particles, or (outside jit)
            NaN or infinite entries.
    """
    leaves = jax.tree.leaves(positions)
    if not leaves:
        raise ValueError(
            "positions has no leaves; give a tree of arrays with one leading axis of N particles"
        )
    for name, leaf in zip(leaf_names(positions), leaves, strict=True):
        check_floating(f"positions.{name}" if name else "positions", leaf)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    counts = {shape[:1] for shape in shapes}
    if len(counts) != 1 or counts == {()}:
        raise ValueError(
            f"the leaves of positions must share one leading axis of N particles, got shapes {sorted(shapes)}"
        )
    ((count,),) = counts
    if count < 2:
        raise ValueError(
            f"a cloud needs at least 2 particles, to know a scale by their distances; got {count}. vi.MAP() finds "
            "the mode of a density with one"
        )
    if sum(math.prod(shape[1:]) for shape in shapes) == 0:
        raise ValueError(f"positions has no coordinates: the leaves have shapes {shapes}")
    for name, leaf in zip(leaf_names(positions), leaves, strict=True):
        check_finite(f"positions.{name}" if name else "positions", leaf)


def check_spread(positions: ArrayTree, *, every: bool) -> None:
    """Refuse particles that can never separate; traced positions pass.

    Args:
        positions: checked by ``check_positions``.
        every: whether each coordinate must have a spread, because the geometry takes its scale from there.

    Raises:
        ValueError: all particles are identical, or one coordinate is the same in all of them.
    """
    leaves = jax.tree.leaves(positions)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    flat = [np.asarray(leaf).reshape(len(leaf), -1) for leaf in leaves]
    still = [np.all(table == table[:1], axis=0) for table in flat]
    advice = "start from target.init(key, num), or add noise as wide as the posterior may be"
    if all(column.all() for column in still):
        raise ValueError(
            f"all {len(flat[0])} particles are identical, so the same force moves them all; {advice}"
        )
    for name, column in zip(leaf_names(positions), still, strict=True):
        if every and column.any():
            where = f"{name or 'positions'}[{int(np.argmax(column))}]"
            raise ValueError(
                f"coordinate {where} is the same in all particles, so the cloud has no scale there; {advice}, or use "
                "geometry=coin.Identity(), which keeps the units of the positions"
            )


def ravel(positions: ArrayTree) -> Float[Array, "N d"]:
    """Return the table of a cloud, in the widest dtype of the leaves, float32 at least."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(positions)]
    dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves))
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1).astype(dtype) for leaf in leaves], axis=1)


def like_one(positions: ArrayTree) -> ArrayTree:
    """Return shapes and dtypes of one particle."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), positions)


def unravel(like: ArrayTree, table: Float[Array, "*batch d"]) -> ArrayTree:
    """Restore trees from rows.

    Args:
        like: shapes and dtypes of one particle.
        table: rows, any leading axes.
    """
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])
    parts = jnp.split(table, ends[:-1], axis=-1)
    restored = [
        part.reshape(*table.shape[:-1], *leaf.shape).astype(leaf.dtype)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, restored)


def scores_of(
    logdensity_fn: Any, like: ArrayTree, table: Float[Array, "N d"], key: PRNGKey | None = None
) -> Scores:
    """Return log densities and scores of all particles, in the dtype of the table.

    Args:
        logdensity_fn: of one position; with a key, ``logdensity_fn(key, position)``.
        like: shapes and dtypes of one particle.
        table: the particles.
        key: of a stochastic log density: one batch for all particles.
    """

    def value(row):
        position = unravel(like, row)
        found = logdensity_fn(position) if key is None else logdensity_fn(key, position)
        return found.astype(row.dtype)

    both = jax.value_and_grad(value)
    if table.shape[0] <= _CHUNK:
        values, gradients = jax.vmap(both)(table)
    else:
        values, gradients = jax.lax.map(both, table, batch_size=_CHUNK)
    return Scores(values, gradients, jnp.isfinite(values) & jnp.all(jnp.isfinite(gradients), axis=1))


def masked_mean(keep: Bool[Array, " N"], table: Float[Array, "N d"]) -> Float[Array, " d"]:
    """Return the mean of the rows that are kept; zero if there are none."""
    weight = keep.astype(table.dtype)
    return jnp.where(keep[:, None], table, 0).T @ weight / jnp.maximum(jnp.sum(weight), 1)
