r"""One pass of particles from step 0 to step T-1, free or conditioned on a reference path.

Weights are kept unnormalised in meaning: resampling preserves their total, so the log of their mean is the estimate
of the log evidence at every step. They are stored centred, beside the logarithm of the common factor: a long path
costs no precision. A step that kills every particle or makes a weight NaN or plus infinity is not taken: the state
before it stays.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, strong_array
from probinfer.numerics import weights
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac

__all__ = ["State", "Sweep", "first_step", "forward", "next_step", "to_sweep"]


class Sweep(NamedTuple):
    """What one pass leaves: the last particles, a trace of scalars, and as much of the past as was asked for."""

    particles: ArrayTree
    log_weights: Array
    log_evidence: Array
    ess: Array
    log_evidences: Array
    resampled: Array
    status: Array
    stopped_at: Array
    num_steps: Array
    ancestors: Any  # (T, N) | None
    records: Any  # (records of step 0, records of steps 1 ... T-1) | None
    past_weights: Any  # (T, N) | None


class State(NamedTuple):
    """What the next step needs."""

    particles: ArrayTree
    log_weights: Array  # centred: the true ones are larger by log_factor
    log_factor: Array
    log_rest: Array  # what the rounding of log_factor lost
    status: Array
    stopped_at: Array


class _Row(NamedTuple):
    ess: Array  # of the weights before the step, as the next two
    log_evidence: Array
    resampled: Array  # in the step, as the rest
    ancestors: Array | None
    records: ArrayTree | None
    log_weights: Array | None


@partial(jax.jit, static_argnames=("num_steps", "num_particles", "keep", "ancestor_sampling"))
def forward(
    key: Array,
    model: BatchedFeynmanKac,
    adaptive: Any,
    reference: ArrayTree,
    num_steps: int,
    num_particles: int,
    keep: str,
    ancestor_sampling: bool = False,
) -> Sweep:
    """Run the pass: a ``scan``, or a ``while_loop`` that ends early where the model can be done or is large.

    Args:
        key: random key.
        model: the batched model.
        adaptive: when and how to resample (``resampling.Adaptive``; a conditional one beside a reference).
        reference: records of one path, leaves (T, ...), or None.
        num_steps: T.
        num_particles: N.
        keep: "none", "ancestors", "paths" (ancestors and records) or "history" (log weights too).
        ancestor_sampling: draw the ancestor of the reference anew at every step.
    """
    key_init, key_steps = jax.random.split(key)
    state = first_step(key_init, model, num_particles, reference)
    step = partial(next_step, model, adaptive, reference, ancestor_sampling, keep)
    keys = jax.random.split(key_steps, num_steps)[1:]
    first_records = model.records(state.particles) if keep in ("paths", "history") else None
    first_weights = state.log_weights if keep == "history" else None
    if model.copies_freely and model.done is None:
        times = jnp.arange(1, num_steps, dtype=jnp.int32)
        state, rows = lax.scan(lambda carry, xs: step(carry, *xs), state, (times, keys))
        ran = jnp.int32(num_steps)
    else:
        state, rows, ran = _run_until_done(step, model, state, keys, num_steps)
    return to_sweep(state, rows, ran, first_records, first_weights)


def first_step(key: Array, model: BatchedFeynmanKac, num: int, reference: ArrayTree) -> State:
    """Draw and weigh the particles of step 0.

    Args:
        key: random key.
        model: the batched model.
        num: N.
        reference: as for ``forward``.
    """
    at_zero = jax.tree.map(lambda leaf: leaf[0], reference)
    extra = () if reference is None else (at_zero,)
    particles, log_weights = model.init(key, num, *extra)
    particles = jax.tree.map(strong_array, particles)
    if model.copies_freely:
        _check_rows(particles, num)
    log_weights = _check_weights("init", log_weights, num)
    code = weights.status(log_weights)
    stopped_at = jnp.where(code == int(Status.OK), -1, 0).astype(jnp.int32)
    zero = jnp.sum(log_weights[:0])  # varies over the axes of a ``shard_map`` as the weights do
    return State(particles, log_weights, zero, zero, code, stopped_at)


def next_step(
    model: BatchedFeynmanKac,
    adaptive: Any,
    reference: ArrayTree,
    ancestor_sampling: bool,
    keep: str,
    state: State,
    t: Array,
    key: Array,
) -> tuple[State, _Row]:
    """Choose ancestors by the weights of step t - 1, move to step t, weigh.

    Args:
        model: as for ``forward``, as the next four.
        adaptive: when and how to resample.
        reference: records of one path, or None.
        ancestor_sampling: see ``forward``.
        keep: see ``forward``.
        state: of step t - 1.
        t: the step.
        key: random key.
    """
    key_choose, key_extend = jax.random.split(key)
    log_mean = weights.log_mean_exp(state.log_weights)
    ess = weights.ess(state.log_weights)
    ancestors, log_weights, resampled, moved = _choose(
        key_choose, model, adaptive, reference if ancestor_sampling else None, state, t
    )
    parents = _gather(model, state.particles, ancestors, moved)
    extra = () if reference is None else (jax.tree.map(lambda leaf: leaf[t], reference),)
    particles, increments = model.extend(key_extend, parents, t, *extra)
    particles = _check_same(state.particles, particles)
    increments = _check_weights("extend", increments, log_weights.shape[0], log_weights.dtype)
    if model.done is not None:
        increments = jnp.where(model.done(parents), jnp.zeros_like(increments), increments)
    log_factor, log_rest = weights.add(state.log_factor, state.log_rest, log_mean)
    following = State(
        particles,
        log_weights - log_mean + increments,
        log_factor,
        log_rest,
        state.status,
        state.stopped_at,
    )
    following, failed = _hold(model, state, following, t)
    identity = jnp.arange(ancestors.shape[0], dtype=jnp.int32)
    row = _Row(
        ess,
        log_factor,
        resampled & ~failed,
        None if keep == "none" else jnp.where(failed, identity, ancestors),
        model.records(following.particles) if keep in ("paths", "history") else None,
        following.log_weights if keep == "history" else None,
    )
    return following, row


def _choose(
    key: Array, model: BatchedFeynmanKac, adaptive: Any, reference: ArrayTree, state: State, t: Array
) -> tuple[Array, Array, Array, Array]:
    r"""Draw ancestors; with a reference its own ancestor first, :math:`P(i)\propto w_i\gamma_T/\gamma_{t-1}`.

    The ancestor of the reference is drawn before those of the others, which are then drawn given it: so the step
    leaves the extended target invariant under every resampling scheme, and where there is no resampling (the chosen
    particle and slot 0 then change places).
    """
    log_weights, num = state.log_weights, state.log_weights.shape[0]
    if reference is None:
        ancestors, log_weights, resampled = adaptive(key, log_weights, num, t)
        return ancestors, log_weights, resampled, resampled
    key_reference, key_others = jax.random.split(key)
    log_suffix = _check_weights("log_suffix", model.log_suffix(state.particles, reference, t), num)
    log_total = log_weights + log_suffix
    code = weights.status(log_total)
    usable = code == int(Status.OK)
    chosen = jax.random.categorical(key_reference, jnp.where(usable, log_total, jnp.zeros_like(log_total)))
    chosen = jnp.where(usable, chosen, 0)
    swap = jnp.arange(num, dtype=jnp.int32).at[0].set(chosen.astype(jnp.int32)).at[chosen].set(0)
    ancestors, log_weights, resampled = adaptive(key_others, log_weights[swap], num, t)
    # a reference that the model cannot have drawn kills the step, a NaN spoils it: neither is hidden
    broken = jnp.where(code == int(Status.DEGENERATE_WEIGHTS), -jnp.inf, jnp.nan).astype(log_weights.dtype)
    log_weights = jnp.where(usable, log_weights, broken)
    return swap[ancestors], log_weights, resampled, resampled | (chosen != 0)


def _gather(model: BatchedFeynmanKac, particles: ArrayTree, ancestors: Array, moved: Array) -> ArrayTree:
    """Gather where particles moved. A loop of no or one turn works in place where ``cond`` would copy its operand."""
    if model.copies_freely:
        return lax.cond(moved, model.gather, lambda particles, _: particles, particles, ancestors)

    def body(carry: tuple) -> tuple:
        return _check_same(carry[0], model.gather(carry[0], ancestors), "gather"), jnp.zeros_like(carry[1])

    return lax.while_loop(lambda carry: carry[1], body, (particles, moved))[0]


def _hold(model: BatchedFeynmanKac, state: State, following: State, t: Array) -> tuple[State, Array]:
    """Keep the state where the step failed, now or before; particles in place are not kept (see ``Result``)."""
    code = _status(following.log_weights)
    failed_before = state.status != int(Status.OK)
    failed = failed_before | (code != int(Status.OK))

    def keep_old(new: Array, old: Array) -> Array:
        return jnp.where(failed, old, new)

    particles = following.particles
    if model.copies_freely:
        particles = jax.tree.map(keep_old, particles, state.particles)
    held = State(
        particles,
        keep_old(following.log_weights, state.log_weights),
        keep_old(following.log_factor, state.log_factor),
        keep_old(following.log_rest, state.log_rest),
        jnp.where(failed_before, state.status, code),
        jnp.where(failed & ~failed_before, t, state.stopped_at),
    )
    return held, failed


def _status(log_weights: Array) -> Array:
    """As ``weights.status``, told from the maximum; the compiler's maximum of a large array may pass over NaN."""
    largest = jnp.max(log_weights)
    code = jnp.where(largest == -jnp.inf, int(Status.DEGENERATE_WEIGHTS), int(Status.OK))
    broken = jnp.any(jnp.isnan(log_weights)) | (largest == jnp.inf)
    return jnp.where(broken, int(Status.NON_FINITE), code).astype(jnp.int32)


