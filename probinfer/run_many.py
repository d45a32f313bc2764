"""One posterior for each of many data sets, in one compiled program.

``infer_fn(key, x)`` is a pure function from a key and one data set to draws. It is compiled once for a chunk of data
sets; chunks follow one another, each is written to disk when it is done, and a killed run continues with the first
chunk that is missing. Data sets whose inference failed keep their place, a status and a reason: leaving them out
would hide the very posteriors that a check is after.

Within a chunk the data sets come one after another (``"map"``: a loop whose body is the same program for every chunk
size, so results are equal bit by bit) or side by side (``"vmap"``: every data set costs as much as the dearest of its
chunk, so it is for inference of fixed cost). ``"auto"`` is ``"vmap"`` on accelerators; on a CPU it is ``"map"``
where ``infer_fn`` has loops of a length that depends on the data (NUTS, optimisers with a stopping rule) or dense
factorisations, which gain nothing from being batched there, and ``"vmap"`` otherwise. All modes give data set s
the key s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from probinfer import progress as bars
from probinfer.base import Status, as_partial
from probinfer.checkpoint import Checkpoint, claim
from probinfer.errors import advice, shortened
from probinfer.fingerprint import digest
from probinfer.transforms import leaf_names
from probinfer.types import ArrayTree

__all__ = ["ManyPosteriors", "run_many"]

_MODES = ("auto", "map", "vmap")
_CHUNK = 100
_FAILED = (
    Status.DEGENERATE_WEIGHTS
)  # from here on there are no draws to use; below, they are kept and flagged
_NOT_BATCHED = {"while", "cholesky", "eigh", "eig", "lu", "qr", "svd", "schur", "triangular_solve", "geqrf"}
_WORK = (
    "num_gradients",
    "num_leapfrogs",
    "num_integration_steps",
    "num_evaluations",
    "num_iterations",
    "num_steps",
)
_DIVERGENCES = ("num_divergences", "diverging", "is_divergent", "divergences")


class ManyPosteriors(NamedTuple):
    """The posteriors of S data sets, in their order, as arrays of the host.

    Attributes:
        draws: leaves (S, L, ...), those of failed data sets as they came.
        info: what ``infer_fn`` said beside them, leaves (S, ...); None if nothing.
        status: (S,) the worst ``Status`` of each data set; ``NON_FINITE`` where a draw is NaN or infinite.
        work: (S,) gradients, leapfrogs, evaluations or iterations, by the first such field of ``info``; or None.
        divergences: (S,) divergent transitions, or None.
        ess: (S,) the smallest of ``info.ess``, or None.
        mode: "map" or "vmap", whichever was used.
    """

    draws: Any
    info: Any
    status: np.ndarray
    work: np.ndarray | None
    divergences: np.ndarray | None
    ess: np.ndarray | None
    mode: str

    @property
    def failed(self) -> np.ndarray:
        """(S,) data sets without usable draws: non-finite, no positive definite matrix, or no weight left."""
        return self.status >= _FAILED

    @property
    def failures(self) -> tuple[tuple[str, int], ...]:
        """(reason, number of data sets) for every status that occurs but ``OK``, the most frequent first."""
        codes, counts = np.unique(self.status[self.status != Status.OK], return_counts=True)
        found = [(f"{Status(c).name}: {advice(int(c))}", int(n)) for c, n in zip(codes, counts, strict=True)]
        return tuple(sorted(found, key=lambda pair: -pair[1]))

    def __repr__(self) -> str:
        """One line: how many, how many failed, what it cost."""
        parts = [f"{len(self.status)} data sets by {self.mode}", f"{int(self.failed.sum())} failed"]
        if self.work is not None:
            parts.append(f"work {np.median(self.work):g} each (most {np.max(self.work):g})")
        if self.divergences is not None:
            parts.append(f"{int(self.divergences.sum())} divergences")
        if self.ess is not None:
            parts.append(f"ess {np.nanmedian(self.ess):.0f} each (least {np.nanmin(self.ess):.0f})")
        return f"ManyPosteriors({', '.join(parts)})"


def run_many(
    infer_fn: Callable,
    keys: Any,
    data: ArrayTree,
    *,
    mode: str = "auto",
    chunk: int | None = None,
    path: str | os.PathLike | None = None,
    progress: bool | str | None = None,
) -> ManyPosteriors:
    """Infer from every data set with a key of its own.

    Args:
        infer_fn: pure function ``(key, x)`` of one data set -> draws with leaves (L, ...), or a tuple
            ``(draws, info)``. A plain tuple of two is always taken for the latter. ``info`` is any tree of arrays, best
            a NamedTuple; of its fields ``status``, ``num_gradients`` (or its like), ``diverging`` and ``ess`` are
            understood. A function defined once is compiled once.
        keys: typed keys (S,), for example ``jax.random.split(key, S)``.
        data: tree with leaves (S, ...); None where ``infer_fn`` needs no data.
        mode: "map", "vmap" or "auto", see the module.
        chunk: the most data sets in a chunk, default 100. Chunks are made of equal size, the last one filled up.
        path: folder for the finished chunks; the same call made again continues there, or returns what is there.
        progress: a bar; None means on a terminal.

    Returns:
        Draws, info and accounts of all data sets. With ``mode="map"`` they are equal bit by bit for all chunk sizes;
        in both modes a resumed run equals an uninterrupted one.

    Raises:
        TypeError: ``infer_fn`` is no function or returns something else than arrays, or ``keys`` are no typed keys.
        ValueError: no keys, data of another number, an unknown mode, a chunk below 1, draws without a leading axis, or
            a path with another run in it.
    """
    keys, size = _checked(infer_fn, keys, data, mode, chunk)
    fn, host = as_partial(infer_fn), jax.tree.map(np.asarray, data)
    one = (keys[0], jax.tree.map(lambda leaf: leaf[0], host))
    shapes = _shapes(fn, one)
    chosen = _choose(mode, fn, one)
    spans = [(start, min(start + size, len(keys))) for start in range(0, len(keys), size)]
    folder = None if path is None else _claimed(path, fn, keys, host, shapes, chosen, size)
    parts = []
    with bars.task("data sets", len(keys), progress) as bar:
        for number, span in enumerate(spans):
            file = None if folder is None else folder / f"chunk_{number:06d}.npz"
            part = _read(file, shapes) if file is not None and file.exists() else None
            if part is None:
                part = _chunk(fn, keys, host, span, size, chosen)
                _write(file, part)
            parts.append(part)
            bar.update(span[1])
    leaves = [np.concatenate(column) for column in zip(*parts, strict=True)]
    draws, info = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return ManyPosteriors(draws, info, _status(draws, info), *_accounts(info), chosen)


# What is asked


def _checked(infer_fn: Any, keys: Any, data: Any, mode: Any, chunk: Any) -> tuple[Any, int]:
    """The keys and the size of a chunk."""
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
        if np.shape(leaf)[:1] != (num,):
            raise ValueError(
                f"data must have leaves (S, ...) with S = {num}, the number of keys; '{name}' is {np.shape(leaf)}"
            )
    if mode not in _MODES:
        raise ValueError(f"mode must be 'auto', 'map' or 'vmap', got {shortened(mode)}")
    if chunk is not None and (
        isinstance(chunk, bool) or not isinstance(chunk, (int, np.integer)) or chunk < 1
    ):
        raise ValueError(f"chunk must be a whole number of data sets, 1 or more, got {shortened(chunk)}")
    most = _CHUNK if chunk is None else int(chunk)
    return keys, -(-num // -(-num // most))


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


def _choose(mode: str, fn: Callable, one: tuple) -> str:
    if mode != "auto":
        return mode
    if jax.default_backend() != "cpu":
        return "vmap"
    return "map" if _NOT_BATCHED & _primitives(jax.make_jaxpr(_call)(fn, *one).jaxpr) else "vmap"


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
    fn: Callable, keys: Any, host: Any, span: tuple[int, int], size: int, mode: str
) -> list[np.ndarray]:
    """The leaves of (draws, info) of the data sets start ... stop - 1."""
    start, stop = span
    rows = np.minimum(np.arange(start, start + size), stop - 1)
    raw = np.asarray(jax.random.key_data(keys))[rows]
    some = jax.random.wrap_key_data(jnp.asarray(raw), impl=jax.random.key_impl(keys))
    program = _one_by_one if mode == "map" else _side_by_side
    done = program(fn, some, jax.tree.map(lambda leaf: leaf[rows], host), np.int32(stop - start))
    return [np.asarray(leaf)[: stop - start] for leaf in jax.tree.leaves(jax.device_get(done))]


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


# What is kept


def _claimed(path: Any, fn: Callable, keys: Any, host: Any, shapes: Any, mode: str, size: int) -> Path:
    """The folder, which holds this run or nothing."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "about.json").exists() and any(folder.glob("chunk_*.npz")):
        raise ValueError(f"{folder} holds chunks but no about.json; delete the folder or choose another path")
    about = {
        "kind": "run_many",
        "infer_fn": digest(fn),
        "keys": digest(keys),
        "data": digest(host),
        "data sets": len(keys),
        "results": [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(shapes)],
        "mode": mode,
        "chunk": size,
    }
    claim(Checkpoint(path), about)
    for left in folder.glob("chunk_*.npz.*"):  # of a process that was killed while it wrote
        left.unlink(missing_ok=True)
    return folder


