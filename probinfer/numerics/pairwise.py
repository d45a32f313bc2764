r"""Sums over all pairs of n points in memory O(n): the matrix of a symmetric function is visited tile by tile.

Discrepancies and their bootstraps are quadratic forms :math:`\sum_{i \ne j} w_i w_j h(x_i, x_j)`: with ones a
statistic, with random signs a wild bootstrap, with labels a permutation. One pass over the tiles on and above the
diagonal yields them all.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.algorithms import as_partial
from probinfer.core.types import Array, ArrayTree, Float, Shaped

__all__ = ["PairSums", "pair_sums"]


class PairSums(NamedTuple):
    r"""Sums of S symmetric functions h_s over pairs; ``h`` is their sum over s. The diagonal is kept apart.

    Attributes:
        totals: ``(S,)``, :math:`\sum_{i \ne j} h_s(x_i, x_j)`.
        traces: ``(S,)``, :math:`\sum_i h_s(x_i, x_i)`.
        row_sums: ``(n,)``, :math:`\sum_{j \ne i} h(x_i, x_j)`.
        forms: ``(m,)``, :math:`\sum_{i \ne j} w_i w_j h(x_i, x_j)` for each column w of the weights.
        linear: ``(m,)``, :math:`\sum_{i \ne j} w_i h(x_i, x_j)`.
    """

    totals: Float[Array, " S"]
    traces: Float[Array, " S"]
    row_sums: Float[Array, " n"]
    forms: Float[Array, " m"]
    linear: Float[Array, " m"]


def pair_sums(
    block_fn: Any, points: ArrayTree, weights: Shaped[Array, "_ _"], *, tile: int = 512
) -> PairSums:
    """Sum symmetric functions of two points over all pairs, weighted in m ways.

    Args:
        block_fn: ``block_fn(rows, columns) -> (S, b, b)``: the values for two slices of b points each.
        points: tree with leaves ``(n, ...)``, floating point.
        weights: ``(n, m)``, one column for each form; integers (signs, labels) stay small in memory.
        tile: the most points b in a slice (static). Beside points, weights and results the memory is that of a
            few ``(S, b, b)`` arrays.

    Returns:
        The sums, in the dtype of the points.

    Raises:
        ValueError: the weights do not have one row for each point.
    """
    size = jax.tree.leaves(points)[0].shape[0]
    if weights.shape[0] != size:
        raise ValueError(
            f"weights must have one row for each of the {size} points, got shape {weights.shape}"
        )
    # Slices of equal size: few padded points, which cost as much as others.
    return _pair_sums(as_partial(block_fn), points, weights, tile=-(-size // -(-size // tile)))


@partial(jax.jit, static_argnames="tile")
def _pair_sums(block_fn: Any, points: ArrayTree, weights: Array, *, tile: int) -> PairSums:
    size = weights.shape[0]
    count = -(-size // tile)
    pad = count * tile - size
    # padded points are copies of the last, so that no value is special; their values are masked out
    points = jax.tree.map(lambda a: jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1), mode="edge"), points)
    weights = jnp.pad(weights, ((0, pad), (0, 0)))
    rows, columns = (jnp.asarray(index, jnp.int32) for index in np.triu_indices(count))
    shape = jax.eval_shape(block_fn, *[jax.tree.map(lambda a: a[:tile], points)] * 2)

    def slice_of(array, index):
        return jax.lax.dynamic_slice_in_dim(array, index * tile, tile)

    def visit(step, sums):
        i, j = rows[step], columns[step]
        values = block_fn(*(jax.tree.map(lambda a, k=k: slice_of(a, k), points) for k in (i, j)))
        on_diagonal = i == j
        inside = [k * tile + jnp.arange(tile) < size for k in (i, j)]
        diagonal = jnp.diagonal(values, axis1=1, axis2=2)
        traces = jnp.sum(jnp.where(on_diagonal & inside[0], diagonal, 0), axis=1)
        is_counted = inside[0][:, None] & inside[1][None, :] & ~(on_diagonal & jnp.eye(tile, dtype=bool))
        values = jnp.where(is_counted, values, 0)
        multiplicity = jnp.where(on_diagonal, 1, 2).astype(
            values.dtype
        )  # a tile above the diagonal stands for its mirror image
        mirrored = multiplicity - 1
        total = jnp.sum(values, axis=0)
        left, right = (slice_of(weights, k).astype(values.dtype) for k in (i, j))
        down, across = mirrored * jnp.sum(total, axis=0), jnp.sum(total, axis=1)
        row_sums = jax.lax.dynamic_update_slice_in_dim(
            sums.row_sums, slice_of(sums.row_sums, i) + across, i * tile, 0
        )
        row_sums = jax.lax.dynamic_update_slice_in_dim(row_sums, slice_of(row_sums, j) + down, j * tile, 0)
        return PairSums(
            totals=sums.totals + multiplicity * jnp.sum(values, axis=(1, 2)),
            traces=sums.traces + traces,
            row_sums=row_sums,
            forms=sums.forms + multiplicity * jnp.sum(left * (total @ right), axis=0),
            linear=sums.linear + across @ left + down @ right,
        )

    scales, forms = (jnp.zeros(k, shape.dtype) for k in (shape.shape[0], weights.shape[1]))
    start = PairSums(scales, scales, jnp.zeros(count * tile, shape.dtype), forms, forms)
    sums = jax.lax.fori_loop(0, len(rows), visit, start)
    return sums._replace(row_sums=sums.row_sums[:size])
