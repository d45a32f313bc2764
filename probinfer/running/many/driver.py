"""One posterior for each of many data sets, in one compiled program.

``infer_fn(key, x)`` is a pure function from a key and one data set to draws. It is compiled once for a batch of data
sets. Batches follow one another; each is written to the checkpoint when it is done, and a killed run continues with the
first batch that is missing. A data set whose inference failed keeps its place, with a status and a reason: leaving it
out would hide the very posteriors that a check is meant to find.

There are three modes for the data sets of a batch:

- ``"map"``: one after another, in a loop whose body is the same program for every batch size, so that results are equal
  bit by bit.
- ``"vmap"``: side by side. Every data set costs as much as the most expensive of its batch, so this mode is for
  inference of fixed cost.
- ``"queue"``: a fixed number of lanes, for inference that can be run in steps
  (:class:`probinfer.running.many.lanes.Stepwise`). A lane that has finished takes the next data set, so that the cost
  is that of the mean data set.

``"auto"`` chooses ``"queue"`` for inference in steps and else ``"vmap"`` on accelerators. On a CPU it chooses ``"map"``
if ``infer_fn``, or its step, has dense factorizations or loops of a length that depends on the data (optimizers with a
stopping rule), which gain nothing from being batched there. All modes give data set s the key s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from probinfer.core.algorithms import as_partial
from probinfer.core.arguments import check_count, check_mode
from probinfer.core.errors import shortened, warn_interrupted
from probinfer.core.identity import refresh_classes
from probinfer.core.types import ArrayTree
from probinfer.running import interrupts
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.fingerprint import digest
from probinfer.running.many.lanes import Stepwise, run_lanes
from probinfer.running.many.posteriors import ManyPosteriors, costs_of, status_of
from probinfer.running.store import Store, opened
from probinfer.targets.transforms import leaf_names

__all__ = ["ManyPosteriors", "batches_well", "run_many"]

_MODES = ("auto", "map", "vmap", "queue")
_BATCH_SIZE = 100
_NUM_LANES = 64
_DATA_SETS_PER_LANE = (
    16  # data sets a lane in a chunk of a queue: while the last ones run out, lanes stand idle
)
_NOT_BATCHED = {"while", "cholesky", "eigh", "eig", "lu", "qr", "svd", "schur", "triangular_solve", "geqrf"}


def run_many(
    infer_fn: Callable,
    keys: Any,
    data: ArrayTree,
    *,
    mode: str = "auto",
    batch_size: int | None = None,
    num_lanes: int | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool | str | None = None,
) -> ManyPosteriors:
    """Infer from every data set with a key of its own.

    Args:
        infer_fn: pure function ``(key, x)`` of one data set -> draws with leaves (L, ...), or a tuple
            ``(draws, info)``; a plain tuple of two is always read as the latter. ``info`` is any tree of arrays,
            preferably a NamedTuple; its fields ``status``, ``num_gradients`` (or a similar count), ``diverging`` and
            ``ess`` are understood. A function defined once is compiled once. The mode "queue" needs a ``Stepwise`` one,
            for example ``mcmc.posterior_sampler(..., algorithm="nuts")``.
        keys: typed keys (S,), for example ``jax.random.split(key, S)``.
        data: tree with leaves (S, ...); None if ``infer_fn`` needs no data.
        mode: "map", "vmap", "queue" or "auto", see the module.
        batch_size: the largest number of data sets that are done together; default 100, or 16 for each lane of a queue.
            Batches have equal sizes, the last one is padded.
        num_lanes: number of lanes of a queue, default 64.
        checkpoint: where to keep finished batches, at most ``checkpoint.every`` data sets each. The same call made
            again continues there, or returns the finished result.
        progress: show a bar; None: if the error stream is a terminal.

    Returns:
        Draws, info and costs of all data sets; after Ctrl-C, of the first ones, which were finished. With
        ``mode="map"`` they are equal bit by bit for all batch sizes; in every mode a resumed run equals an
        uninterrupted one. With another number of lanes or batch size a data set may be done in another lane of a queue,
        which changes its draws by rounding at most.

    Raises:
        TypeError: ``infer_fn`` is not a function, cannot be run in steps although ``mode="queue"``, or returns
            something other than arrays; ``keys`` are not typed keys; a count is not an integer.
        ValueError: no keys, data with another leading axis, an unknown mode, a count below 1, draws without a leading
            axis, or a checkpoint of another run.
        DamagedFileError: a file of the checkpoint is damaged.
        RuntimeError: another process works in the folder of the checkpoint.
        KeyboardInterrupt: Ctrl-C before the first batch was finished, or twice; finished batches are in the checkpoint.

    Warns:
        ConvergenceWarning: Ctrl-C ended the work early.
    """
    _check_arguments(infer_fn, keys, data, mode)
    Checkpoint.check(checkpoint)
    host = jax.tree.map(np.asarray, data)
    one = (keys[0], jax.tree.map(lambda leaf: leaf[0], host))
    refresh_classes(infer_fn)
    infer_fn = infer_fn if _is_stepwise(infer_fn) else as_partial(infer_fn)  # read once
    shapes = _shapes(as_partial(infer_fn), one)
    chosen = _choose(mode, infer_fn, one)
    num_lanes = _NUM_LANES if num_lanes is None else check_count("num_lanes", num_lanes)
    size = _DATA_SETS_PER_LANE * num_lanes if chosen == "queue" else _BATCH_SIZE
    size = size if batch_size is None else check_count("batch_size", batch_size)
    if checkpoint is not None and checkpoint.every is not None:
        size = min(size, checkpoint.every)
    size = -(-len(keys) // -(-len(keys) // size))  # batches of equal size
    spans = [(start, min(start + size, len(keys))) for start in range(0, len(keys), size)]
    num_lanes = size if chosen == "vmap" else min(num_lanes, len(keys))
    program, fn = _program(chosen, infer_fn, num_lanes)
    about = {
        "kind": "run_many",
        "infer_fn": digest(fn),
        "keys": digest(keys),
        "data": digest(host),
        "data sets": len(keys),
        "results": [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(shapes)],
        "mode": chosen,
        "batch size": size,
    }
    about |= {"lanes": num_lanes} if chosen == "queue" else {}
    compute = partial(_compute_batch, program, fn, keys, host, size)
    with contextlib.nullcontext() if checkpoint is None else opened(checkpoint.path, about) as store:
        parts = _batches(store, spans, shapes, compute, chosen == "map", progress)
    leaves = [np.concatenate(column) for column in zip(*parts, strict=True)]
    draws, info = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    missing = len(keys) - len(leaves[0])
    if missing:
        warn_interrupted(f"run_many: {len(keys) - missing} of {len(keys)} data sets were finished")
    work, divergences, ess = costs_of(info)
    return ManyPosteriors(
        draws=draws,
        info=info,
        status=status_of(draws, info),
        work=work,
        divergences=divergences,
        ess=ess,
        mode=chosen,
        num_missing=missing,
    )


def _batches(
    store: Store | None,
    spans: list[tuple[int, int]],
    shapes: Any,
    compute: Callable,
    piecewise: bool,
    progress: bool | str | None,
) -> list[list[np.ndarray]]:
    """Return the leaves of each batch, read or computed; after Ctrl-C the last one may be a part of its batch.

    Raises:
        KeyboardInterrupt: no batch was begun.
    """
    parts: list = []
    there = set() if store is None else set(store.names())
    pace = interrupts.Pace(1 if piecewise else spans[0][1])
    with bars.task("data sets", spans[-1][1], progress) as bar, interrupts.deferred() as stop:
        for number, (start, end) in enumerate(spans):
            name = f"batch_{number:06d}"
            if store is not None and name in there:
                like = [
                    jax.ShapeDtypeStruct((end - start, *leaf.shape), leaf.dtype)
                    for leaf in jax.tree.leaves(shapes)
                ]
                parts.append(store.read(name, like, "delete it, and it is computed again"))
                continue
            pieces: list = []
            while start < end and not stop.requested:
                taken = min(pace.size, end - start) if piecewise else end - start
                with pace.measured(taken):
                    pieces.append(compute((start, start + taken)))
                start += taken
                bar.update(start)
            if pieces:
                parts.append([np.concatenate(column) for column in zip(*pieces, strict=True)])
            if start < end:
                break
            if store is not None:
                store.write(name, parts[-1])
    if not parts:
        raise interrupts.Interrupted("no batch of data sets was finished; take a smaller batch_size=")
    return parts


# Arguments and the choice of the mode.


def _check_arguments(infer_fn: Any, keys: Any, data: Any, mode: Any) -> None:
    if not callable(infer_fn):
        raise TypeError(f"infer_fn must be a function (key, x) -> draws, got {shortened(infer_fn)}")
    dtype = getattr(keys, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key) or jnp.ndim(keys) != 1:
        raise TypeError(
            f"keys must be one typed key a data set, from jax.random.split(key, S); got {shortened(keys)}"
        )
    num = len(keys)
    if num == 0:
        raise ValueError("there are no data sets: keys is empty")
    for name, leaf in zip(leaf_names(data), jax.tree.leaves(data), strict=True):
        _check_numbers(name, leaf)
        if np.shape(leaf)[:1] != (num,):
            raise ValueError(
                f"data must have leaves (S, ...) with S = {num}, the number of keys; '{name}' is {np.shape(leaf)}"
            )
    check_mode(mode, _MODES)
    if mode == "queue" and not _is_stepwise(infer_fn):
        raise TypeError(
            "mode='queue' needs an infer_fn that can be run in steps: a registered class with init, step, done and "
            "finish (probinfer.running.many.lanes.Stepwise), such as mcmc.posterior_sampler(..., algorithm='nuts'); "
            f"use 'map' or 'vmap' for {shortened(infer_fn)}"
        )


def _check_numbers(name: str, leaf: Any) -> None:
    """Refuse what is not an array of numbers: texts, or objects such as data sets of different sizes."""
    kind = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if isinstance(kind, np.dtype) and (kind.kind in "OSUMm" or kind.names):
        raise TypeError(
            f"data must be arrays of numbers, '{name}' holds {kind}: stack the data sets into leaves (S, ...); where "
            "their sizes differ, pad them to one shape and add a mask"
        )


def _is_stepwise(infer_fn: Any) -> bool:
    return isinstance(infer_fn, Stepwise) and not jax.tree_util.all_leaves([infer_fn])


def _split(result: Any) -> tuple[Any, Any]:
    """Return draws and info of what ``infer_fn`` returned."""
    return result if type(result) is tuple and len(result) == 2 else (result, None)


def _call(fn: Callable, key: Any, x: Any) -> tuple[Any, Any]:
    return _split(fn(key, x))


def _shapes(fn: Callable, one: tuple) -> Any:
    """Return the shapes and dtypes of (draws, info) of one data set."""
    shapes = jax.eval_shape(_call, fn, *one)
    leaves = jax.tree.leaves(shapes[0])
    if not leaves or any(not leaf.shape for leaf in leaves):
        raise ValueError(
            f"infer_fn must return draws with leaves (L, ...), got {shortened(shapes[0])}; a single draw needs an axis "
            "of length one"
        )
    for leaf in jax.tree.leaves(shapes):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError("infer_fn must return arrays of numbers, not random keys")
    return shapes


def _choose(mode: str, infer_fn: Any, one: tuple) -> str:
    if mode != "auto":
        return mode
    batched = "queue" if _is_stepwise(infer_fn) else "vmap"
    if jax.default_backend() != "cpu":
        return batched
    if batched == "queue":
        well = batches_well(infer_fn.step, jax.eval_shape(infer_fn.init, *one))
    else:
        well = batches_well(partial(_call, infer_fn), *one)
    return batched if well else "map"


def batches_well(fn: Callable, *args: Any) -> bool:
    """Return whether many calls gain from being made side by side on this device.

    Args:
        fn: function of one data set, particle or draw.
        *args: its arguments, or their shapes.

    Returns:
        True on accelerators. On a CPU: False if ``fn`` has dense factorizations or loops of unknown length.
    """
    if jax.default_backend() != "cpu":
        return True
    return not _NOT_BATCHED & _primitives(jax.make_jaxpr(fn)(*args).jaxpr)


def _program(mode: str, infer_fn: Any, num_lanes: int) -> tuple[Callable, Any]:
    """Return the function that runs a batch, and its first argument."""
    if mode != "map" and _is_stepwise(infer_fn):
        return partial(_queue, num_lanes), infer_fn
    return _map if mode == "map" else _vmap, as_partial(infer_fn)


def _primitives(jaxpr: Any) -> set[str]:
    """Return the names of all primitives, including those of inner programs."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                names |= _primitives(getattr(inner, "jaxpr", inner))
    return names


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


