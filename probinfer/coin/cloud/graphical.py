r"""Stein directions on a graph: the kernel of each coordinate depends on a few neighboring coordinates only.

Coordinate k moves by a Stein direction whose kernel depends on the coordinates of its neighborhood, so distances are as
small as in that many dimensions, and a cloud keeps its width in any dimension. Neighborhoods that are Markov blankets
of the density lose nothing. Smaller ones determine the distribution of each coordinate given the average over the
others, but not the dependence between coordinates that are not neighbors.

References:
    Wang, Zeng and Liu (2018), "Stein variational message passing for continuous graphical models", equation 8;
    Zhuo et al. (2018), "Message passing Stein variational gradient descent".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.coin.cloud.bandwidth import scaled_kernel, squared_bandwidth
from probinfer.core.types import Array, Bool, Float, Int
from probinfer.numerics.stein import stein_direction

__all__ = ["graphical_direction", "neighborhoods"]


def neighborhoods(neighbors: Any) -> tuple[Int[Array, "d m"], Bool[Array, "d m"]]:
    """Return the neighborhoods as rows of coordinate numbers, each coordinate first in its row, without the padding.

    Args:
        neighbors: for each coordinate the others that its kernel depends on: a sequence of sequences of integers.

    Returns:
        Coordinate numbers, rows padded to the same length, and which entries are not padding.

    Raises:
        TypeError: ``neighbors`` is not a sequence of sequences of integers.
        ValueError: There are no coordinates, or a neighbor is not one of them.
    """
    if not isinstance(neighbors, Sequence) or isinstance(neighbors, str):
        raise TypeError(
            "neighbors must be a sequence with one sequence of coordinate numbers for each coordinate; for kernels of "
            "single coordinates: [()] * d"
        )
    num_dims = len(neighbors)
    rows = [[k, *sorted({int(other) for other in row} - {k})] for k, row in enumerate(neighbors)]
    if not rows or any(not 0 <= other < num_dims for row in rows for other in row):
        raise ValueError(
            f"neighbors must contain coordinate numbers from 0 to {num_dims - 1}, in one row for each of the "
            "(flattened) coordinates"
        )
    max_size = max(map(len, rows))
    index = np.array([row + [row[0]] * (max_size - len(row)) for row in rows], np.int32)
    present = np.array([[i < len(row) for i in range(max_size)] for row in rows])
    return jnp.asarray(index), jnp.asarray(present)


def graphical_direction(
    index: Int[Array, "_ m"],
    present: Bool[Array, "_ m"],
    kernel: Any,
    z: Float[Array, "N d"],
    scores: Float[Array, "N d"],
    mask: Bool[Array, " N"],
    score_fn: Any,
) -> Float[Array, "N d"]:
    r"""Return :math:`\phi_k(z_i) = \frac1N \sum_j [k_k(z_j, z_i) s_{jk} + \partial_{z_{jk}} k_k(z_j, z_i)]`.

    :math:`k_k` is the kernel on the neighborhood of k, with its lengthscale in units of the median distance there.

    Args:
        index: neighborhoods, from ``neighborhoods``, like ``present``.
        present: which entries are not padding.
        kernel: a function of a scaled distance.
        z: the cloud in its coordinates.
        scores: scores in z.
        mask: which particles count.
        score_fn: not used.

    Raises:
        ValueError: There is not one neighborhood for each coordinate.
    """
    if index.shape[0] != z.shape[1]:
        raise ValueError(
            f"neighbors must have one row for each of the {z.shape[1]} coordinates, got {index.shape[0]}"
        )

    def coordinate_direction(row):
        members, is_member = row
        table = jnp.where(is_member, z[:, members], 0)
        # Only the first column of the direction is used, so only its score is needed.
        score = jnp.where(jnp.arange(len(members)) == 0, scores[:, members], 0)
        square = squared_bandwidth("median", table, mask, jnp.int32(2**30))
        return stein_direction(scaled_kernel(kernel, square), table, score, mask)[:, 0]

    return jax.lax.map(coordinate_direction, (index, present)).T
