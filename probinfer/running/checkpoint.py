"""Checkpoints: any pytree to a folder and back, and the growing record of a run.

A run keeps a store (``probinfer.running.store``) and in it one part for each checkpoint with the state and the records
made since the one before it, so that the cost is linear in the length of the run. Parts appear under their final name
only when they are complete, so a process may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.arguments import check_count
from probinfer.running.store import Store, opened, restore, save

__all__ = ["Checkpoint", "append", "claimed", "restore", "resume", "save"]

_STEP = "step_"
_STEPS = 1000  # between checkpoints


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its checkpoints, and how often it makes one.

    Args:
        path: a folder; made if it does not exist. A finished run leaves its result there, and the same call made again
            returns it.
        every: units of work between checkpoints: steps of an algorithm (rounded up to a multiple of the thinning),
            data sets of ``run_many`` and of checks. None: 1000 steps, or a batch of data sets.

    Raises:
        TypeError: ``every`` is not an integer.
        ValueError: ``every`` is not positive.
    """

    path: str | os.PathLike
    every: int | None = None

    def __post_init__(self):
        if self.every is not None:
            check_count("every", self.every)

    @property
    def steps(self) -> int:
        """Number of steps between checkpoints."""
        return _STEPS if self.every is None else self.every

    @staticmethod
    def check(checkpoint: Any) -> None:
        """Refuse what is not a checkpoint.

        Raises:
            TypeError: neither ``None`` nor a ``Checkpoint``; a path, for example.
        """
        if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
            raise TypeError(
                f"checkpoint must be a pi.Checkpoint, got {checkpoint!r}; write pi.Checkpoint(path)"
            )

    def child(self, name: str) -> Checkpoint:
        """Return the checkpoint of one phase of a longer piece of work: a folder inside this one."""
        return dataclasses.replace(self, path=Path(self.path) / name)


def claimed(checkpoint: Checkpoint, about: dict[str, Any]) -> contextlib.AbstractContextManager[Store]:
    """Claim a folder for the run that ``about`` describes, or make sure that it belongs to that run already.

    Raises:
        ValueError: the folder holds a checkpoint of another run, or files that are not a checkpoint.
        DamagedFileError: the description is damaged.
        RuntimeError: another process works on the folder.
    """
    return opened(checkpoint.path, about, _advice_on_length)


def append(store: Store, step: int, cursor: Any, records: Any, rows: tuple[int, int]) -> None:
    """Write one checkpoint.

    Args:
        store: the folder of the run.
        step: number of steps taken.
        cursor: the state of the loop, a pytree.
        records: buffers, leaves (num_records, ...).
        rows: the first row that no earlier checkpoint holds, and one past the last row.
    """
    part = _take_rows(records, rows[0], rows[1] - rows[0])
    store.write(f"{_STEP}{step:012d}", {"cursor": cursor, "records": part}, rows=list(rows))


def resume(store: Store, cursor: Any, records: Any, thin: int) -> tuple[Any, Any, int]:
    """Read all checkpoints of a run.

    Args:
        store: the folder of the run.
        cursor: the state of the loop at its start, a pytree.
        records: empty buffers, leaves (num_records, ...).
        thin: steps per record.

    Returns:
        The last state of the loop, the buffers filled as far as they were, and the number of rows filled.

    Raises:
        DamagedFileError: a checkpoint is damaged.
        ValueError: one is missing between others, or belongs to another run.
    """
    row = 0
    steps = [name for name in store.names() if re.fullmatch(_STEP + r"\d{12}", name)]
    if not steps:
        return cursor, records, row
    filled = jax.tree.map(_host_copy, records)
    for name in steps:
        end = int(name.removeprefix(_STEP)) // thin
        like = {"cursor": cursor, "records": jax.tree.map(partial(_rows_like, max(end - row, 0)), records)}
        advice = f"delete it and the later ones of {store.folder}: the run continues from the one before"
        part = store.read(name, like, advice, rows=[row, end])
        cursor = jax.tree.map(_to_device, part["cursor"], cursor)
        for buffer, new in zip(jax.tree.leaves(filled), jax.tree.leaves(part["records"]), strict=True):
            buffer[row:end] = _plain(new)
        row = end
    return cursor, jax.tree.map(_to_device, filled, records), row


@partial(jax.jit, static_argnums=2)
def _take_rows(records: Any, start: Any, count: int) -> Any:
    """Return ``count`` rows of each buffer from ``start`` on; ``start`` is data, so checkpoints share one program."""
    return jax.tree.map(lambda buffer: jax.lax.dynamic_slice_in_dim(buffer, start, count), records)


def _rows_like(count: int, buffer: Any) -> Any:
    """Return the shape and dtype of ``count`` rows of a buffer."""
    return (
        buffer[:count] if _is_key(buffer) else jax.ShapeDtypeStruct((count, *buffer.shape[1:]), buffer.dtype)
    )


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    """Return the integers of a key, and anything else unchanged."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _host_copy(leaf: Any) -> np.ndarray:
    return np.array(_plain(leaf))


def _to_device(stored: Any, leaf: Any) -> Any:
    """Return an array of the kind of ``leaf``, committed to no device: as in a fresh run, it uses the same program."""
    if _is_key(leaf):
        return (
            stored
            if _is_key(stored)
            else jax.random.wrap_key_data(jnp.asarray(stored), impl=jax.random.key_impl(leaf))
        )
    return jnp.asarray(stored)


def _advice_on_length(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Say what to do if the two runs differ in their length alone."""
    if {**stored, "num_steps": 0} != {**wanted, "num_steps": 0}:
        return ""
    return (
        ". A checkpoint belongs to one length (num_steps of pi.run; num_draws and num_warmup of an engine): for a "
        "longer run, call with the old length, then start a second run from the state it returns, under another path"
    )
