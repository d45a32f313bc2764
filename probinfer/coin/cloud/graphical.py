r"""Kernels of few coordinates: each coordinate feels the particles through its neighbours alone.

Coordinate k moves by a Stein direction whose kernel sees the coordinates of its neighbourhood, so distances stay as
small as in that many dimensions, and a cloud keeps its width however many dimensions there are. Neighbourhoods that
are Markov blankets of the density lose nothing. Those that are smaller fix the law of each coordinate given the average
over the others, not the dependence between coordinates that are no neighbours.

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

__all__ = ["graphical_direction", "neighbourhoods"]


def neighbourhoods(neighbours: Any) -> tuple[Int[Array, "d m"], Bool[Array, "d m"]]:
    """Return index rows, each coordinate first in its own, and which entries are no filling.

    Args:
        neighbours: for each coordinate the others that its kernel sees: a sequence of sequences of integers.

    Raises:
        TypeError: not a sequence of sequences of integers.
        ValueError: no coordinates, or a neighbour that is none of them.
    """
    if not isinstance(neighbours, Sequence) or isinstance(neighbours, str):
        raise TypeError(
            "neighbours must be a sequence with one sequence of coordinate numbers for each coordinate; for kernels of "
            "single coordinates: [()] * d"
        )
    dims = len(neighbours)
    rows = [[k, *sorted({int(other) for other in row} - {k})] for k, row in enumerate(neighbours)]
    if not rows or any(not 0 <= other < dims for row in rows for other in row):
        raise ValueError(
            f"neighbours must name coordinates from 0 to {dims - 1}, one row for each of the (flattened) coordinates"
        )
    longest = max(map(len, rows))
    index = np.array([row + [row[0]] * (longest - len(row)) for row in rows], np.int32)
    real = np.array([[i < len(row) for i in range(longest)] for row in rows])
    return jnp.asarray(index), jnp.asarray(real)


def graphical_direction(
    index: Int[Array, "_ m"],
    real: Bool[Array, "_ m"],
    kernel: Any,
    z: Float[Array, "N d"],
    scores: Float[Array, "N d"],
    keep: Bool[Array, " N"],
    score_fn: Any,
) -> Float[Array, "N d"]:
    r"""Return :math:`\phi_k(z_i) = \frac1N \sum_j [k_k(z_j, z_i) s_{jk} + \partial_{z_{jk}} k_k(z_j, z_i)]`.

    Every :math:`k_k` is the kernel on the neighbourhood of k, its lengthscale in units of the median distance there.

    Args:
        index: neighbourhoods, from ``neighbourhoods``, like ``real``.
        real: which entries are no filling.
        kernel: a function of a scaled distance.
        z: the cloud in its coordinates.
        scores: in the same.
        keep: which particles count.
        score_fn: not used.

    Raises:
        ValueError: not one neighbourhood for each coordinate.
    """
    if index.shape[0] != z.shape[1]:
        raise ValueError(
            f"neighbours must have one row for each of the {z.shape[1]} coordinates, got {index.shape[0]}"
        )

    def one(row):
        members, held = row
        table = jnp.where(held, z[:, members], 0)
        own = jnp.where(jnp.arange(len(members)) == 0, scores[:, members], 0)
        square = squared_bandwidth("median", table, keep, jnp.int32(2**30))
        return stein_direction(scaled_kernel(kernel, square), table, own, keep)[:, 0]

    return jax.lax.map(one, (index, real)).T
