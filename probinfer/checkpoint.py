"""Checkpoints: any pytree to a folder and back, and the growing record of a run.

A run writes ``about.json``, which says what is being run, and one folder for each checkpoint with the state and the
records made since the one before it, so that the cost is linear in the length of the run. Folders appear under their
final name only when they are complete, so a process may be killed at any moment.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Checkpoint", "append", "claim", "restore", "resume", "save"]

_STEP = re.compile(r"^step_(\d+)$")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its checkpoints, and how often it makes one.

    Args:
        path: a folder; made if it does not exist. A finished run leaves its result there, and the same call made again
            returns it.
        every: steps between checkpoints (rounded up to a multiple of the thinning).

    Raises:
        ValueError: ``every`` is not positive.
    """

    path: str | os.PathLike
    every: int = 1000

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")

    @staticmethod
    def check(checkpoint: Any) -> None:
        """Refuse what is no checkpoint.

        Raises:
            TypeError: something else than ``None`` or a ``Checkpoint``, such as a path.
        """
        if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
            raise TypeError(
                f"checkpoint must be a pi.Checkpoint, got {checkpoint!r}; write pi.Checkpoint(path)"
            )

    def child(self, name: str) -> Checkpoint:
        """The checkpoint of one phase of a longer piece of work: a folder below this one."""
        return dataclasses.replace(self, path=Path(self.path) / name)


def save(path: str | os.PathLike, tree: Any) -> None:
    """Write the leaves of a pytree (arrays, numbers, PRNG keys) to a new folder, all or nothing.

    Raises:
        ValueError: the folder exists.
    """
    import orbax.checkpoint as ocp  # here because it takes most of a second to import

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(Path(path).absolute(), args=ocp.args.StandardSave(_storable(tree)))


def restore(path: str | os.PathLike, like: Any) -> Any:
    """Read what ``save`` wrote.

    Args:
        path: the folder.
        like: a pytree of the same structure, shapes and dtypes: arrays, or ``jax.ShapeDtypeStruct`` for all but keys.

    Returns:
        The tree, bit for bit.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: what is stored there has another structure, other shapes or dtypes.
    """
    import orbax.checkpoint as ocp

    folder = Path(path).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint at {folder}")
    wanted = jax.eval_shape(_storable, like)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
        found = {name: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for name, leaf in stored.items()}
        expected = {name: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for name, leaf in wanted.items()}
        if found != expected:
            raise ValueError(f"{folder} holds another structure: {_difference(found, expected)}")
        leaves = checkpointer.restore(folder, args=ocp.args.StandardRestore(wanted)) if wanted else {}
    return _from_storable(leaves, like)


def claim(checkpoint: Checkpoint, about: dict[str, Any]) -> None:
    """Take a folder for the run that ``about`` describes, or make sure that it is already its own.

    Raises:
        ValueError: the folder holds a checkpoint of another run, or files that are no checkpoint.
    """
    folder = Path(checkpoint.path)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "about.json"
    if file.exists():
        found = json.loads(file.read_text())
        if found != about:
            raise ValueError(
                f"{folder} holds a checkpoint of a different run: {_difference(found, about)}. Call with what it was "
                f"made with to continue it, choose another path, or delete the folder{_about_length(found, about)}"
            )
    elif _steps(folder):
        raise ValueError(
            f"{folder} holds steps of a run but no about.json; delete the folder or choose another path"
        )
    else:
        draft = folder / f"about.json.{os.getpid()}"
        draft.write_text(json.dumps(about, indent=1))
        draft.replace(file)
    for left in folder.glob("step_*orbax-checkpoint-tmp*"):  # of a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)


def append(checkpoint: Checkpoint, step: int, cursor: Any, records: Any, rows: tuple[int, int]) -> None:
    """Write one checkpoint.

    Args:
        checkpoint: where.
        step: steps taken.
        cursor: the state of the loop, a pytree.
        records: buffers, leaves (num_records, ...).
        rows: first row that no earlier checkpoint holds, and one past the last.
    """
    part = _take_rows(records, rows[0], rows[1] - rows[0])
    save(Path(checkpoint.path) / f"step_{step:012d}", {"cursor": cursor, "records": part})


def resume(checkpoint: Checkpoint, cursor: Any, records: Any, thin: int) -> tuple[Any, Any, int]:
    """Read all checkpoints of a run.

    Args:
        checkpoint: where.
        cursor: the state of the loop at its start, a pytree.
        records: empty buffers, leaves (num_records, ...).
        thin: steps per record.

    Returns:
        The last state of the loop, the buffers filled as far as they were, and the number of rows filled.
    """
    row = 0
    if not _steps(Path(checkpoint.path)):
        return cursor, records, row
    filled = jax.tree.map(_host_copy, records)
    for step in _steps(Path(checkpoint.path)):
        rows = slice(row, step // thin)
        like = {"cursor": cursor, "records": _take_rows(records, row, step // thin - row)}
        part = restore(Path(checkpoint.path) / f"step_{step:012d}", like)
        cursor = part["cursor"]
        for buffer, new in zip(jax.tree.leaves(filled), jax.tree.leaves(part["records"]), strict=True):
            buffer[rows] = _plain(new)
        row = step // thin
    return cursor, jax.tree.map(_like, filled, records), row


@partial(jax.jit, static_argnums=2)
def _take_rows(records: Any, start: Any, count: int) -> Any:
    """So many rows of each buffer from ``start`` on, which is data: one program serves all checkpoints."""
    return jax.tree.map(lambda buffer: jax.lax.dynamic_slice_in_dim(buffer, start, count), records)


def _steps(folder: Path) -> list[int]:
    return sorted(int(match[1]) for entry in folder.iterdir() if (match := _STEP.match(entry.name)))


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    """A key as its integers, anything else as it is."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _like(plain: Any, leaf: Any) -> Any:
    """The inverse of ``_plain`` and ``_host_copy``.

    By way of the host: what is read back is bound to no device, like the arrays of a fresh run, so a resumed run uses
    the compiled program of an uninterrupted one.
    """
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(np.asarray(plain)), impl=jax.random.key_impl(leaf))
    return jnp.asarray(np.asarray(plain))


def _host_copy(leaf: Any) -> np.ndarray:
    return np.array(_plain(leaf))


def _storable(tree: Any) -> dict[str, Any]:
    """The leaves by number and path, keys as integers; empty arrays are left out (the format has none)."""
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {
        f"{i}{jax.tree_util.keystr(path)}": jnp.asarray(_plain(leaf)) for i, (path, leaf) in enumerate(named)
    }
    return {re.sub(r"[^\w.\[\]-]", "_", name): leaf for name, leaf in leaves.items() if leaf.size}


def _from_storable(stored: dict[str, Any], like: Any) -> Any:
    by_number = {int(re.match(r"\d+", name)[0]): leaf for name, leaf in stored.items()}  # type: ignore[index]
    leaves, structure = jax.tree.flatten(like)
    full = [
        _like(by_number[i], leaf) if i in by_number else jnp.zeros(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, full)


def _about_length(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What to do where the length alone differs."""
    if {**found, "num_steps": 0} != {**wanted, "num_steps": 0}:
        return ""
    return (
        ". A checkpoint belongs to one length (num_steps of pi.run; num_draws and num_warmup of an engine): for a "
        "longer run, call with the old length, then start a second run from the state it returns, under another path"
    )


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first entries in which two dictionaries differ, in words."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    shown = [f"{name} is {found.get(name)} there and {wanted.get(name)} here" for name in names[:3]]
    return "; ".join(shown) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
