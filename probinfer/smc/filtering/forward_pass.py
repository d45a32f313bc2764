r"""One pass of particles from step 0 to step T-1, free or conditioned on a reference path.

Log weights are unnormalized: resampling preserves their total, so that the log of their mean estimates the log
evidence at every step. They are stored centered, beside the logarithm of the common factor, so that a long path costs
no precision. A step that kills every particle or makes a weight NaN or plus infinity is not taken: the state before it
stays.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, strong_array
from probinfer.numerics import weights
from probinfer.smc.filtering.traces import (
    FilterState,
    FilterTrace,
    TraceRow,
    failed_value,
    to_filter_trace,
    with_identity_after,
)
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac

__all__ = ["first_step", "forward", "next_step"]


@partial(jax.jit, static_argnames=("num_steps", "num_particles", "store", "ancestor_sampling"))
def forward(
    key: Array,
    model: BatchedFeynmanKac,
    adaptive: Any,
    reference: ArrayTree,
    num_steps: int,
    num_particles: int,
    store: str,
    ancestor_sampling: bool = False,
) -> FilterTrace:
    """Run the pass: a ``scan``, or a ``while_loop`` that ends early where the model can be done or is large.

    Args:
        key: random key.
        model: the batched model.
        adaptive: when and how to resample (``resampling.Adaptive``; a conditional one with a reference).
        reference: records of one path, leaves (T, ...), or None.
        num_steps: T.
        num_particles: N.
        store: "none", "ancestors", "paths" (ancestors and records) or "history" (log weights too).
        ancestor_sampling: draw the ancestor of the reference anew at every step.
    """
    key_init, key_steps = jax.random.split(key)
    state = first_step(key_init, model, num_particles, reference)
    step = partial(next_step, model, adaptive, reference, ancestor_sampling, store)
    keys = jax.random.split(key_steps, num_steps)[1:]
    first_records = model.records(state.particles) if store in ("paths", "history") else None
    first_log_weights = state.log_weights if store == "history" else None
    if model.copies_freely and model.done is None:
        times = jnp.arange(1, num_steps, dtype=jnp.int32)
        state, rows = lax.scan(lambda carry, xs: step(carry, *xs), state, (times, keys))
        num_run = jnp.int32(num_steps)
    else:
        state, rows, num_run = _run_until_done(step, model, state, keys, num_steps)
    return to_filter_trace(state, rows, num_run, first_records, first_log_weights)


def first_step(key: Array, model: BatchedFeynmanKac, num_particles: int, reference: ArrayTree) -> FilterState:
    """Draw and weigh the particles of step 0.

    Args:
        key: random key.
        model: the batched model.
        num_particles: N.
        reference: as for ``forward``.
    """
    first_record = jax.tree.map(lambda leaf: leaf[0], reference)
    reference_args = () if reference is None else (first_record,)
    particles, log_weights = model.init(key, num_particles, *reference_args)
    particles = jax.tree.map(strong_array, particles)
    if model.copies_freely:
        _check_rows(particles, num_particles)
    log_weights = _check_weights("init", log_weights, num_particles)
    status = weights.status(log_weights)
    # not a constant: under ``shard_map`` the zero varies over the same axes as the weights
    empty_sum = jnp.sum(log_weights[:0])
    return FilterState(
        particles=particles,
        log_weights=log_weights,
        log_factor=empty_sum,
        log_compensation=empty_sum,
        status=status,
        stopped_at=jnp.where(status == int(Status.OK), -1, 0).astype(jnp.int32),
    )


def next_step(
    model: BatchedFeynmanKac,
    adaptive: Any,
    reference: ArrayTree,
    ancestor_sampling: bool,
    store: str,
    state: FilterState,
    t: Array,
    key: Array,
) -> tuple[FilterState, TraceRow]:
    """Choose ancestors by the weights of step t - 1, propagate to step t and weigh.

    Args:
        model: as for ``forward``, like the next four.
        adaptive: when and how to resample.
        reference: records of one path, or None.
        ancestor_sampling: see ``forward``.
        store: see ``forward``.
        state: of step t - 1.
        t: the step.
        key: random key.
    """
    key_choose, key_extend = jax.random.split(key)
    log_mean = weights.log_mean_exp(state.log_weights)
    ess = weights.ess(state.log_weights)

    # Resample
    ancestors, log_weights, resampled, reordered = _choose_ancestors(
        key_choose, model, adaptive, reference if ancestor_sampling else None, state, t
    )
    parents = _gather(model, state.particles, ancestors, reordered)

    # Propagate and weigh
    reference_args = () if reference is None else (jax.tree.map(lambda leaf: leaf[t], reference),)
    particles, increments = model.extend(key_extend, parents, t, *reference_args)
    particles = _check_unchanged(state.particles, particles)
    increments = _check_weights("extend", increments, log_weights.shape[0], log_weights.dtype)
    if model.done is not None:
        increments = jnp.where(model.done(parents), jnp.zeros_like(increments), increments)

    # Center the log weights: their log mean moves into the compensated sum
    log_factor, log_compensation = weights.add_compensated(state.log_factor, state.log_compensation, log_mean)
    proposed = FilterState(
        particles=particles,
        log_weights=log_weights - log_mean + increments,
        log_factor=log_factor,
        log_compensation=log_compensation,
        status=state.status,
        stopped_at=state.stopped_at,
    )
    new_state, failed = _keep_last_finite_state(model, state, proposed, t)

    identity = jnp.arange(ancestors.shape[0], dtype=jnp.int32)
    row = TraceRow(
        ess=ess,
        log_evidence=log_factor,
        resampled=resampled & ~failed,
        ancestors=None if store == "none" else jnp.where(failed, identity, ancestors),
        records=model.records(new_state.particles) if store in ("paths", "history") else None,
        log_weights=new_state.log_weights if store == "history" else None,
    )
    return new_state, row


def _choose_ancestors(
    key: Array, model: BatchedFeynmanKac, adaptive: Any, reference: ArrayTree, state: FilterState, t: Array
) -> tuple[Array, Array, Array, Array]:
    r"""Draw ancestors; with a reference its own ancestor first, :math:`P(i)\propto w_i\gamma_T/\gamma_{t-1}`.

    The ancestor of the reference is drawn first, and those of the others are drawn given it. The step then leaves the
    extended target invariant under every resampling scheme, and also without resampling (the chosen particle and slot
    0 then change places).

    Returns:
        Ancestors (N,), log weights (N,), whether the scheme resampled, and whether any particle changed its row.
    """
    log_weights, num_particles = state.log_weights, state.log_weights.shape[0]
    if reference is None:
        ancestors, log_weights, resampled = adaptive(key, log_weights, num_particles, t)
        return ancestors, log_weights, resampled, resampled
    key_reference, key_others = jax.random.split(key)
    log_suffix = _check_weights("log_suffix", model.log_suffix(state.particles, reference, t), num_particles)
    log_total = log_weights + log_suffix
    status = weights.status(log_total)
    usable = status == int(Status.OK)
    chosen = jax.random.categorical(key_reference, jnp.where(usable, log_total, jnp.zeros_like(log_total)))
    chosen = jnp.where(usable, chosen, 0)
    swap = jnp.arange(num_particles, dtype=jnp.int32).at[0].set(chosen.astype(jnp.int32)).at[chosen].set(0)
    ancestors, log_weights, resampled = adaptive(key_others, log_weights[swap], num_particles, t)
    # a reference that the model cannot have drawn kills the step and a NaN makes it non-finite: neither is hidden
    log_weights = jnp.where(usable, log_weights, failed_value(status, log_weights.dtype))
    return swap[ancestors], log_weights, resampled, resampled | (chosen != 0)


def _gather(model: BatchedFeynmanKac, particles: ArrayTree, ancestors: Array, reordered: Array) -> ArrayTree:
    """Gather the ancestors if any particle is not its own.

    Particles that share storage go through a loop of at most one iteration: it works in place where ``cond`` would
    copy its operand.
    """
    if model.copies_freely:
        return lax.cond(reordered, model.gather, lambda particles, _: particles, particles, ancestors)

    def body(carry: tuple) -> tuple:
        return _check_unchanged(carry[0], model.gather(carry[0], ancestors), "gather"), jnp.zeros_like(
            carry[1]
        )

    return lax.while_loop(lambda carry: carry[1], body, (particles, reordered))[0]


def _keep_last_finite_state(
    model: BatchedFeynmanKac, state: FilterState, proposed: FilterState, t: Array
) -> tuple[FilterState, Array]:
    """Keep the state where this or an earlier step failed; particles changed in place cannot be (see ``Result``)."""
    status = _status(proposed.log_weights)
    failed_before = state.status != int(Status.OK)
    failed = failed_before | (status != int(Status.OK))

    def keep_old(new: Array, old: Array) -> Array:
        return jnp.where(failed, old, new)

    particles = proposed.particles
    if model.copies_freely:
        particles = jax.tree.map(keep_old, particles, state.particles)
    new_state = FilterState(
        particles=particles,
        log_weights=keep_old(proposed.log_weights, state.log_weights),
        log_factor=keep_old(proposed.log_factor, state.log_factor),
        log_compensation=keep_old(proposed.log_compensation, state.log_compensation),
        status=jnp.where(failed_before, state.status, status),
        stopped_at=jnp.where(failed & ~failed_before, t, state.stopped_at),
    )
    return new_state, failed


def _status(log_weights: Array) -> Array:
    """Return ``weights.status`` by way of the maximum; a compiled maximum may miss NaN, which is checked separately."""
    largest = jnp.max(log_weights)
    status = jnp.where(largest == -jnp.inf, int(Status.DEGENERATE_WEIGHTS), int(Status.OK))
    non_finite = jnp.any(jnp.isnan(log_weights)) | (largest == jnp.inf)
    return jnp.where(non_finite, int(Status.NON_FINITE), status).astype(jnp.int32)


def _run_until_done(
    step: Any, model: BatchedFeynmanKac, state: FilterState, keys: Array, num_steps: int
) -> tuple:
    """Loop until a step fails or every particle is done or dead; rows of steps that did not run are zero."""
    shapes = jax.eval_shape(step, state, jnp.int32(1), jax.random.key(0))
    rows = jax.tree.map(lambda leaf: jnp.zeros((num_steps - 1, *leaf.shape), leaf.dtype), shapes[1])

    def is_running(carry: tuple) -> Array:
        t, state, _ = carry
        running = (t < num_steps) & (state.status == int(Status.OK))
        if model.done is not None:
            running &= ~jnp.all(model.done(state.particles) | (state.log_weights == -jnp.inf))
        return running

    def body(carry: tuple) -> tuple:
        t, state, rows = carry
        state, row = step(state, t, keys[t - 1])
        rows = jax.tree.map(lambda buffer, value: buffer.at[t - 1].set(value), rows, row)
        return t + 1, state, rows

    num_run = jnp.int32(1)
    if num_steps > 1:
        num_run, state, rows = lax.while_loop(is_running, body, (num_run, state, rows))
    if rows.ancestors is not None:
        rows = with_identity_after(rows, num_run)
    return state, rows, num_run


def _check_weights(name: str, log_weights: Any, num_particles: int, dtype: Any = None) -> Array:
    log_weights = jnp.asarray(log_weights)
    if log_weights.shape != (num_particles,):
        raise ValueError(
            f"the log weights of {name} must have shape ({num_particles},), one number per particle, got "
            f"{log_weights.shape}; a log potential returns a scalar"
        )
    if not jnp.issubdtype(log_weights.dtype, jnp.floating):
        raise TypeError(f"the log weights of {name} must be floating point, got {log_weights.dtype}")
    if log_weights.aval.weak_type:
        return lax.convert_element_type(log_weights, dtype or log_weights.dtype)
    if dtype is not None and log_weights.dtype != dtype:
        raise TypeError(
            f"the log weights are {dtype} at step 0 and {log_weights.dtype} from {name}; return one dtype"
        )
    return log_weights


def _check_rows(particles: ArrayTree, num_particles: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(particles):
        if leaf.shape[:1] != (num_particles,):
            raise ValueError(
                f"every leaf of the particles must have {num_particles} rows, one per particle; leaf "
                f"{jax.tree_util.keystr(path)} has shape {leaf.shape}. A model that stores particles otherwise needs "
                f"its own gather"
            )


def _check_unchanged(old: ArrayTree, new: ArrayTree, name: str = "extend") -> ArrayTree:
    """Return new particles as strong arrays, or raise unless their structure, shapes and dtypes are the old ones."""
    new = jax.tree.map(strong_array, new)
    expected, actual = (jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree) for tree in (old, new))
    if not _trees_equal(expected, actual):
        raise TypeError(
            f"{name} must return particles of the structure, shapes and dtypes it was given: expected {expected}, "
            f"got {actual}"
        )
    return new


def _trees_equal(a: Any, b: Any) -> bool:
    """Compare structure and leaves: the classes of the nodes may define no equality."""
    structures: Any = [jax.tree.structure(tree) for tree in (a, b)]
    return structures[0] == structures[1] and jax.tree.leaves(a) == jax.tree.leaves(b)