def _run_until_done(step: Any, model: BatchedFeynmanKac, state: State, keys: Array, num_steps: int) -> tuple:
    """Loop until a step fails or every particle is done or dead; rows of steps that did not run are zero."""
    shapes = jax.eval_shape(step, state, jnp.int32(1), jax.random.key(0))
    rows = jax.tree.map(lambda leaf: jnp.zeros((num_steps - 1, *leaf.shape), leaf.dtype), shapes[1])

    def going_on(carry: tuple) -> Array:
        t, now, _ = carry
        go = (t < num_steps) & (now.status == int(Status.OK))
        if model.done is not None:
            go &= ~jnp.all(model.done(now.particles) | (now.log_weights == -jnp.inf))
        return go

    def body(carry: tuple) -> tuple:
        t, now, rows = carry
        now, row = step(now, t, keys[t - 1])
        rows = jax.tree.map(lambda buffer, value: buffer.at[t - 1].set(value), rows, row)
        return t + 1, now, rows

    ran = jnp.int32(1)
    if num_steps > 1:
        ran, state, rows = lax.while_loop(going_on, body, (ran, state, rows))
    if rows.ancestors is not None:
        not_run = jnp.arange(1, num_steps)[:, None] >= ran
        identity = jnp.arange(rows.ancestors.shape[1], dtype=jnp.int32)
        rows = rows._replace(ancestors=jnp.where(not_run, identity, rows.ancestors))
    return state, rows, ran


