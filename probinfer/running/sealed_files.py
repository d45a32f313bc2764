"""Files that are whole or absent, and that say so: written beside their name, checked by a checksum when they are read.

A part is one file: a line that names the format, the length of a header, the header (what the file holds, as JSON), the
bytes of the arrays one after another, and the SHA-256 of all before it. What a reader expects is known before the file
is opened, so nothing in it decides how much is read or what a byte means.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from probinfer.core.errors import DamagedFileError

__all__ = [
    "Leaf",
    "difference",
    "leaf_of",
    "read_json",
    "read_part",
    "seal",
    "whole",
    "write_json",
    "write_part",
]

_MAGIC = b"probinfer part 1\n"
_CHECKSUM = hashlib.sha256
_SEAL = "sha256"
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)


class Leaf(NamedTuple):
    """One array of a part: its name, what it is made of, its shape; ``kind`` tells apart what has the same bytes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    kind: str = ""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        """In words, such as ``float64[3, 2]``."""
        return f"{self.dtype.name}{list(self.shape)}{self.kind}"


def leaf_of(name: str, array: Any, kind: str = "") -> Leaf:
    """Describe an array, or anything with a dtype and a shape.

    Args:
        name: unique in its part.
        array: with ``dtype`` and ``shape``.
        kind: see ``Leaf``.
    """
    return Leaf(name, np.dtype(array.dtype), tuple(array.shape), kind)


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Write a file that appears under its name when it is complete and on disk, and never otherwise.

    Args:
        path: the file; one that is there is replaced.

    Yields:
        A binary stream.

    Raises:
        OSError: it could not be written, such as on a full disk; the message names the file and says what to do.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        advice = (
            "there is no room: free some, or choose another path"
            if error.errno in _FULL
            else "see that the folder can be written to, or choose another path"
        )
        message = (
            f"{path} could not be written ({error.strerror or error}); {advice}. What was there is unchanged"
        )
        raise OSError(error.errno, message) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Put the name of a new file on disk, where the system can do that for a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_part(path: Path, leaves: Sequence[tuple[Leaf, np.ndarray]], notes: dict[str, Any]) -> None:
    """Write arrays to a new file.

    Args:
        path: the file.
        leaves: descriptions and arrays.
        notes: what else the reader has to agree with, for JSON.

    Raises:
        OSError: see ``whole``.
    """
    header = json.dumps({"notes": notes, "leaves": {leaf.name: str(leaf) for leaf, _ in leaves}}).encode()
    checksum = _CHECKSUM()
    with whole(path) as stream:
        for piece in (_MAGIC, len(header).to_bytes(8, "little"), header):
            checksum.update(piece)
            stream.write(piece)
        for _, array in leaves:
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            checksum.update(raw.data)
            stream.write(raw.data)
        stream.write(checksum.digest())


def read_part(path: Path, leaves: Sequence[Leaf], notes: dict[str, Any], advice: str) -> list[np.ndarray]:
    """Read what ``write_part`` wrote, bit for bit.

    Args:
        path: the file.
        leaves: what it must hold, in their order.
        notes: what it must say.
        advice: what to do where it does not, a clause.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: a bit is another one, or bytes are missing.
        ValueError: the file is whole and holds something else.
    """
    content = _checked(path, sum(leaf.size for leaf in leaves), advice)
    start = len(_MAGIC) + 8
    end = start + int.from_bytes(content[len(_MAGIC) : start], "little")
    header = json.loads(bytes(content[start:end]))
    said = {**header["notes"], **header["leaves"]}
    wanted = {**notes, **{leaf.name: str(leaf) for leaf in leaves}}
    if said != wanted:
        raise ValueError(f"{path} holds another structure: {difference(said, wanted)}; {advice}")
    arrays = []
    for leaf in leaves:
        raw = np.frombuffer(content, np.uint8, leaf.size, end) if leaf.size else np.zeros(0, np.uint8)
        arrays.append(np.array(raw).view(leaf.dtype).reshape(leaf.shape))  # a copy is aligned
        end += leaf.size
    return arrays


def _checked(path: Path, size: int, advice: str) -> bytearray:
    """All bytes of a part of about ``size`` bytes without its checksum, which is right."""
    try:
        stream = path.open("rb")
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else DamagedFileError
        raise kind(f"{path} cannot be read ({error.strerror}); {advice}") from error
    with stream:
        found = os.fstat(stream.fileno()).st_size
        prefix = stream.read(len(_MAGIC) + 8)
        length = int.from_bytes(prefix[len(_MAGIC) :], "little")
        if not prefix.startswith(_MAGIC) or length > found:
            raise DamagedFileError(f"{path} is damaged, or no file of this version of probinfer; {advice}")
        needed = len(prefix) + length + size + _CHECKSUM().digest_size
        if found > max(needed, _LARGEST_STRANGER):  # not even to find out what it is
            raise DamagedFileError(f"{path} has {found} bytes for {needed}; {advice}")
        content = bytearray(found)
        stream.seek(0)
        content = content[: stream.readinto(content)]
    digest = content[-_CHECKSUM().digest_size :]
    del content[-_CHECKSUM().digest_size :]
    if _CHECKSUM(content).digest() != digest:
        raise DamagedFileError(
            f"{path} is damaged: bytes are missing or not those that were written; {advice}"
        )
    return content


_LARGEST_STRANGER = 2**26  # bytes of a file that is read although it cannot be the one that is expected


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary with its checksum.

    Args:
        path: the file.
        content: for JSON; the name ``sha256`` is taken.

    Raises:
        OSError: see ``whole``.
    """
    with whole(path) as stream:
        stream.write(json.dumps({**content, _SEAL: seal(content)}, indent=1).encode())


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Read what ``write_json`` wrote.

    Args:
        path: the file.
        advice: what to do where it is damaged, a clause.

    Raises:
        DamagedFileError: it is not what was written.
    """
    try:
        found = json.loads(path.read_bytes()) if path.stat().st_size <= _LARGEST_STRANGER else None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged ({type(error).__name__}: {error}); {advice}") from error
    if not isinstance(found, dict) or _SEAL not in found:
        raise DamagedFileError(f"{path} is damaged, or written by an earlier version of probinfer; {advice}")
    if found.pop(_SEAL) != seal(found):
        raise DamagedFileError(f"{path} is damaged: it is not what was written; {advice}")
    return found


def seal(content: dict[str, Any]) -> str:
    """The checksum of a dictionary that goes into JSON."""
    return _CHECKSUM(json.dumps(content, sort_keys=True).encode()).hexdigest()


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Say in which entries two dictionaries differ, in words.

    Args:
        found: what is there.
        wanted: what is here.
    """
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    shown = [f"{name} is {found.get(name)} there and {wanted.get(name)} here" for name in names[:3]]
    return "; ".join(shown) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
