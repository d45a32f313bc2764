"""One posterior for each of many data sets, in one compiled program.

``infer_fn(key, x)`` is a pure function from a key and one data set to draws. It is compiled once for a chunk of data
sets; chunks follow one another, each is written to disk when it is done, and a killed run continues with the first
chunk that is missing. Data sets whose inference failed keep their place, a status and a reason: leaving them out
would hide the very posteriors that a check is after.

Within a chunk the data sets come one after another (``"map"``: a loop whose body is the same program for every chunk
size, so results are equal bit by bit), side by side (``"vmap"``: every data set costs as much as the dearest of its
chunk, so it is for inference of fixed cost), or queue for a fixed number of lanes (``"queue"``: for inference that can
be run in steps, :class:`probinfer.running.many.lanes.Stepwise`; a lane that has finished takes the next data set, so
that the cost is that of the mean data set; side by side, each data set has a lane). All modes give data set s the key
s.

``"auto"`` is ``"queue"`` for inference in steps and else ``"vmap"`` on accelerators. On a CPU it is ``"map"`` where
``infer_fn``, or its step, has dense factorisations or loops of a length that depends on the data (optimisers with
a stopping rule), which gain nothing from being batched there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from probinfer.core.algorithms import as_partial
from probinfer.core.errors import shortened, warn_interrupted
from probinfer.core.identity import notice
from probinfer.core.types import ArrayTree
from probinfer.running import interrupts
from probinfer.running import progress as bars
from probinfer.running.fingerprint import digest
from probinfer.running.many.lanes import Stepwise, run_lanes
from probinfer.running.many.posteriors import ManyPosteriors, accounts, status_of
from probinfer.running.store import Store, opened
from probinfer.targets.transforms import leaf_names

__all__ = ["ManyPosteriors", "batches_well", "run_many"]

_MODES = ("auto", "map", "vmap", "queue")
_CHUNK = 100
_LANES = 64
_TURNS = 16  # data sets a lane in a chunk of a queue: while the last ones run out, lanes stand idle
_NOT_BATCHED = {"while", "cholesky", "eigh", "eig", "lu", "qr", "svd", "schur", "triangular_solve", "geqrf"}


def run_many(
    infer_fn: Callable,
    keys: Any,
    data: ArrayTree,
    *,
    mode: str = "auto",
    chunk: int | None = None,
    lanes: int | None = None,
    path: str | os.PathLike | None = None,
    progress: bool | str | None = None,
) -> ManyPosteriors:
    """Infer from every data set with a key of its own.

    Args:
        infer_fn: pure function ``(key, x)`` of one data set -> draws with leaves (L, ...), or a tuple
            ``(draws, info)``. A plain tuple of two is always taken for the latter. ``info`` is any tree of arrays, best
            a NamedTuple; of its fields ``status``, ``num_gradients`` (or its like), ``diverging`` and ``ess`` are
            understood. A function defined once is compiled once. A queue needs a ``Stepwise`` one, for example
            ``mcmc.posterior_sampler(..., algorithm="nuts")``.
        keys: typed keys (S,), for example ``jax.random.split(key, S)``.
        data: tree with leaves (S, ...); None where ``infer_fn`` needs no data.
        mode: "map", "vmap", "queue" or "auto", see the module.
        chunk: the most data sets in a chunk, default 100, or 16 a lane in a queue. Chunks are made of equal size, the
            last one filled up.
        lanes: data sets in work at the same time in a queue, default 64.
        path: folder for the finished chunks; the same call made again continues there, or returns what is there.
        progress: a bar; None means on a terminal.

    Returns:
        Draws, info and accounts of all data sets; after Ctrl-C, of those that were finished, the first ones. With
        ``mode="map"`` they are equal bit by bit for all chunk sizes; in every mode a resumed run equals an
        uninterrupted one. In a queue a data set may land in another lane when chunks or lanes are others, which changes
        what rounding makes of it at most.

    Raises:
        TypeError: ``infer_fn`` is no function, cannot be run in steps though ``mode="queue"``, or returns something
            else than arrays, or ``keys`` are no typed keys.
        ValueError: no keys, data of another number, an unknown mode, a chunk or lanes below 1, draws without a leading
            axis, or a path with another run in it.
        DamagedFileError: a file in the folder is damaged.
        RuntimeError: another process works in the folder.
        KeyboardInterrupt: Ctrl-C before the first chunk was finished, or twice; finished chunks are in the folder.

    Warns:
        ConvergenceWarning: Ctrl-C ended the work early.
    """
    keys = _checked(infer_fn, keys, data, mode)
    host = jax.tree.map(np.asarray, data)
    one = (keys[0], jax.tree.map(lambda leaf: leaf[0], host))
    notice(infer_fn)
    infer_fn = infer_fn if _is_stepwise(infer_fn) else as_partial(infer_fn)  # read once
    shapes = _shapes(as_partial(infer_fn), one)
    chosen = _choose(mode, infer_fn, one)
    num_lanes = _count("lanes", lanes, _LANES)
    size = _count("chunk", chunk, _TURNS * num_lanes if chosen == "queue" else _CHUNK)
    size = -(-len(keys) // -(-len(keys) // size))
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
        "chunk": size,
    }
    about |= {"lanes": num_lanes} if chosen == "queue" else {}
    compute = partial(_chunk, program, fn, keys, host, size)
    with contextlib.nullcontext() if path is None else opened(path, about) as store:
        parts = _finished(store, spans, shapes, compute, chosen == "map", progress)
    leaves = [np.concatenate(column) for column in zip(*parts, strict=True)]
    draws, info = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    missing = len(keys) - len(leaves[0])
    if missing:
        warn_interrupted(f"run_many: {len(keys) - missing} of {len(keys)} data sets were finished")
    return ManyPosteriors(draws, info, status_of(draws, info), *accounts(info), chosen, missing)


def _finished(
    store: Store | None,
    spans: list[tuple[int, int]],
    shapes: Any,
    compute: Callable,
    piecewise: bool,
    progress: bool | str | None,
) -> list[list[np.ndarray]]:
    """The leaves of each chunk, read or computed; those before Ctrl-C, the last of which may be a part of its chunk.

    Raises:
        KeyboardInterrupt: there are none.
    """
    parts: list = []
    there = set() if store is None else set(store.names())
    pace = interrupts.Pace(1 if piecewise else spans[0][1])
    with bars.task("data sets", spans[-1][1], progress) as bar, interrupts.deferred() as stop:
        for number, (start, end) in enumerate(spans):
            name = f"chunk_{number:06d}"
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
        raise interrupts.Interrupted("no chunk of data sets was finished; take a smaller chunk=")
    return parts


# What is asked


def _checked(infer_fn: Any, keys: Any, data: Any, mode: Any) -> Any:
    """The keys."""
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
    if mode not in _MODES:
        raise ValueError(f"mode must be 'auto', 'map', 'vmap' or 'queue', got {shortened(mode)}")
    if mode == "queue" and not _is_stepwise(infer_fn):
        raise TypeError(
            "mode='queue' needs an infer_fn that can be run in steps: a registered class with init, step, done and "
            "finish (probinfer.running.many.lanes.Stepwise), such as mcmc.posterior_sampler(..., algorithm='nuts'); "
            "got "
            f"{shortened(infer_fn)}, for which there are 'map' and 'vmap'"
        )
    return keys


def _check_numbers(name: str, leaf: Any) -> None:
    """Refuse what JAX has no array for: objects, such as data sets of different sizes, and texts."""
    kind = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if isinstance(kind, np.dtype) and (kind.kind in "OSUMm" or kind.names):
        raise TypeError(
            f"data must be arrays of numbers, '{name}' holds {kind}: stack the data sets into leaves (S, ...); where "
            "their sizes differ, pad them to one shape and add a mask"
        )


def _count(name: str, value: Any, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a whole number of data sets, 1 or more, got {shortened(value)}")
    return int(value)


def _is_stepwise(infer_fn: Any) -> bool:
    return isinstance(infer_fn, Stepwise) and not jax.tree_util.all_leaves([infer_fn])


def _split(result: Any) -> tuple[Any, Any]:
    """Draws and info of what ``infer_fn`` returned."""
    return result if type(result) is tuple and len(result) == 2 else (result, None)


def _call(fn: Callable, key: Any, x: Any) -> tuple[Any, Any]:
    return _split(fn(key, x))


def _shapes(fn: Callable, one: tuple) -> Any:
    """Shapes and dtypes of (draws, info) of one data set."""
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
    """Say whether many calls gain from being made side by side on this device.

    Args:
        fn: function of one data set, particle or draw.
        *args: its arguments, or their shapes.

    Returns:
        True on accelerators. On a CPU: False where ``fn`` has dense factorisations or loops of unknown length.
    """
    if jax.default_backend() != "cpu":
        return True
    return not _NOT_BATCHED & _primitives(jax.make_jaxpr(fn)(*args).jaxpr)


def _program(mode: str, infer_fn: Any, num_lanes: int) -> tuple[Callable, Any]:
    """What runs a chunk, and its first argument."""
    if mode != "map" and _is_stepwise(infer_fn):
        return partial(_in_a_queue, num_lanes), infer_fn
    return _one_by_one if mode == "map" else _side_by_side, as_partial(infer_fn)


def _primitives(jaxpr: Any) -> set[str]:
    """Names of all primitives, those of inner programs included."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                names |= _primitives(getattr(inner, "jaxpr", inner))
    return names


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


