r"""Paths from ancestors and records.

A pass stores what each step added to the paths and the parent of each particle: T N records and T N integers. The path
of a particle is read backwards, :math:`b_{t-1} = a_t^{b_t}`. Storing whole paths and copying them at every resampling
would cost T times as much work.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.types import Array, ArrayTree, Int, PRNGKey
from probinfer.smc.filtering.traces import FilterTrace

__all__ = ["all_records", "coalescence", "draw_path_backward", "trace_paths"]


def all_records(filter_trace: FilterTrace) -> ArrayTree:
    """Return the records of all steps of a pass that stored them, leaves (T, N, ...)."""
    records: Any = filter_trace.records
    first, later = records
    return jax.tree.map(lambda head, tail: jnp.concatenate([head[None], tail]), first, later)


def trace_paths(ancestors: Int[Array, "t n"], records: tuple, index: Int[Array, " k"]) -> ArrayTree:
    """Return the paths that end in the particles ``index``, leaves (T, K, ...).

    Args:
        ancestors: row t holds the parents, at step t - 1, of the particles of step t; row 0 is not read.
        records: of step 0, leaves (N, ...), and of steps 1 ... T-1, leaves (T-1, N, ...).
        index: particles of the last step.
    """
    first, later = records

    def step_back(index: Array, row: tuple) -> tuple[Array, ArrayTree]:
        parents, record = row
        return parents[index], jax.tree.map(lambda leaf: leaf[index], record)

    index, path = lax.scan(step_back, index, (ancestors[1:], later), reverse=True)
    return jax.tree.map(lambda head, tail: jnp.concatenate([head[index][None], tail]), first, path)


def coalescence(ancestors: Int[Array, "t n"]) -> Int[Array, " t"]:
    """Return how many distinct particles of each step have a descendant among the last ones.

    A number near 1 far into the past says that the early part of all paths is a single draw: smooth by backward
    sampling, or use more particles.

    Args:
        ancestors: as ``Result.ancestors``.
    """
    num_particles = ancestors.shape[1]

    def step_back(alive: Array, parents: Array) -> tuple[Array, Array]:
        return jnp.zeros(num_particles, bool).at[parents].max(alive), jnp.sum(alive, dtype=jnp.int32)

    _, counts = lax.scan(step_back, jnp.ones(num_particles, bool), ancestors, reverse=True)
    return counts


def draw_path_backward(key: PRNGKey, filter_trace: FilterTrace, index: Array, log_suffix: Any) -> ArrayTree:
    r"""Draw a path backwards: :math:`P(b_{t-1}=i)\propto w_{t-1}^i\,\gamma_{T-1}/\gamma_{t-1}` of particle i.

    Where a step did not resample, a particle has only one parent, and the path follows it.

    Args:
        key: random key.
        filter_trace: a pass with its history, whose records are its particles.
        index: the particle of the last step, a scalar.
        log_suffix: as in ``BatchedFeynmanKac``.

    Returns:
        The path, leaves (T, ...).

    References:
        Godsill, Doucet and West (2004); Whiteley (2010).
    """
    records = all_records(filter_trace)
    ancestors: Any = filter_trace.ancestors
    past_log_weights: Any = filter_trace.past_log_weights
    num_steps = ancestors.shape[0]
    path = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:, 0]).at[-1].set(leaf[-1, index]), records)

    def step_back(carry: tuple, row: tuple) -> tuple[tuple, None]:
        index, path = carry
        t, key = row
        particles = jax.tree.map(lambda leaf: leaf[t - 1], records)
        log_weights = past_log_weights[t - 1] + log_suffix(particles, path, t)
        drawn = jax.random.categorical(key, log_weights).astype(index.dtype)
        index = jnp.where(filter_trace.resampled[t], drawn, ancestors[t, index])
        path = jax.tree.map(lambda leaf, values: leaf.at[t - 1].set(values[index]), path, particles)
        return (index, path), None

    times = jnp.arange(1, num_steps, dtype=jnp.int32)
    keys = jax.random.split(key, num_steps)[1:]
    (_, path), _ = lax.scan(step_back, (index, path), (times, keys), reverse=True)
    return path
