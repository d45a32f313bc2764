"""The static half of a function with its data: what compiled programs are looked up by.

Two structures are equal if their walks met the same things, whatever the objects are. Arrays are not among them: new
values in the slots find the compiled program. The exception are functions that look at values in Python
(``int(g.max())``, ``np.log(y)``): JAX cannot trace these, so from the first time that one was met, its structures are
equal only if the arrays that may be looked at are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import jax
import numpy as np

from probinfer.core.identity.installed import is_installed
from probinfer.core.identity.recipes import Recipe, cook
from probinfer.core.identity.walk import Walk

__all__ = ["Structure", "refresh_classes", "structure_of"]

_LOOKED_AT: set[str] = set()  # digests of structures that were found to look at values
_SEEN_AS: weakref.WeakKeyDictionary[Any, str] = (
    weakref.WeakKeyDictionary()
)  # what stays itself: its last digest
_COMMON: weakref.WeakValueDictionary[str, Structure] = weakref.WeakValueDictionary()


class Structure:
    """What a value depends on apart from the arrays in its slots, and how to make it with them.

    Attributes:
        digest: the hash of what the walk met.
        label: a name for messages.
        unseen: what the digest cannot see, in words.
        kinds: where the array of each slot comes from.
    """

    _SHARED = ("_check", "_hash", "_made", "_recipe", "digest", "kinds", "label", "unseen")
    __slots__ = (*_SHARED, "__weakref__", "_seen", "_values")

    def __init__(self, walk: Walk, recipe: Recipe, label: str, check: Callable[[], str] | None):
        self.digest, self.label = walk.digest, label
        self.kinds, self.unseen = tuple(walk.kinds), tuple(walk.unseen)
        self._hash = hash(self.digest)
        self._recipe, self._check = recipe, check
        self._made: tuple = ()
        self._values: tuple = ()
        self._seen: str | None = None

    @property
    def holds_live(self) -> bool:
        """Whether a part of the value is handed on without copying, although it could change."""
        return self._check is not None

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Structure) or self.digest != other.digest:
            return False
        return self.digest not in _LOOKED_AT or self._same_values(other)

    def __repr__(self) -> str:
        return f"<{self.label} {self.digest[:8]}>"

    def make(self, arrays: Sequence[Any]) -> Any:
        """The value, made anew, with these arrays in its slots.

        Raises:
            RuntimeError: something that is not copied was changed since the value was handed in.
        """
        if self._made:
            return self._made[0]
        if self._check is not None and self._check() != self.digest:
            raise RuntimeError(
                f"{self.label} was changed after it was handed in, in a part that cannot be copied (a class, an "
                "object with its own pickling, a function that assigns globals): make the target or the algorithm "
                "again, so that results follow the change"
            )
        value = cook(self._recipe, arrays)
        if not self.kinds and self._check is None:
            self._made = (value,)  # depends on no array: one copy for all traces
        return value

    def with_values(self, arrays: Sequence[Any]) -> Structure:
        """This structure, aware of the present values of its arrays; itself where it is already or they are traced."""
        if not arrays or any(isinstance(array, jax.core.Tracer) for array in arrays):
            return self
        if len(self._values) == len(arrays) and all(
            ref() is array for ref, array in zip(self._values, arrays, strict=True)
        ):
            return self
        try:
            values = tuple(weakref.ref(array) for array in arrays)
        except TypeError:  # placeholders that JAX puts in the place of arrays
            return self
        other = object.__new__(Structure)
        for name in self._SHARED:
            setattr(other, name, getattr(self, name))
        other._values, other._seen = values, None
        return other

    def concrete(self, arrays: Sequence[Any]) -> list[Any] | None:
        """Arrays with those that a function may look at replaced by their values; ``None`` where no value is known.

        NumPy arrays among the arguments, and all captured arrays, may be looked at.
        """
        if len(self._values) != len(arrays):
            return None
        found, known = list(arrays), False
        for index, (array, ref, kind) in enumerate(zip(arrays, self._values, self.kinds, strict=True)):
            value = ref()
            if kind == ("argument", "jax") or value is None:
                continue
            if (value.shape, value.dtype) != (array.shape, array.dtype):
                continue
            found[index], known = np.asarray(value) if kind[1] == "numpy" else value, True
        return found if known else None

    def looks_at_values(self) -> None:
        """Note that a function of this structure looks at values."""
        self._digest_values()
        _LOOKED_AT.add(self.digest)

    def _same_values(self, other: Structure) -> bool:
        mine, its = self._digest_values(), other._digest_values()
        return mine is not None and mine == its

    def _digest_values(self) -> str | None:
        """The hash of the values that may be looked at; ``None`` where they are gone."""
        values = [ref() for ref in self._values]
        if self._seen is None and values and all(value is not None for value in values):
            walk = Walk(slots=False)
            for value, kind in zip(values, self.kinds, strict=True):
                if kind != ("argument", "jax"):
                    walk.visit(value)
            self._seen = walk.digest
        return self._seen


def refresh_classes(*trees: Any) -> None:
    """Look at the user's classes among pytrees that are handed to compiled programs as they are (kernels, rewards).

    Their methods are code of the user's: where one reads something else than when it was last looked at, the caches
    of JAX are cleared, so that what is computed next follows it.
    """
    _forget_traces_of([kind for kind in _classes_of(trees) if not is_installed(kind.__module__)])


def _classes_of(tree: Any) -> set[type]:
    found: set[type] = set()

    def collect(structure: Any) -> None:
        data = structure.node_data()
        if data is not None and isinstance(data[0], type):
            found.add(data[0])
        for child in structure.children():
            collect(child)

    collect(jax.tree.structure(tree))
    return found


def structure_of(
    visit: Callable[[Walk], Recipe], label: str
) -> tuple[Structure, list[Any], list[tuple[str, str]]]:
    """Walk over a value that is handed in.

    Args:
        visit: visits the value and returns its recipe.
        label: a name for messages.

    Returns:
        The structure, the arrays in its slots, and where each comes from.
    """
    walk = Walk(slots=True)
    recipe = visit(walk)
    if not walk.live:
        if not walk.arrays and walk.digest in _COMMON:
            return _COMMON[walk.digest], [], []
        structure = Structure(walk, recipe, label, None)
        if not walk.arrays:
            _COMMON[walk.digest] = structure
        return structure, walk.arrays, walk.kinds

    def check() -> str:
        again = Walk(slots=True)
        visit(again)
        return again.digest

    _forget_traces_of(walk.live)
    return Structure(walk, recipe, label, check), walk.arrays, walk.kinds


def _forget_traces_of(live: list[Any]) -> None:
    """Clear the caches of JAX where code that stays itself reads something else than when it was last handed in.

    The methods of a class and the functions that assign globals are not made anew, and JAX keeps the first trace of a
    scan body or a jitted function among them by its object: a fresh outer trace alone would find the old one.
    """
    for item in live:
        if not isinstance(item, (type, FunctionType)) and not hasattr(item, "clear_cache"):
            continue
        walk = Walk(slots=False)
        digest = walk.class_digest(item) if isinstance(item, type) else _digest_alone(walk, item)
        before = _SEEN_AS.get(item)
        _SEEN_AS[item] = digest
        if before not in (None, digest):
            jax.clear_caches()


def _digest_alone(walk: Walk, item: Any) -> str:
    walk.visit(item)
    return walk.digest
