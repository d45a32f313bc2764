r"""Paths out of ancestors and records.

A pass stores what each step added and whose child each particle is: T N records and T N integers. The path of a
particle is read backwards, :math:`b_{t-1} = a_t^{b_t}`. Storing whole paths and copying them at every resampling would
cost T times as much work.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.types import Array, ArrayTree, Int

__all__ = ["coalescence", "trace"]


def trace(ancestors: Int[Array, "t n"], records: tuple, index: Int[Array, " k"]) -> ArrayTree:
    """Return the paths that end in the particles ``index``, leaves (T, K, ...).

    Args:
        ancestors: row t holds the parents, at step t - 1, of the particles of step t; row 0 is not read.
        records: of step 0, leaves (N, ...), and of steps 1 ... T-1, leaves (T-1, N, ...).
        index: particles of the last step.
    """
    first, later = records

    def back(index: Array, row: tuple) -> tuple[Array, ArrayTree]:
        parents, record = row
        return parents[index], jax.tree.map(lambda leaf: leaf[index], record)

    index, path = lax.scan(back, index, (ancestors[1:], later), reverse=True)
    return jax.tree.map(lambda head, tail: jnp.concatenate([head[index][None], tail]), first, path)


def coalescence(ancestors: Int[Array, "t n"]) -> Int[Array, " t"]:
    """Return how many distinct particles of each step have a descendant among the last ones.

    A number near 1 far into the past says that the early part of all paths is a single draw: smooth by backward
    sampling, or use more particles.

    Args:
        ancestors: as ``Result.ancestors``.
    """
    num = ancestors.shape[1]

    def back(alive: Array, parents: Array) -> tuple[Array, Array]:
        return jnp.zeros(num, bool).at[parents].max(alive), jnp.sum(alive, dtype=jnp.int32)

    _, counts = lax.scan(back, jnp.ones(num, bool), ancestors, reverse=True)
    return counts
