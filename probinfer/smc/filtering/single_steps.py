"""A pass of particles with somebody looking on: each step is one compiled call, and between steps Python may act.

The numbers are those of ``forward``, as the keys are the same; only what is compiled together differs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.status import Status
from probinfer.core.types import Array
from probinfer.numerics import weights
from probinfer.smc.filtering.forward_pass import State, Sweep, first_step, next_step, to_sweep
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac

__all__ = ["Seen", "watched"]


class Seen(NamedTuple):
    """What an onlooker sees after a step.

    Attributes:
        t: number of the step, a Python int.
        particles: after it; read what you need, as the next step may change them in place.
        log_weights: (N,), unnormalised.
        log_evidence: ().
        ess: () effective sample size.
        ancestors: (N,) the parents of the particles, at step t - 1.
        resampled: () whether the step began with resampling.
    """

    t: int
    particles: Any
    log_weights: Array
    log_evidence: Array
    ess: Array
    ancestors: Array
    resampled: Array


_first = jax.jit(first_step, static_argnums=2)


@partial(jax.jit, donate_argnums=2)
def _next(model: BatchedFeynmanKac, adaptive: Any, state: State, t: Array, key: Array) -> tuple:
    return next_step(model, adaptive, None, False, "paths", state, t, key)


def watched(
    key: Array,
    model: BatchedFeynmanKac,
    adaptive: Any,
    num_steps: int,
    num_particles: int,
    watch: Callable[[Seen], Any],
) -> Sweep:
    """Run ``forward(..., keep="paths")`` without a reference, calling ``watch`` after every step.

    Args:
        key: random key.
        model: the batched model.
        adaptive: when and how to resample.
        num_steps: T.
        num_particles: N.
        watch: called with ``Seen``; a true return value ends the pass after this step.
    """
    key_init, key_steps = jax.random.split(key)
    state = _first(key_init, model, num_particles, None)
    keys = jax.random.split(key_steps, num_steps)[1:]
    own = jnp.arange(num_particles, dtype=jnp.int32)
    records, rows = jax.tree.map(jnp.copy, model.records(state.particles)), []
    stop = watch(_seen(0, state, own, jnp.asarray(False)))
    for t in range(1, num_steps):
        if stop or int(state.status) != int(Status.OK) or _over(model, state):
            break
        state, row = _next(model, adaptive, state, jnp.int32(t), keys[t - 1])
        rows.append(row)
        stop = watch(_seen(t, state, row.ancestors, row.resampled))
    return _collected(model, adaptive, state, rows, records, num_steps)


def _seen(t: int, state: State, ancestors: Array, resampled: Array) -> Seen:
    log_evidence = state.log_factor + (state.log_rest + weights.log_mean_exp(state.log_weights))
    log_weights = state.log_weights + state.log_factor
    return Seen(
        t, state.particles, log_weights, log_evidence, weights.ess(state.log_weights), ancestors, resampled
    )


def _over(model: BatchedFeynmanKac, state: State) -> bool:
    if model.done is None:
        return False
    return bool(jnp.all(model.done(state.particles) | (state.log_weights == -jnp.inf)))


def _collected(
    model: BatchedFeynmanKac, adaptive: Any, state: State, rows: list, first_records: Any, num_steps: int
) -> Sweep:
    """The pass from its rows; those of steps that did not run are zero."""
    step = partial(next_step, model, adaptive, None, False, "paths")
    shapes = jax.eval_shape(step, state, jnp.int32(1), jax.random.key(0))[1]
    ran = len(rows) + 1
    missing = num_steps - ran
    whole = jax.tree.map(
        lambda leaf, *taken: (
            jnp.stack([*taken, *[jnp.zeros(leaf.shape, leaf.dtype)] * missing])
            if taken or missing
            else jnp.zeros((0, *leaf.shape), leaf.dtype)
        ),
        shapes,
        *rows,
    )
    identity = jnp.arange(state.log_weights.shape[0], dtype=jnp.int32)
    late = jnp.arange(1, num_steps)[:, None] >= ran
    whole = whole._replace(ancestors=jnp.where(late, identity, whole.ancestors))
    return to_sweep(state, whole, jnp.int32(ran), first_records, None)