def _write(file: Path | None, leaves: list[np.ndarray]) -> None:
    """All or nothing: under its final name a file is whole."""
    if file is None:
        return
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    with draft.open("wb") as stream:
        np.savez(stream, **{str(i): leaf for i, leaf in enumerate(leaves)})  # type: ignore[arg-type]
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)


def _read(file: Path, shapes: Any) -> list[np.ndarray]:
    """The leaves of a chunk; dtypes that the format does not know (bfloat16) are viewed as what they were."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(shapes)]
    try:
        with np.load(file) as stored:
            leaves = [stored[str(i)] for i in range(len(dtypes))]
    except Exception as error:
        raise ValueError(f"{file} cannot be read ({error}); delete it, and it is computed again") from error
    return [
        leaf if leaf.dtype == dtype else leaf.view(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)
    ]


# What is said of it


def _status(draws: Any, info: Any) -> np.ndarray:
    """(S,) the worst status that ``info`` has, and ``NON_FINITE`` where a draw is."""
    num = len(jax.tree.leaves(draws)[0])
    bad = np.zeros(num, bool)
    for leaf in jax.tree.leaves(draws):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            bad |= ~np.isfinite(leaf).reshape(num, -1).all(axis=1)
    said = _field(info, ("status",))
    worst = np.zeros(num, int) if said is None else said.reshape(num, -1).max(axis=1).astype(int)
    return np.where(bad, int(Status.NON_FINITE), worst)


def _accounts(info: Any) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """(S,) work, divergences and smallest effective sample size, where ``info`` has them."""
    work, divergences = (
        None if found is None else found.reshape(len(found), -1).sum(axis=1)
        for found in (_field(info, _WORK), _field(info, _DIVERGENCES))
    )
    sizes = _field(info, ("ess",))
    return work, divergences, None if sizes is None else sizes.reshape(len(sizes), -1).min(axis=1)


def _field(info: Any, names: tuple[str, ...]) -> np.ndarray | None:
    """The first of these fields or entries that is there, its leaves side by side: (S, ...)."""
    for name in names:
        found = info.get(name) if isinstance(info, dict) else getattr(info, name, None)
        leaves = jax.tree.leaves(found)
        if leaves:
            return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in leaves], axis=1)
    return None
