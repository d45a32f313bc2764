"""A pass of particles that calls a Python function after every step; each step is one compiled call.

Keys and numbers are those of ``forward``; only what is compiled together differs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, Scalar
from probinfer.numerics import weights
from probinfer.smc.filtering.forward_pass import first_step, next_step
from probinfer.smc.filtering.traces import (
    FilterState,
    FilterTrace,
    log_evidence_of,
    to_filter_trace,
    with_identity_after,
)
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac

__all__ = ["StepSnapshot", "forward_with_callback"]


class StepSnapshot(NamedTuple):
    """What a step callback receives.

    Attributes:
        t: number of the step, a Python int.
        particles: after the step; read what you need, as the next step may change them in place.
        log_weights: (N,), unnormalized.
        log_evidence: of the steps so far.
        ess: effective sample size.
        ancestors: (N,) the parents of the particles, at step t - 1.
        resampled: whether the step began with resampling.
    """

    t: int
    particles: ArrayTree
    log_weights: Float[Array, " N"]
    log_evidence: Scalar
    ess: Scalar
    ancestors: Int[Array, " N"]
    resampled: Bool[Array, ""]


_first_step = jax.jit(first_step, static_argnums=2)


@partial(jax.jit, donate_argnums=2)
def _next_step(model: BatchedFeynmanKac, adaptive: Any, state: FilterState, t: Array, key: Array) -> tuple:
    return next_step(model, adaptive, None, False, "paths", state, t, key)


def forward_with_callback(
    key: Array,
    model: BatchedFeynmanKac,
    adaptive: Any,
    num_steps: int,
    num_particles: int,
    step_callback: Callable[[StepSnapshot], Any],
) -> FilterTrace:
    """Run ``forward(..., store="paths")`` without a reference, calling ``step_callback`` after every step.

    Args:
        key: random key.
        model: the batched model.
        adaptive: when and how to resample.
        num_steps: T.
        num_particles: N.
        step_callback: called with a ``StepSnapshot``; a true return value ends the pass after this step.
    """
    key_init, key_steps = jax.random.split(key)
    state = _first_step(key_init, model, num_particles, None)
    keys = jax.random.split(key_steps, num_steps)[1:]
    identity = jnp.arange(num_particles, dtype=jnp.int32)
    first_records = jax.tree.map(
        jnp.copy, model.records(state.particles)
    )  # the next step donates its particles
    rows: list = []
    stop = step_callback(_snapshot(0, state, identity, jnp.asarray(False)))
    for t in range(1, num_steps):
        if stop or int(state.status) != int(Status.OK) or _all_done(model, state):
            break
        state, row = _next_step(model, adaptive, state, jnp.int32(t), keys[t - 1])
        rows.append(row)
        stop = step_callback(_snapshot(t, state, row.ancestors, row.resampled))
    return _collect(model, adaptive, state, rows, first_records, num_steps)


def _snapshot(t: int, state: FilterState, ancestors: Array, resampled: Array) -> StepSnapshot:
    return StepSnapshot(
        t=t,
        particles=state.particles,
        log_weights=state.log_weights + state.log_factor,
        log_evidence=log_evidence_of(state),
        ess=weights.ess(state.log_weights),
        ancestors=ancestors,
        resampled=resampled,
    )


def _all_done(model: BatchedFeynmanKac, state: FilterState) -> bool:
    if model.done is None:
        return False
    return bool(jnp.all(model.done(state.particles) | (state.log_weights == -jnp.inf)))


def _collect(
    model: BatchedFeynmanKac,
    adaptive: Any,
    state: FilterState,
    rows: list,
    first_records: ArrayTree,
    num_steps: int,
) -> FilterTrace:
    """Stack the rows of the steps; those of steps that did not run are zero."""
    step = partial(next_step, model, adaptive, None, False, "paths")
    shapes = jax.eval_shape(step, state, jnp.int32(1), jax.random.key(0))[1]
    num_run = len(rows) + 1
    num_missing = num_steps - num_run

    def stack(shape: Any, *values: Array) -> Array:
        if not values and not num_missing:
            return jnp.zeros((0, *shape.shape), shape.dtype)
        return jnp.stack([*values, *[jnp.zeros(shape.shape, shape.dtype)] * num_missing])

    stacked = with_identity_after(jax.tree.map(stack, shapes, *rows), num_run)
    return to_filter_trace(state, stacked, jnp.int32(num_run), first_records, None)
