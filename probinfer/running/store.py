"""A store: a folder that belongs to one run, with what the run has finished in parts that are whole or absent.

``about.json`` says what the run is; a part is a file of its own with a checksum, bound to the run and to its name. One
process works on a folder at a time: it holds a lock of the operating system, which ends with the process. (The
processes of one run would share it: the first of them holds it for all.)
"""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.running.sealed_files import (
    Leaf,
    difference,
    leaf_of,
    read_json,
    read_part,
    seal,
    write_json,
    write_part,
)

__all__ = ["Store", "opened", "restore", "save"]

_SUFFIX = ".part"
_ABOUT = "about.json"
_LOCK = "lock"


class Store:
    """An open folder.

    Args:
        folder: where.
        run: a short text that is the same for the same run.
    """

    def __init__(self, folder: Path, run: str):
        self.folder, self._run = folder, run

    def names(self) -> list[str]:
        """Names of the parts, sorted."""
        return sorted(path.name.removesuffix(_SUFFIX) for path in self.folder.glob(f"[!.]*{_SUFFIX}"))

    def write(self, name: str, tree: Any, **notes: Any) -> None:
        """Write a part: arrays, numbers and keys.

        Args:
            name: of the part.
            tree: a pytree.
            **notes: what ``read`` has to agree with.

        Raises:
            OSError: it could not be written; nothing of it is there.
        """
        leaves = [(leaf, np.asarray(_plain(value))) for leaf, value in _leaves(tree)]
        write_part(self._file(name), leaves, self._notes(name, notes))

    def read(self, name: str, like: Any, advice: str, **notes: Any) -> Any:
        """Read a part.

        Args:
            name: of the part.
            like: a tree of the same structure, shapes and dtypes: arrays, keys, or ``jax.ShapeDtypeStruct``.
            advice: what to do where it is damaged, a clause.
            **notes: those of ``write``.

        Returns:
            The tree, bit for bit, of NumPy arrays and keys.

        Raises:
            DamagedFileError: a bit is another one, or bytes are missing.
            ValueError: the part is whole and holds something else.
        """
        return _read(self._file(name), like, self._notes(name, notes), advice)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"

    def _notes(self, name: str, notes: dict[str, Any]) -> dict[str, Any]:
        return {"run": self._run, "part": name, **notes}


@contextlib.contextmanager
def opened(path: str | os.PathLike, about: dict[str, Any], hint: Any = None) -> Iterator[Store]:
    """Take a folder for the run that ``about`` describes, or make sure that it is already its own.

    Args:
        path: the folder; made if it does not exist.
        about: what the run is, for JSON.
        hint: ``hint(found, about)``, more words on a folder of another run.

    Yields:
        The store.

    Raises:
        ValueError: the folder holds another run, or parts that nothing describes.
        DamagedFileError: ``about.json`` is damaged.
        RuntimeError: another process, or another call in this one, works on the folder.
        OSError: it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} is no folder, and none can be made there; choose another path") from error
    with _locked(folder):
        for left in folder.glob(".*.draft"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        run = _claim(folder, about, hint)
        yield Store(folder, run)


def _claim(folder: Path, about: dict[str, Any], hint: Any) -> str:
    """Write what the run is, or compare it."""
    file = folder / _ABOUT
    others = [*folder.glob(f"*{_SUFFIX}"), *folder.glob("step_*"), *folder.glob("batch_*")]
    if not file.exists():
        if others:
            raise ValueError(
                f"{folder} holds {others[0].name} of a run but no {_ABOUT}; delete the folder or choose another path"
            )
        write_json(file, about)
        return seal(about)
    found = read_json(file, f"delete {folder}, or choose another path")
    if found != about:
        raise ValueError(
            f"{folder} holds a checkpoint of a different run: {difference(found, about)}. Call with what it was "
            f"made with to continue it, choose another path, or delete the folder"
            f"{'' if hint is None else hint(found, about)}"
        )
    return seal(about)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; the file stays, the lock ends with the process."""
    try:
        file: Any = (folder / _LOCK).open("a+b")
    except OSError:
        if os.access(folder, os.W_OK):
            raise
        yield  # nothing can be written there, so nobody can be disturbed
        return
    with file:
        try:
            _take(file.fileno())
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read(200).decode(errors="replace") or "another process"
            raise RuntimeError(
                f"{folder} is in use by {owner}: two runs in one folder would overwrite one another; wait for it, end "
                "it, or choose another path"
            ) from error
        except OSError as error:
            warnings.warn(
                f"the file system of {folder} has no locks ({error.strerror}): see that no second process works on it",
                stacklevel=4,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        yield


def _take(handle: int) -> None:
    """Lock an open file, or raise ``BlockingIOError``; closing it gives the lock back."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            os.lseek(handle, 2**30, os.SEEK_SET)  # a byte beyond the text, which others may read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except PermissionError as error:
            raise BlockingIOError from error
        return
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def save(path: str | os.PathLike, tree: Any) -> None:
    """Write the leaves of a pytree (arrays, numbers, PRNG keys) to a new file, all or nothing.

    Args:
        path: the file.
        tree: a pytree.

    Raises:
        ValueError: the file exists.
        OSError: it could not be written.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists; delete it or choose another path")
    write_part(path, [(leaf, np.asarray(_plain(value))) for leaf, value in _leaves(tree)], {})


def restore(path: str | os.PathLike, like: Any) -> Any:
    """Read what ``save`` wrote.

    Args:
        path: the file.
        like: a pytree of the same structure, shapes and dtypes: arrays, or ``jax.ShapeDtypeStruct`` for all but keys.

    Returns:
        The tree of arrays, bit for bit.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: a bit is another one, or bytes are missing.
        ValueError: what is stored there has another structure, other shapes or dtypes.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    found = _read(path, like, {}, "take a copy of it, or make it again")
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, found)


def _read(file: Path, like: Any, notes: dict[str, Any], advice: str) -> Any:
    named = _leaves(like)
    arrays = read_part(file, [leaf for leaf, _ in named], notes, advice)
    made = [_like(array, value) for array, (_, value) in zip(arrays, named, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), made)


def _leaves(tree: Any) -> list[tuple[Leaf, Any]]:
    """Each leaf with its description, keys as their integers."""
    named = []
    for i, (path, value) in enumerate(jax.tree_util.tree_flatten_with_path(tree)[0]):
        value = value if hasattr(value, "dtype") else np.asarray(value)
        kind = f" of a key of {jax.random.key_impl(value)}" if _is_key(value) else ""
        named.append((leaf_of(f"{i}{jax.tree_util.keystr(path)}", _plain(value), kind), value))
    return named


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    """A key as its integers, anything else as it is."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _like(array: np.ndarray, leaf: Any) -> Any:
    """The inverse of ``_plain``.

    By way of the host: what is read back is bound to no device, like the arrays of a fresh run, so a resumed run uses
    the compiled program of an uninterrupted one.
    """
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
    return array