def to_sweep(state: State, rows: _Row, ran: Array, first_records: Any, first_weights: Any) -> Sweep:
    """What a pass leaves, from its last state and the rows of its steps, of which ``ran`` - 1 count."""
    final = state.log_factor + (state.log_rest + weights.log_mean_exp(state.log_weights))
    steps = jnp.arange(rows.ess.shape[0] + 1)
    failed = (state.status != int(Status.OK)) & (steps >= state.stopped_at)
    lost = jnp.where(state.status == int(Status.DEGENERATE_WEIGHTS), -jnp.inf, jnp.nan).astype(final.dtype)
    ess = _append(rows.ess, weights.ess(state.log_weights), steps, ran)
    log_evidences = _append(rows.log_evidence, final, steps, ran)
    identity = jnp.arange(state.log_weights.shape[0], dtype=jnp.int32)
    return Sweep(
        particles=state.particles,
        log_weights=state.log_weights + state.log_factor,
        log_evidence=jnp.where(state.status == int(Status.OK), final, lost),
        ess=jnp.where(failed, jnp.zeros_like(ess), ess),
        log_evidences=jnp.where(failed, lost, log_evidences),
        resampled=jnp.concatenate([jnp.zeros(1, bool), rows.resampled]),
        status=state.status,
        stopped_at=state.stopped_at,
        num_steps=ran,
        ancestors=None if rows.ancestors is None else jnp.concatenate([identity[None], rows.ancestors]),
        records=None if first_records is None else (first_records, rows.records),
        past_weights=_joined(first_weights, rows.log_weights),
    )


def _joined(first: Array | None, later: Array | None) -> Array | None:
    return None if first is None or later is None else jnp.concatenate([first[None], later])


def _append(before: Array, last: Array, steps: Array, ran: Array) -> Array:
    """Row t - 1 of ``before`` belongs to step t - 1; ``last`` to the last step that ran and all after it."""
    return jnp.where(steps >= ran - 1, last, jnp.concatenate([before, last[None]]))


def _check_weights(name: str, log_weights: Any, num: int, dtype: Any = None) -> Array:
    log_weights = jnp.asarray(log_weights)
    if log_weights.shape != (num,):
        raise ValueError(
            f"the log weights of {name} must have shape ({num},), one number a particle, got {log_weights.shape}; "
            f"a log potential returns a scalar"
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


def _check_rows(particles: ArrayTree, num: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(particles):
        if leaf.shape[:1] != (num,):
            raise ValueError(
                f"every leaf of the particles must have {num} rows, one a particle; leaf {jax.tree_util.keystr(path)} "
                f"has shape {leaf.shape}. A model that stores particles otherwise needs its own gather"
            )


def _check_same(old: ArrayTree, new: ArrayTree, name: str = "extend") -> ArrayTree:
    new = jax.tree.map(strong_array, new)
    expected, found = (jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree) for tree in (old, new))
    if not _same(expected, found):
        raise TypeError(
            f"{name} must return particles of the structure, shapes and dtypes it was given: expected {expected}, "
            f"got {found}"
        )
    return new


def _same(a: Any, b: Any) -> bool:
    """Whether trees are equal; the classes of their nodes may not say so themselves."""
    forms: Any = [jax.tree.structure(tree) for tree in (a, b)]
    return forms[0] == forms[1] and jax.tree.leaves(a) == jax.tree.leaves(b)
