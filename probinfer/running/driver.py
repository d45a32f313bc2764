"""Run any algorithm for a number of steps, or until a rule is met.

Outside jit the loop is one compiled program, "advance to step n", whose arguments are the algorithm, the state and n.
Chunks of any length, for progress, checkpoints and Ctrl-C, are calls of that program. Under jit, vmap or grad the loop
is a scan. Step i uses ``fold_in(key, i)`` whatever the chunks are. With JAX's default generator this equals
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
from probinfer.core.arguments import check_key
from probinfer.core.errors import shortened
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

    It works under jit, vmap and grad if ``progress`` and ``checkpoint`` are off. The algorithm is an argument of the
    compiled loop, so the same step function with new data of the same shapes traces nothing.

    A step that puts a NaN into the state, or an infinity into an entry that was finite, ends the run. The state before
    that step is returned, and the history says what happened (``history.status``, ``.message()``, ``.check()``). Minus
    infinity is legal in an entry that an attribute named ``log...`` leads to (``log_weights``, ``logdensity``).
    Ctrl-C ends the run between two steps: its status is ``INTERRUPTED``, and the records so far are returned. A second
    Ctrl-C raises ``KeyboardInterrupt`` at once.

    Args:
        key: one key; each step derives its own from it.
        algorithm: an ``Algorithm`` or a blackjax ``SamplingAlgorithm``: anything whose ``step(key, state)``
            returns a new state of the same structure, shapes and dtypes, and an info.
        state: where to start, usually ``algorithm.init(position)``.
        num_steps: number of steps.
        progress: show a bar (``None``: if the error stream is a terminal); a text is its label.
        thin: record every ``thin``-th step.
        collect: ``collect(state, info) -> record``, a pytree; default ``(state, info)``. Like the step and a stopping
            rule it is compared by what it depends on, so a function that is defined again shares the compiled program.
        checkpoint: where to keep checkpoints. The same call made again continues from the last one and returns the
            same draws.

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
    buffer_steps: int | None = None,
) -> tuple[Any, History]:
    """Iterate like ``run`` until ``stop_fn(state, info)`` holds after a step.

    Args:
        key: one key; each step derives its own from it.
        algorithm: as in ``run``.
        state: where to start.
        stop_fn: ``stop_fn(state, info) -> bool``, a scalar; asked after each step.
        max_steps: the run ends after this number of steps with the status ``MAX_ITERATIONS`` if the rule is not met.
        progress: as in ``run``.
        thin: as in ``run``.
        collect: as in ``run``. Memory for ``max_steps // thin`` records is allocated, so use ``record_nothing`` or
            ``thin`` if ``max_steps`` is a generous bound.
        checkpoint: as in ``run``.
        buffer_steps: number of steps for whose records memory is allocated; ``max_steps`` (the default) or more.
            Calls with the same ``buffer_steps`` share one compiled program, whatever their ``max_steps``.

    Returns:
        The last finite state and the ``History``: ``history.num_steps`` steps were taken, ``history.filled()`` are
        their records.

    Raises:
        TypeError: as in ``run``; ``stop_fn`` does not return a boolean scalar.
        ValueError: as in ``run``.
    """
    return _run(key, algorithm, state, stop_fn, max_steps, progress, thin, collect, checkpoint, buffer_steps)


def record_nothing(state: Any, info: Any) -> tuple[()]:
    """Record nothing: a ``collect`` for runs of which only the last state matters."""
    return ()


def _run(key, algorithm, state, stop_fn, num_steps, progress, thin, collect, checkpoint, buffer_steps):
    """Check the arguments and choose the driver: a scan or one call for traced arguments, else chunks."""
    _check_arguments(key, algorithm, num_steps, thin)
    Checkpoint.check(checkpoint)
    state = jax.tree.map(_as_strong_array, state)
    problem = Problem(
        as_partial(algorithm.step), as_partial(stop_fn or _never_stop), as_partial(collect or _record_both)
    )
    empty = shape_of_record(problem, key, state, stop_fn)
    # NumPy scalars, so that no program is compiled to make them.
    cursor = Cursor(
        step=np.int32(0), state=state, status=np.int32(Status.OK), bad_leaf=np.int32(-1), done=np.bool_(False)
    )
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((key, problem, state)))
    if traced and (progress or checkpoint is not None):
        raise ValueError(
            "progress and checkpoint work outside jit and vmap only; switch them off, or call run outside"
        )
    interrupted = False
    if traced and stop_fn is None:
        cursor, records = scan(problem, key, cursor, empty, num_steps, thin)
    else:
        buffers = allocate(
            empty, (num_steps if buffer_steps is None else max(buffer_steps, num_steps)) // thin
        )
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
    history = History(
        records=records,
        num_steps=cursor.step,
        status=status,
        bad_leaf=cursor.bad_leaf,
        leaf_names=names,
        thin=thin,
    )
    return cursor.state, history


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


def _as_strong_array(leaf):
    array = jnp.asarray(leaf)
    return lax.convert_element_type(array, array.dtype) if array.aval.weak_type else array


def _never_stop(state, info):
    return jnp.array(False)


def _record_both(state, info):
    return state, info