# One batch.


def _compute_batch(
    program: Callable, fn: Any, keys: Any, host: Any, size: int, span: tuple[int, int]
) -> list[np.ndarray]:
    """Return the leaves of (draws, info) of the data sets start ... stop - 1."""
    start, stop = span
    rows = np.minimum(np.arange(start, start + size), stop - 1)  # a short batch repeats its last data set
    raw = np.asarray(jax.random.key_data(keys))[rows]
    some = jax.random.wrap_key_data(jnp.asarray(raw), impl=jax.random.key_impl(keys))
    done = program(fn, some, jax.tree.map(lambda leaf: leaf[rows], host), np.int32(stop - start))
    return [np.asarray(leaf)[: stop - start] for leaf in jax.tree.leaves(interrupts.wait(done))]


@jax.jit
def _map(fn: Callable, keys: Any, data: Any, num: Any) -> Any:
    """Do the first ``num`` data sets in a loop.

    The length is data and the barriers keep XLA from fusing across iterations, so that the body is the same program
    for every batch size, and results are equal bit by bit.
    """

    def body(i, results):
        one = lax.optimization_barrier(jax.tree.map(lambda leaf: leaf[i], data))
        result = lax.optimization_barrier(_call(fn, keys[i], one))
        return jax.tree.map(lambda all_, new: all_.at[i].set(new), results, result)

    like = jax.eval_shape(_call, fn, keys[0], jax.tree.map(lambda leaf: leaf[0], data))
    empty = jax.tree.map(lambda leaf: jnp.zeros((len(keys), *leaf.shape), leaf.dtype), like)
    return lax.fori_loop(0, num, body, empty)


@jax.jit
def _vmap(fn: Callable, keys: Any, data: Any, num: Any) -> Any:
    del num
    return jax.vmap(partial(_call, fn))(keys, data)


def _queue(num_lanes: int, steps: Any, keys: Any, data: Any, num: Any) -> Any:
    return run_lanes(_finish, steps, keys, data, num, num_lanes)


def _finish(steps: Any, state: Any) -> tuple[Any, Any]:
    return _split(steps.finish(state))
