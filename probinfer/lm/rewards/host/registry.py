"""Python objects that compiled programs call: a program knows such an object by a number, and the number is data.

A function, a parser and their worker processes cannot be part of a compiled program. If the program held the object
itself, every new function and every new schema would need a compilation, and the program would keep the object alive.
With a number in its place the same program serves them all.
"""

from __future__ import annotations

import copy
import itertools
import threading
from typing import Any
from weakref import WeakValueDictionary

import jax
import numpy as np

__all__ = ["HostBacked", "call_host", "detached", "register"]

_NUMBERS = itertools.count(1)
_REGISTERED: WeakValueDictionary[int, Any] = WeakValueDictionary()
_LOCK = threading.Lock()


def register(host: Any) -> np.ndarray:
    """Return a number, int32 (), by which compiled programs find an object, which the caller must keep alive."""
    with _LOCK:
        number = next(_NUMBERS)
        _REGISTERED[number] = host
    return np.asarray(number, np.int32)


def _look_up(number: Any) -> Any:
    """Return the object of a number, to which ``vmap`` may have added axes.

    Raises:
        RuntimeError: the object has been garbage-collected.
    """
    host = _REGISTERED.get(int(np.ravel(number)[0]))
    if host is None:
        raise RuntimeError(
            "the reward of this run was deleted while it ran: keep a reference to it until the run has ended"
        )
    return host


def call_host(method: str, shape: Any, number: Any, *arguments: Any) -> Any:
    """Call ``host.method(*arguments)`` from a compiled program; see ``jax.pure_callback``.

    Args:
        method: name of the method.
        shape: shape and dtype of its return value.
        number: number of the object.
        *arguments: arrays; under ``vmap`` with leading axes that broadcast.
    """

    def callback(number: Any, *arguments: Any) -> Any:
        return np.asarray(getattr(_look_up(number), method)(*arguments), shape.dtype)

    return jax.pure_callback(callback, shape, number, *arguments, vmap_method="expand_dims")


class HostBacked:
    """A pytree class with the fields ``number`` (data) and ``attached`` (static): the object, or None if detached."""

    number: Any
    attached: Any

    @property
    def host(self) -> Any:
        """The Python object."""
        return _look_up(self.number) if self.attached is None else self.attached

    def detached(self) -> Any:
        """Return the same with the number alone, so that one compiled program serves all such objects."""
        new = copy.copy(self)
        object.__setattr__(new, "attached", None)
        return new


def detached(tree: Any) -> Any:
    """Return the tree with everything detached that can be; the caller keeps the original until the run has ended."""

    def can_detach(leaf: Any) -> bool:
        return hasattr(leaf, "detached")

    return jax.tree.map(lambda leaf: leaf.detached() if can_detach(leaf) else leaf, tree, is_leaf=can_detach)
