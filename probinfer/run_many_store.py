"""Finished chunks of ``run_many`` in a folder, each whole or absent, beside a description of the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from probinfer.checkpoint import Checkpoint, claim

__all__ = ["claimed", "read", "write"]


def claimed(path: Any, about: dict[str, Any]) -> Path:
    """Return the folder, which holds the run that ``about`` describes or nothing.

    Raises:
        ValueError: another run is in it, or chunks that nothing describes.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "about.json").exists() and any(folder.glob("chunk_*.npz")):
        raise ValueError(f"{folder} holds chunks but no about.json; delete the folder or choose another path")
    claim(Checkpoint(path), about)
    for left in folder.glob("chunk_*.npz.*"):  # of a process that was killed while it wrote
        left.unlink(missing_ok=True)
    return folder


def write(file: Path, leaves: list[np.ndarray]) -> None:
    """Write a chunk, all or nothing: under its final name a file is whole."""
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    with draft.open("wb") as stream:
        np.savez(stream, **{str(i): leaf for i, leaf in enumerate(leaves)})  # type: ignore[arg-type]
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)


def read(file: Path, shapes: Any) -> list[np.ndarray]:
    """Return the leaves of a chunk; dtypes that the format does not know (bfloat16) are viewed as what they were.

    Raises:
        ValueError: the file is no such chunk.
    """
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(shapes)]
    try:
        with np.load(file) as stored:
            leaves = [stored[str(i)] for i in range(len(dtypes))]
    except Exception as error:
        raise ValueError(f"{file} cannot be read ({error}); delete it, and it is computed again") from error
    return [
        leaf if leaf.dtype == dtype else leaf.view(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)
    ]
