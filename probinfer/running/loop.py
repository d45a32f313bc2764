"""The loop behind ``run``: guarded steps, their records, and three ways to drive them.

``scan`` serves traced callers (jit, vmap, grad). Outside jit there is one compiled program, ``advance``, which takes
the number of its last step as data. A run is several calls of it: between two of them the host moves progress bars,
writes checkpoints and listens for Ctrl-C.
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
from jax.typing import ArrayLike

from probinfer.core.status import Status
from probinfer.core.trees import select
from probinfer.core.types import Bool, Int, PyTree
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

_SECONDS_PER_UPDATE = 0.3  # of a progress bar
_SECONDS_UNSEEN = 1.0  # between two looks for Ctrl-C when no bar is shown


class Problem(NamedTuple):
    """What stays the same during a run.

    Attributes:
        step: ``step(key, state) -> (state, info)``, a ``Partial``.
        stop_fn: ``stop_fn(state, info) -> bool``, a ``Partial``.
        collect: ``collect(state, info) -> record``, a ``Partial``.
    """

    step: Callable
    stop_fn: Callable
    collect: Callable


class Cursor(NamedTuple):
    """How far a run has come.

    Attributes:
        step: number of steps taken that left a finite state.
        state: the last finite state of the algorithm.
        status: a ``Status``.
        bad_leaf: index of the leaf of the state that became non-finite, -1 if none did.
        done: whether the stopping rule was met.
    """

    step: Int[ArrayLike, ""]
    state: PyTree
    status: Int[ArrayLike, ""]
    bad_leaf: Int[ArrayLike, ""]
    done: Bool[ArrayLike, ""]


# One step and one record.


@jax.jit
def _call(fn, *args):
    """Call a ``Partial``; jitted so that shape inference and all loops share one trace of the user's function."""
    return fn(*args)


def _attempt(problem, key, cursor):
    """Take one step, and undo it if it made the state non-finite."""
    state, info = _call(problem.step, jax.random.fold_in(key, cursor.step), cursor.state)
    bad_leaf = _first_non_finite_leaf(cursor.state, state)
    ok = bad_leaf < 0
    last_finite = select(ok, state, cursor.state)
    status = jnp.where(ok, cursor.status, jnp.int32(Status.NON_FINITE))
    done = ok & _call(problem.stop_fn, state, info)
    step = cursor.step + ok.astype(jnp.int32)
    return Cursor(step=step, state=last_finite, status=status, bad_leaf=bad_leaf, done=done), info


def _is_running(limit, cursor):
    return (cursor.step < limit) & (cursor.status == Status.OK) & ~cursor.done


def _guarded(problem, key, limit, _, carry):
    """Take one step unless the run has ended."""
    cursor, info = carry
    return lax.cond(
        _is_running(limit, cursor), lambda: _attempt(problem, key, cursor), lambda: (cursor, info)
    )


def _block(problem, key, limit, thin, cursor):
    """Take ``thin`` steps; return the cursor, the record, its row, and whether all of the steps were taken."""
    row = cursor.step // thin
    info = jax.tree.map(_zeros_like, _call.eval_shape(problem.step, key, cursor.state)[1])
    cursor, info = lax.fori_loop(0, thin, partial(_guarded, problem, key, limit), (cursor, info))
    return cursor, _call(problem.collect, cursor.state, info), row, cursor.step == (row + 1) * thin


def _first_non_finite_leaf(old, new):
    """Return the index of the first leaf with a new non-finite entry, -1 if there is none."""
    pairs = zip(leaves_with_path(new), jax.tree.leaves(old), strict=True)
    bad = [_became_non_finite(path, before, leaf) for (path, leaf), before in pairs]
    if not bad:
        return jnp.int32(-1)
    flags = jnp.stack(bad)
    return jnp.where(jnp.any(flags), jnp.argmax(flags).astype(jnp.int32), jnp.int32(-1))


def _became_non_finite(path, old, new):
    """Find a NaN or a new infinity; minus infinity is legal in a log quantity (an attribute named ``log...``)."""
    if not jnp.issubdtype(new.dtype, jnp.inexact):
        return jnp.array(False)
    infinite = jnp.isinf(new) & ~jnp.isinf(old)
    is_log = any(getattr(part, "name", "").startswith("log") for part in path)
    if is_log and jnp.issubdtype(new.dtype, jnp.floating):
        infinite &= new > 0
    return jnp.any(jnp.isnan(new) | infinite)


# Three ways to drive the steps.


