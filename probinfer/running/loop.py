"""The loop behind ``run``: guarded steps, their records, and three ways to drive them.

``scan`` serves traced callers (jit, vmap, grad). Outside jit there is one compiled program, ``advance``, whose last
step is data: several calls of it are a run in chunks, between which the host moves bars, writes checkpoints and listens
to Ctrl-C.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from probinfer.core.status import Status
from probinfer.running import checkpoint as checkpoints
from probinfer.running import interrupts
from probinfer.running import progress as bars
from probinfer.running.fingerprint import describe

__all__ = [
    "Cursor",
    "Problem",
    "advance",
    "advance_in_chunks",
    "allocate",
    "leaf_name",
    "leaves_with_path",
    "scan",
    "shape_of_record",
]

_SECONDS_PER_UPDATE = 0.3
_SECONDS_UNWATCHED = 1.0  # until Ctrl-C is heard where nothing is shown


class Problem(NamedTuple):
    """What does not change in a run: three ``Partial`` objects."""

    step: Callable
    stop_fn: Callable
    collect: Callable


class Cursor(NamedTuple):
    """Where a run stands."""

    step: Any  # steps taken that left a finite state
    state: Any
    status: Any
    bad_leaf: Any
    done: Any  # the stopping rule was met


# One step and one record


@jax.jit
def _call(fn, *args):
    """Call a ``Partial``; jitted so that the shapes and all loops share one trace of the user's function."""
    return fn(*args)


def _attempt(problem, key, cursor):
    """One step, taken back if it made the state non-finite."""
    state, info = _call(problem.step, jax.random.fold_in(key, cursor.step), cursor.state)
    bad_leaf = _first_bad_leaf(cursor.state, state)
    ok = bad_leaf < 0
    kept = jax.tree.map(partial(jnp.where, ok), state, cursor.state)
    status = jnp.where(ok, cursor.status, jnp.int32(Status.NON_FINITE))
    done = ok & _call(problem.stop_fn, state, info)
    return Cursor(cursor.step + ok.astype(jnp.int32), kept, status, bad_leaf, done), info


def _going(limit, cursor):
    return (cursor.step < limit) & (cursor.status == Status.OK) & ~cursor.done


def _guarded(problem, key, limit, _, carry):
    """One step unless the run has ended."""
    cursor, info = carry
    return lax.cond(_going(limit, cursor), lambda: _attempt(problem, key, cursor), lambda: (cursor, info))


def _block(problem, key, limit, thin, cursor):
    """``thin`` steps and their record; says whether all of them were taken."""
    row = cursor.step // thin
    info = jax.tree.map(_zeros_like, _call.eval_shape(problem.step, key, cursor.state)[1])
    cursor, info = lax.fori_loop(0, thin, partial(_guarded, problem, key, limit), (cursor, info))
    return cursor, _call(problem.collect, cursor.state, info), row, cursor.step == (row + 1) * thin


def _first_bad_leaf(old, new):
    """Index of the first leaf with a new non-finite entry, -1 if there is none."""
    pairs = zip(leaves_with_path(new), jax.tree.leaves(old), strict=True)
    bad = [_is_bad(path, before, leaf) for (path, leaf), before in pairs]
    if not bad:
        return jnp.int32(-1)
    flags = jnp.stack(bad)
    return jnp.where(jnp.any(flags), jnp.argmax(flags).astype(jnp.int32), jnp.int32(-1))


def _is_bad(path, old, new):
    """A NaN, or a new infinity; in a log quantity (an attribute named log...) minus infinity is a value."""
    if not jnp.issubdtype(new.dtype, jnp.inexact):
        return jnp.array(False)
    infinite = jnp.isinf(new) & ~jnp.isinf(old)
    is_log = any(getattr(part, "name", "").startswith("log") for part in path)
    if is_log and jnp.issubdtype(new.dtype, jnp.floating):
        infinite &= new > 0
    return jnp.any(jnp.isnan(new) | infinite)


# The three drivers