# What is computed


def _chunk(
    program: Callable, fn: Any, keys: Any, host: Any, size: int, span: tuple[int, int]
) -> list[np.ndarray]:
    """The leaves of (draws, info) of the data sets start ... stop - 1."""
    start, stop = span
    rows = np.minimum(np.arange(start, start + size), stop - 1)
    raw = np.asarray(jax.random.key_data(keys))[rows]
    some = jax.random.wrap_key_data(jnp.asarray(raw), impl=jax.random.key_impl(keys))
    done = program(fn, some, jax.tree.map(lambda leaf: leaf[rows], host), np.int32(stop - start))
    return [np.asarray(leaf)[: stop - start] for leaf in jax.tree.leaves(interrupts.wait(done))]


@jax.jit
def _one_by_one(fn: Callable, keys: Any, data: Any, num: Any) -> Any:
    """The first ``num`` data sets; a length that is data keeps the body apart from the size of the chunk."""

    def body(i, results):
        one = lax.optimization_barrier(jax.tree.map(lambda leaf: leaf[i], data))
        result = lax.optimization_barrier(_call(fn, keys[i], one))
        return jax.tree.map(lambda all_, new: all_.at[i].set(new), results, result)

    like = jax.eval_shape(_call, fn, keys[0], jax.tree.map(lambda leaf: leaf[0], data))
    empty = jax.tree.map(lambda leaf: jnp.zeros((len(keys), *leaf.shape), leaf.dtype), like)
    return lax.fori_loop(0, num, body, empty)


@jax.jit
def _side_by_side(fn: Callable, keys: Any, data: Any, num: Any) -> Any:
    del num
    return jax.vmap(partial(_call, fn))(keys, data)


def _in_a_queue(num_lanes: int, steps: Any, keys: Any, data: Any, num: Any) -> Any:
    return run_lanes(_finish, steps, keys, data, num, num_lanes)


def _finish(steps: Any, state: Any) -> tuple[Any, Any]:
    return _split(steps.finish(state))