def scan(problem, key, cursor, empty, num_steps, thin):
    """Take all steps in a scan, which jit, vmap and grad can trace."""
    block = partial(_scan_block, problem, key, empty, num_steps, thin)
    cursor, records = lax.scan(block, jax.tree.map(jnp.asarray, cursor), length=num_steps // thin)
    if num_steps % thin:
        cursor = _block(problem, key, num_steps, num_steps % thin, cursor)[0]
    return cursor, records


def _scan_block(problem, key, empty, num_steps, thin, cursor, _):
    cursor, record, _, complete = _block(problem, key, num_steps, thin, cursor)
    unfilled = jax.tree.map(_empty_record, empty)
    return cursor, select(complete, record, unfilled)


@partial(jax.jit, static_argnames="thin", donate_argnames="records")
def advance(problem, key, cursor, records, limit, thin):
    """Step until ``limit``, the stopping rule or a non-finite state; ``limit`` is data, so chunks share a program."""
    return lax.while_loop(
        lambda carry: _is_running(limit, carry[0]),
        partial(_write_block, problem, key, limit, thin),
        (cursor, records),
    )


def _write_block(problem, key, limit, thin, carry):
    cursor, records = carry
    cursor, record, row, complete = _block(problem, key, limit, thin, cursor)
    return cursor, jax.tree.map(partial(_write, row, complete), records, record)


def _write(row, complete, buffer, value):
    """Write a complete record to its row; an incomplete one has no row, so the buffer stays as it is."""
    if not buffer.shape[0]:
        return buffer
    before = lax.dynamic_index_in_dim(buffer, row, keepdims=False)
    return lax.dynamic_update_index_in_dim(buffer, jnp.where(complete, value, before), row, 0)


def advance_in_chunks(problem, key, cursor, records, num_steps, thin, progress, checkpoint):
    """Call ``advance`` until the run ends, with pauses for checkpoints, the progress bar and Ctrl-C.

    Returns the cursor, the records, and whether Ctrl-C was pressed.
    """
    row = saved = 0  # records and steps that are in checkpoints already
    with contextlib.ExitStack() as stack:
        store = None
        if checkpoint is not None:
            about = describe(key, problem, cursor.state, num_steps, thin)
            store = stack.enter_context(checkpoints.claimed(checkpoint, about))
            cursor, records, row = checkpoints.resume(store, cursor, records, thin)
            saved = int(cursor.step)
        every = num_steps if checkpoint is None else -(-checkpoint.steps // thin) * thin
        seconds = _SECONDS_PER_UPDATE if bars.is_on(progress) else _SECONDS_UNSEEN
        bar = stack.enter_context(bars.task("run", num_steps, progress))
        bar.update(saved)
        stop = stack.enter_context(interrupts.deferred())
        chunk = thin  # the first chunk is short: how long a step takes is not known yet
        while _is_running_on_host(num_steps, cursor) and not stop.requested:
            limit = min(int(cursor.step) + chunk, saved + every, num_steps)
            started = time.perf_counter()
            cursor, records = interrupts.wait(advance(problem, key, cursor, records, np.int32(limit), thin))
            step = int(cursor.step)
            bar.update(step)
            chunk = _next_chunk(chunk, time.perf_counter() - started, seconds, thin)
            due = step == saved + every or (stop.requested and step > saved)
            if store is not None and (due or not _is_running_on_host(num_steps, cursor)):
                checkpoints.append(store, step, cursor, records, (row, step // thin))
                row, saved = step // thin, step
        return cursor, records, stop.requested


def _is_running_on_host(num_steps, cursor) -> bool:
    """Evaluate ``_is_running`` on the host, so that nothing is compiled for it."""
    step, status, done = jax.device_get((cursor.step, cursor.status, cursor.done))
    return bool(step < num_steps and status == Status.OK and not done)


def _next_chunk(chunk: int, elapsed: float, seconds: float, thin: int) -> int:
    """Return the size of the next chunk, so that one takes about ``seconds``; it grows fourfold at most."""
    target = chunk * seconds / max(elapsed, 1e-9)
    return max(int(min(target, 4 * chunk)) // thin, 1) * thin


def shape_of_record(problem, key, state, stop_fn):
    """Return the shapes of one record; refuse a step that changes the structure, shapes or dtypes of the state."""
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
    """Return empty buffers for ``num_records`` records."""
    leaves, structure = jax.tree.flatten(empty)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return jax.tree.unflatten(structure, _buffers(shapes, num_records))


@partial(jax.jit, static_argnums=(0, 1))
def _buffers(shapes, num_records):
    return [_empty_record(jax.ShapeDtypeStruct((num_records, *shape), dtype)) for shape, dtype in shapes]


def _empty_record(shape):
    """Return an array of NaN, or of zeros if the dtype has no NaN."""
    inexact = jnp.issubdtype(shape.dtype, jnp.inexact)
    return jnp.full(shape.shape, jnp.nan, shape.dtype) if inexact else _zeros_like(shape)


def _zeros_like(shape):
    return jnp.zeros(shape.shape, shape.dtype)


def leaves_with_path(tree):
    """Return the pairs (path, leaf) of a tree."""
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def leaf_name(path):
    """Write a path as text: ``state.position['x']``."""
    return "state" + jax.tree_util.keystr(path)
