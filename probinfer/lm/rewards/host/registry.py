"""Python objects that compiled programs call: a program knows such an object by a number, and the number is data.

A function, a parser and their worker processes cannot be part of a compiled program. If the program held the object
itself, every new function and every new schema would compile it anew, and the program would keep the object alive. With
a number in its place the same program serves them all.
"""

from __future__ import annotations

import copy
import itertools
import threading
from typing import Any
from weakref import WeakValueDictionary

import jax
import numpy as np

__all__ = ["OnHost", "call", "detached", "enlist"]

_NUMBERS = itertools.count(1)
_LISTED: WeakValueDictionary[int, Any] = WeakValueDictionary()
_LOCK = threading.Lock()


def enlist(host: Any) -> np.ndarray:
    """The number, int32 (), by which compiled programs find an object for as long as somebody else holds it."""
    with _LOCK:
        number = next(_NUMBERS)
        _LISTED[number] = host
    return np.asarray(number, np.int32)


def _listed(number: Any) -> Any:
    """The object of a number, which ``vmap`` may have given axes.

    Raises:
        RuntimeError: nobody holds the object any more.
    """
    found = _LISTED.get(int(np.ravel(number)[0]))
    if found is None:
        raise RuntimeError("the reward of this run was dropped while it ran: keep it until the run has ended")
    return found


def call(method: str, shape: Any, number: Any, *arguments: Any) -> Any:
    """Call ``host.method(*arguments)`` from a compiled program; see ``jax.pure_callback``.

    Args:
        method: its name.
        shape: of what it returns.
        number: of the object.
        *arguments: arrays; under ``vmap`` with leading axes that broadcast.
    """

    def serve(number: Any, *arguments: Any) -> Any:
        return np.asarray(getattr(_listed(number), method)(*arguments), shape.dtype)

    return jax.pure_callback(serve, shape, number, *arguments, vmap_method="expand_dims")


class OnHost:
    """A registered class with the fields ``number`` (data) and ``owned`` (static): the object, or None if detached."""

    number: Any
    owned: Any

    @property
    def host(self) -> Any:
        """The object."""
        return _listed(self.number) if self.owned is None else self.owned

    def detached(self) -> Any:
        """The same with the number alone: what is compiled with it is compiled once for all such objects."""
        new = copy.copy(self)
        object.__setattr__(new, "owned", None)
        return new


def detached(tree: Any) -> Any:
    """The tree, everything in it detached that can be; the caller keeps the original until the run has ended."""

    def is_one(leaf: Any) -> bool:
        return hasattr(leaf, "detached")

    return jax.tree.map(lambda leaf: leaf.detached() if is_one(leaf) else leaf, tree, is_leaf=is_one)
