r"""Paths out of ancestors and records.

A pass stores what each step added and whose child each particle is: T N records and T N integers. The path of a
particle is read backwards, :math:`b_{t-1} = a_t^{b_t}`. Storing whole paths and copying them at every resampling would
cost T times as much work.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.types import Array, ArrayTree, Int, PRNGKey

__all__ = ["coalescence", "trace", "trace_backward"]


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


def trace_backward(key: PRNGKey, sweep: Any, index: Array, log_suffix: Any) -> ArrayTree:
    r"""Draw a path backwards: :math:`P(b_{t-1}=i)\propto w_{t-1}^i\,\gamma_{T-1}/\gamma_{t-1}` of particle i.

    Where a step did not resample, a particle has but one parent, and the path follows it.

    Args:
        key: random key.
        sweep: a pass with its history, whose records are its particles.
        index: the particle of the last step, a scalar.
        log_suffix: as in ``BatchedFeynmanKac``.

    Returns:
        The path, leaves (T, ...).

    References:
        Godsill, Doucet and West (2004); Whiteley (2010).
    """
    first, later = sweep.records
    records = jax.tree.map(lambda head, tail: jnp.concatenate([head[None], tail]), first, later)
    num_steps = sweep.ancestors.shape[0]
    path = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:, 0]).at[-1].set(leaf[-1, index]), records)

    def back(carry: tuple, row: tuple) -> tuple[tuple, None]:
        index, path = carry
        t, key = row
        particles = jax.tree.map(lambda leaf: leaf[t - 1], records)
        log_weights = sweep.past_weights[t - 1] + log_suffix(particles, path, t)
        drawn = jax.random.categorical(key, log_weights).astype(index.dtype)
        index = jnp.where(sweep.resampled[t], drawn, sweep.ancestors[t, index])
        path = jax.tree.map(lambda leaf, values: leaf.at[t - 1].set(values[index]), path, particles)
        return (index, path), None

    times = jnp.arange(1, num_steps, dtype=jnp.int32)
    keys = jax.random.split(key, num_steps)[1:]
    (_, path), _ = lax.scan(back, (index, path), (times, keys), reverse=True)
    return path
