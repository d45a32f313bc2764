"""The loop: steps of any algorithm, with records, progress, checkpoints and a stop at the first non-finite state.

Outside jit the loop is one compiled program, ``advance to step n``, whose arguments are the algorithm, the state and n:
chunks of any length for progress, checkpoints and Ctrl-C are calls of the same program. Inside jit, vmap or grad it is
a scan. Step i uses ``fold_in(key, i)``, whatever the chunks; for JAX's default generator that is
``split(key, num_steps)[i]``, so blackjax's own loop makes the same draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from probinfer.core.algorithms import as_partial
from probinfer.core.errors import check_key, shortened
from probinfer.core.status import Status
from probinfer.core.types import PRNGKey
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.history import History
from probinfer.running.loop import (
    Cursor,
    Problem,
    advance,
    advance_in_chunks,
    allocate,
    leaf_name,
    leaves_with_path,
    scan,
    shape_of_record,
)

__all__ = ["record_nothing", "run", "run_until"]


def run(
    key: PRNGKey,
    algorithm: Any,
    state: Any,
    num_steps: int,
    *,
    progress: bool | str | None = False,
    thin: int = 1,
    collect: Callable | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Any, History]:
    """Iterate ``state, info = step(fold_in(key, i), state)`` for i = 0 ... num_steps - 1.

    Runs under jit, vmap and grad where ``progress`` and ``checkpoint`` are off. The algorithm is an argument of the
    compiled loop: the same step function with new data of the same shapes traces nothing.

    A step that makes a NaN anywhere in the state, or an infinity in an entry that was finite, ends the run: the state
    before it is returned and the history says what happened (``history.status``, ``.message()``, ``.check()``). Minus
    infinity is legal where an attribute on the way to the entry is named ``log...`` (``log_weights``, ``logdensity``).
    Ctrl-C ends the run between two steps, with ``INTERRUPTED`` as its status and what was recorded so far; a second
    one raises ``KeyboardInterrupt`` at once.

    Args:
        key: one key; each step derives its own from it.
        algorithm: an ``Algorithm`` or a blackjax ``SamplingAlgorithm``: anything whose ``step(key, state)``
            returns a new state of the same structure, shapes and dtypes, and an info.
        state: where to start, usually ``algorithm.init(position)``.
        num_steps: number of steps.
        progress: a bar (``None``: if the error stream is a terminal); a text names it.
        thin: record every ``thin``-th step.
        collect: ``collect(state, info) -> record``, a pytree; default ``(state, info)``. It, the step and a
            stopping rule are compared by what they depend on now: made anew they share the compiled program.
        checkpoint: where to keep checkpoints. The same call made again continues from the last one, to the same draws.

    Returns:
        The last finite state and the ``History``; with the default ``collect``, ``states, infos = history`` unpacks it.

    Raises:
        TypeError: the key is not one typed key; the algorithm has no ``step``; a step changes the structure, a shape
            or a dtype of the state.
        ValueError: ``num_steps`` is negative or ``thin`` not positive; ``progress`` or ``checkpoint`` under jit; the
            checkpoint is that of a different run.
        DamagedFileError: a file of the checkpoint is damaged.
        RuntimeError: another process works in the folder of the checkpoint.

    Examples:
        >>> import jax
        >>> from probinfer.core.algorithms import Algorithm
        >>> def double(key, state):
        ...     return 2 * state, state
        >>> state, history = run(jax.random.key(0), Algorithm(init=None, step=double), 1.0, num_steps=4)
        >>> states, infos = history
        >>> state.item(), states.tolist(), infos.tolist()
        (16.0, [2.0, 4.0, 8.0, 16.0], [1.0, 2.0, 4.0, 8.0])
    """
    return _run(key, algorithm, state, None, num_steps, progress, thin, collect, checkpoint, None)


def run_until(
    key: PRNGKey,
    algorithm: Any,
    state: Any,
    stop_fn: Callable[[Any, Any], Any],
    max_steps: int,
    *,
    progress: bool | str | None = False,
    thin: int = 1,
    collect: Callable | None = None,
    checkpoint: Checkpoint | None = None,
    room: int | None = None,
) -> tuple[Any, History]:
    """Iterate like ``run`` until ``stop_fn(state, info)`` holds after a step.

    Args:
        key: one key; each step derives its own from it.
        algorithm: as in ``run``.
        state: where to start.
        stop_fn: ``stop_fn(state, info) -> bool``, a scalar; asked after each step.
        max_steps: the run ends after so many steps with the status ``MAX_ITERATIONS`` if the rule was never met.
        progress: as in ``run``.
        thin: as in ``run``.
        collect: as in ``run``; there is room for ``max_steps // thin`` records, so use ``record_nothing`` or thin when
            ``max_steps`` is a generous bound.
        checkpoint: as in ``run``.
        room: steps for whose records there is room, ``max_steps`` or more (the default): calls with the same room share
            one compiled program, whatever their ``max_steps``.

    Returns:
        The last finite state and the ``History``: ``history.num_steps`` steps were taken, ``history.filled()`` are
        their records.

    Raises:
        TypeError: as in ``run``; ``stop_fn`` does not return a boolean scalar.
        ValueError: as in ``run``.
    """
    return _run(key, algorithm, state, stop_fn, max_steps, progress, thin, collect, checkpoint, room)


def record_nothing(state: Any, info: Any) -> tuple[()]:
    """A ``collect`` for runs of which only the last state matters."""
    return ()


def _run(key, algorithm, state, stop_fn, num_steps, progress, thin, collect, checkpoint, room):
    """Check, then pass on to the scan (traced arguments), to one call, or to chunks."""
    _check_arguments(key, algorithm, num_steps, thin)
    Checkpoint.check(checkpoint)
    state = jax.tree.map(_strong, state)
    problem = Problem(as_partial(algorithm.step), as_partial(stop_fn or _never), as_partial(collect or _both))
    empty = shape_of_record(problem, key, state, stop_fn)
    cursor = Cursor(np.int32(0), state, np.int32(Status.OK), np.int32(-1), np.bool_(False))
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((key, problem, state)))
    if traced and (progress or checkpoint is not None):
        raise ValueError(
            "progress and checkpoint work outside jit and vmap only; switch them off, or call run outside"
        )
    interrupted = False
    if traced and stop_fn is None:
        cursor, records = scan(problem, key, cursor, empty, num_steps, thin)
    else:
        buffers = allocate(empty, (num_steps if room is None else max(room, num_steps)) // thin)
        if traced:
            cursor, records = advance(problem, key, cursor, buffers, np.int32(num_steps), thin)
        else:
            cursor, records, interrupted = advance_in_chunks(
                problem, key, cursor, buffers, num_steps, thin, progress, checkpoint
            )
    status = cursor.status
    if interrupted and int(status) == Status.OK:
        status = jnp.int32(Status.INTERRUPTED)
    elif stop_fn is not None:
        status = jnp.where(cursor.done | (status != Status.OK), status, jnp.int32(Status.MAX_ITERATIONS))
    names = tuple(leaf_name(path) for path, _ in leaves_with_path(state))
    return cursor.state, History(records, cursor.step, status, cursor.bad_leaf, names, thin)


def _check_arguments(key, algorithm, num_steps, thin):
    check_key(key)
    if not callable(getattr(algorithm, "step", None)):
        raise TypeError(
            "algorithm must have a step(key, state) function, as those of probinfer and blackjax do; "
            f"got {shortened(algorithm)}"
        )
    if isinstance(num_steps, bool) or not isinstance(num_steps, (int, np.integer)):
        raise TypeError(f"num_steps must be an integer, got {shortened(num_steps)}; write int(num_steps)")
    if num_steps < 0 or thin < 1:
        raise ValueError(f"expected num_steps >= 0 and thin >= 1; got num_steps={num_steps}, thin={thin}")


def _strong(leaf):
    array = jnp.asarray(leaf)
    return lax.convert_element_type(array, array.dtype) if array.aval.weak_type else array


def _never(state, info):
    return jnp.array(False)


def _both(state, info):
    return state, info