def scan(problem, key, cursor, empty, num_steps, thin):
    """All steps as a scan: for jit, vmap and grad."""
    block = partial(_scan_block, problem, key, empty, num_steps, thin)
    cursor, records = lax.scan(block, jax.tree.map(jnp.asarray, cursor), length=num_steps // thin)
    if num_steps % thin:
        cursor = _block(problem, key, num_steps, num_steps % thin, cursor)[0]
    return cursor, records


def _scan_block(problem, key, empty, num_steps, thin, cursor, _):
    cursor, record, _, complete = _block(problem, key, num_steps, thin, cursor)
    unfilled = jax.tree.map(_unfilled, empty)
    return cursor, jax.tree.map(partial(jnp.where, complete), record, unfilled)


@partial(jax.jit, static_argnames="thin", donate_argnames="records")
def advance(problem, key, cursor, records, limit, thin):
    """Steps until ``limit``, the stopping rule or a non-finite state; ``limit`` is data: chunks share this program."""
    return lax.while_loop(
        lambda carry: _going(limit, carry[0]),
        partial(_write_block, problem, key, limit, thin),
        (cursor, records),
    )


def _write_block(problem, key, limit, thin, carry):
    cursor, records = carry
    cursor, record, row, complete = _block(problem, key, limit, thin, cursor)
    return cursor, jax.tree.map(partial(_write, row, complete), records, record)


def _write(row, complete, buffer, value):
    """Put a complete record in its row; an incomplete one has no row of its own and leaves the buffer as it is."""
    if not buffer.shape[0]:
        return buffer
    before = lax.dynamic_index_in_dim(buffer, row, keepdims=False)
    return lax.dynamic_update_index_in_dim(buffer, jnp.where(complete, value, before), row, 0)


def advance_in_chunks(problem, key, cursor, records, num_steps, thin, progress, checkpoint):
    """Calls of ``advance`` that end where a checkpoint is due, a bar wants to move or Ctrl-C should be heard.

    Returns the cursor, the records, and whether Ctrl-C was pressed.
    """
    row = saved = 0
    with contextlib.ExitStack() as stack:
        store = None
        if checkpoint is not None:
            about = describe(key, problem, cursor.state, num_steps, thin)
            store = stack.enter_context(checkpoints.claimed(checkpoint, about))
            cursor, records, row = checkpoints.resume(store, cursor, records, thin)
            saved = int(cursor.step)
        every = num_steps if checkpoint is None else -(-checkpoint.every // thin) * thin
        seconds = _SECONDS_PER_UPDATE if bars.is_on(progress) else _SECONDS_UNWATCHED
        bar = stack.enter_context(bars.task("run", num_steps, progress))
        bar.update(saved)
        stop = stack.enter_context(interrupts.deferred())
        chunk = thin
        while _goes_on(num_steps, cursor) and not stop.requested:
            limit = min(int(cursor.step) + chunk, saved + every, num_steps)
            started = time.perf_counter()
            cursor, records = interrupts.wait(advance(problem, key, cursor, records, np.int32(limit), thin))
            step = int(cursor.step)
            bar.update(step)
            chunk = _next_chunk(chunk, time.perf_counter() - started, seconds, thin)
            due = step == saved + every or (stop.requested and step > saved)
            if store is not None and (due or not _goes_on(num_steps, cursor)):
                checkpoints.append(store, step, cursor, records, (row, step // thin))
                row, saved = step // thin, step
        return cursor, records, stop.requested


def _goes_on(num_steps, cursor) -> bool:
    """``_going`` for values, outside jit: on the host, so that nothing is compiled for it."""
    step, status, done = jax.device_get((cursor.step, cursor.status, cursor.done))
    return bool(step < num_steps and status == Status.OK and not done)


def _next_chunk(chunk: int, taken: float, seconds: float, thin: int) -> int:
    """Steps until the next look: towards one every so many ``seconds``, at most four times as many as now."""
    wanted = chunk * seconds / max(taken, 1e-9)
    return max(int(min(wanted, 4 * chunk)) // thin, 1) * thin


def shape_of_record(problem, key, state, stop_fn):
    """Shapes of one record, from the trace that the loop uses; refuses a step that changes the kind of its state."""
    try:
        new, info = _call.eval_shape(problem.step, key, state)
    except AttributeError as error:
        raise TypeError(
            f"step cannot use this state ({type(state).__name__}): {error}; start from algorithm.init(position)"
        ) from error
    before: Any = jax.tree.structure(state)
    after: Any = jax.tree.structure(new)
    if before != after:
        raise TypeError(
            f"step must return a state of the structure it was given: {before}; it returned {after}"
        )
    for (path, old), leaf in zip(leaves_with_path(state), jax.tree.leaves(new), strict=True):
        if (old.shape, old.dtype) != (leaf.shape, leaf.dtype):
            raise TypeError(
                f"step turned {leaf_name(path)} from {old.dtype}{list(old.shape)} into {leaf.dtype}{list(leaf.shape)}; "
                "start from a state with the shapes and dtypes that steps return"
            )
    if stop_fn is not None:
        verdict = _call.eval_shape(problem.stop_fn, new, info)
        if getattr(verdict, "shape", None) != () or verdict.dtype != bool:
            raise TypeError(f"stop_fn must return a boolean scalar, got {verdict}")
    return _call.eval_shape(problem.collect, new, info)


def allocate(empty, num_records):
    """Unfilled buffers for so many records."""
    leaves, structure = jax.tree.flatten(empty)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return jax.tree.unflatten(structure, _buffers(shapes, num_records))


@partial(jax.jit, static_argnums=(0, 1))
def _buffers(shapes, num_records):
    return [_unfilled(jax.ShapeDtypeStruct((num_records, *shape), dtype)) for shape, dtype in shapes]


def _unfilled(shape):
    """NaN, or zero where the dtype has no NaN."""
    inexact = jnp.issubdtype(shape.dtype, jnp.inexact)
    return jnp.full(shape.shape, jnp.nan, shape.dtype) if inexact else _zeros_like(shape)


def _zeros_like(shape):
    return jnp.zeros(shape.shape, shape.dtype)


def leaves_with_path(tree):
    """The leaves of a tree, each with its path."""
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def leaf_name(path):
    """A path in words: ``state.position['x']``."""
    return "state" + jax.tree_util.keystr(path)
