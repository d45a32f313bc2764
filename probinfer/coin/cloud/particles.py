"""Particles as one matrix: positions are flattened and restored, checked on entry, and scored.

A cloud is a tree of leaves ``(N, ...)``. Inside a step it is a table ``(N, d)``, at least float32, flattened once per
step. A particle whose log density or gradient is not finite has no score: it does not act on the others, and does not
move in that step.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.arguments import check_finite, check_floating
from probinfer.core.types import Array, ArrayTree, Bool, Float, PRNGKey, Scalar
from probinfer.targets.transforms import leaf_names

__all__ = [
    "ParticleScores",
    "check_positions",
    "check_spread",
    "masked_mean",
    "particle_template",
    "ravel_particle",
    "ravel_particles",
    "row_logdensity",
    "score_particles",
    "unravel_particles",
]

_CHUNK = 1024  # particles scored at once: bounds the memory of the model's intermediate results


class ParticleScores(NamedTuple):
    r"""Log densities and scores of N particles.

    Attributes:
        values: :math:`\log p(x_i)`.
        gradients: :math:`\nabla \log p(x_i)`.
        valid: whether both are finite.
    """

    values: Float[Array, " N"]
    gradients: Float[Array, "N d"]
    valid: Bool[Array, " N"]


def check_positions(positions: ArrayTree) -> None:
    """Refuse positions that are not a cloud of two or more particles.

    Args:
        positions: a tree of leaves (N, ...).

    Raises:
        TypeError: A leaf is not floating point.
        ValueError: There are no leaves, no coordinates or fewer than two particles, the leading axes differ, or
            (outside jit) entries are NaN or infinite.
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
            f"a cloud needs at least 2 particles, whose distance sets its scale; got {count}. vi.MAP() finds the mode "
            "of a density with one"
        )
    if sum(math.prod(shape[1:]) for shape in shapes) == 0:
        raise ValueError(f"positions has no coordinates: the leaves have shapes {shapes}")
    for name, leaf in zip(leaf_names(positions), leaves, strict=True):
        check_finite(f"positions.{name}" if name else "positions", leaf)


def check_spread(positions: ArrayTree, *, every: bool) -> None:
    """Refuse particles that can never separate; traced positions are not checked.

    Args:
        positions: checked by ``check_positions``.
        every: whether every coordinate must have a spread, because the geometry takes its scale from it.

    Raises:
        ValueError: All particles are identical, or (with ``every``) a coordinate is the same in all of them.
    """
    leaves = jax.tree.leaves(positions)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    tables = [_flatten_leaf(np.asarray(leaf)) for leaf in leaves]
    constant = [np.all(table == table[:1], axis=0) for table in tables]
    advice = "start from target.init(key, num), or add noise as wide as the posterior may be"
    if all(columns.all() for columns in constant):
        raise ValueError(
            f"all {len(tables[0])} particles are identical, so the same force moves them all; {advice}"
        )
    for name, columns in zip(leaf_names(positions), constant, strict=True):
        if every and columns.any():
            coordinate = f"{name or 'positions'}[{int(np.argmax(columns))}]"
            raise ValueError(
                f"coordinate {coordinate} is the same in all particles, so the cloud has no scale there; {advice}, or "
                "use geometry=coin.Identity(), which keeps the units of the positions"
            )


def _flatten_leaf(leaf: Any) -> Any:
    """Return a leaf (N, ...) with one trailing axis."""
    return leaf.reshape(leaf.shape[0], -1)


def ravel_particles(positions: ArrayTree) -> Float[Array, "N d"]:
    """Return the table of a cloud, in the widest dtype of the leaves, at least float32."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(positions)]
    dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves))
    return jnp.concatenate([_flatten_leaf(leaf).astype(dtype) for leaf in leaves], axis=1)


def ravel_particle(position: ArrayTree) -> Float[Array, " d"]:
    """Return the row of one particle, as in ``ravel_particles``."""
    return ravel_particles(jax.tree.map(lambda leaf: leaf[None], position))[0]


def particle_template(positions: ArrayTree) -> ArrayTree:
    """Return the shapes and dtypes of one particle."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), positions)


def unravel_particles(template: ArrayTree, table: Float[Array, "*batch d"]) -> ArrayTree:
    """Return the positions of rows, with the leading axes of the table.

    Args:
        template: one particle, of whose leaves shapes and dtypes are used.
        table: rows, with any leading axes.
    """
    leaves, structure = jax.tree.flatten(template)
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])
    parts = jnp.split(table, ends[:-1], axis=-1)
    restored = [
        part.reshape(*table.shape[:-1], *leaf.shape).astype(leaf.dtype)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, restored)


def score_particles(
    logdensity_fn: Any, template: ArrayTree, table: Float[Array, "N d"], key: PRNGKey | None = None
) -> ParticleScores:
    """Return log densities and scores of all particles, in the dtype of the table.

    Args:
        logdensity_fn: log density of one position; with a key, ``logdensity_fn(key, position)``.
        template: shapes and dtypes of one particle.
        table: the particles.
        key: of a stochastic log density: one batch for all particles.
    """
    value_and_grad_fn = jax.value_and_grad(lambda row: row_logdensity(logdensity_fn, template, row, key))
    if table.shape[0] <= _CHUNK:
        values, gradients = jax.vmap(value_and_grad_fn)(table)
    else:
        values, gradients = jax.lax.map(value_and_grad_fn, table, batch_size=_CHUNK)
    return ParticleScores(values, gradients, jnp.isfinite(values) & jnp.all(jnp.isfinite(gradients), axis=1))


def row_logdensity(
    logdensity_fn: Any, template: ArrayTree, row: Float[Array, " d"], key: PRNGKey | None = None
) -> Scalar:
    """Return the log density of one row of a table, in its dtype; arguments as in ``score_particles``."""
    position = unravel_particles(template, row)
    value = logdensity_fn(position) if key is None else logdensity_fn(key, position)
    return value.astype(row.dtype)


def masked_mean(mask: Bool[Array, " N"], table: Float[Array, "N d"]) -> Float[Array, " d"]:
    """Return the mean of the rows in the mask, zero if there are none."""
    weights = mask.astype(table.dtype)
    return jnp.where(mask[:, None], table, 0).T @ weights / jnp.maximum(jnp.sum(weights), 1)
