"""The walk over what a value depends on: it hashes what it meets and learns how to make the value again.

One walk serves two ends. *For a store* everything enters the hash, arrays with their bytes. *For a compiled program*
arrays become slots: the hash knows where they stand, and the recipe that comes out of the walk makes the value anew
with other arrays in the slots: functions with copied globals and closures, containers and objects copied, so that
later changes of the originals do not reach it, and JAX, which keeps the traces of inner functions by their object,
meets new objects.

What cannot be read (an open file, a lock, an object of a compiled library) is known by its object alone, and
``Walk.unseen`` says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import marshal
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from types import EllipsisType, NoneType, NotImplementedType
from typing import Any

import jax
import numpy as np

from probinfer.core.identity import functions, objects
from probinfer.core.identity.digits import keeps_its_digits
from probinfer.core.identity.recipes import Again, Keep, Make, Recipe, Slot, Walking

__all__ = ["Walk"]

_PLAIN = frozenset(
    {NoneType, bool, int, float, complex, str, bytes, EllipsisType, NotImplementedType, range, slice}
)
_MARSHALLED = frozenset({bool, int, float, complex, str, bytes, NoneType})
_LONG = 64  # a list of so many plain values is hashed in one piece


class Walk(Walking):
    """One walk.

    Attributes:
        slots: arrays become slots (for compiled programs); otherwise their bytes are hashed (for stores).
        captured: the walk is inside a function or an object, not among the arguments bound to a function.
        arrays: the arrays in the slots, in the order in which they were met.
        kinds: where each comes from: "argument" or "captured", and "numpy" or "jax".
        unseen: what could not be read, in words.
        live: what the recipe hands on without copying, although it could change.
    """

    def __init__(self, *, slots: bool):
        self.slots = slots
        self.captured = True
        self.arrays: list[Any] = []
        self.kinds: list[tuple[str, str]] = []
        self.unseen: list[str] = []
        self.live: list[Any] = []
        self.in_class = False
        self._frozen = 0 if slots else 1
        self._hash = hashlib.sha256()
        self._numbers: dict[tuple[int, bool], int] = {}
        self._recipes: dict[int, Recipe] = {}
        self._kept: list[Any] = []  # ids stay unique while what they name is alive
        self.bare: dict[int, Any] = {}
        self.fresh = itertools.count(-1, -1)  # numbers of new objects that stand for no one value

    @property
    def digest(self) -> str:
        """The hash of everything met so far."""
        return self._hash.hexdigest()

    def feed(self, *words: Any) -> None:
        """Let words or bytes enter the hash; their lengths too, so that no two sequences run together."""
        for word in words:
            data = (
                word if isinstance(word, (bytes, memoryview)) else str(word).encode("utf-8", "surrogatepass")
            )
            self._hash.update(b"%d:" % len(data))
            self._hash.update(data)

    def itself(self, value: Any) -> None:
        """Let an object enter by itself, because it is written to; for a store it is nothing."""
        if self.slots:
            self.feed(id(value))

    @contextlib.contextmanager
    def content(self) -> Iterator[None]:
        """Within: arrays are hashed with their bytes, because nothing can be made with others in their place."""
        self._frozen += 1
        try:
            yield
        finally:
            self._frozen -= 1

    def arguments(self, value: Any) -> Recipe:
        """Visit arguments bound to a function: all their arrays and NumPy floats are data, as in a pytree."""
        self.captured = False
        try:
            return self.visit(value)
        finally:
            self.captured = True

    def inside(self, visit: Any, value: Any) -> Recipe:
        """Visit a value with everything in it captured."""
        before, self.captured = self.captured, True
        try:
            return visit(self, value)
        finally:
            self.captured = before

    def class_digest(self, kind: type) -> str:
        """The digest of a user's class by itself."""
        walk = Walk(slots=False)
        walk.in_class = True
        objects.content_of_class(walk, kind)
        self.unseen += walk.unseen
        return walk.digest

    def visit(self, value: Any) -> Recipe:
        """Hash a value and return the recipe for it."""
        kind = type(value)
        if kind in _PLAIN:
            self.feed(kind.__name__, repr(value))
            return Keep(value, fixed=True)
        if kind is tuple:
            return self._tuple(value)
        is_array = isinstance(value, (jax.Array, np.ndarray, np.generic))
        if is_array and not self.captured:
            return self._array(value, len(self._kept))
        key = id(value), bool(self._frozen)
        number = self._numbers.get(key)
        if number is not None:
            self.feed("again", number)
            return self._recipes.get(number) or Again(number, self._recipes)
        number = self._numbers[key] = len(self._kept)
        self._kept.append(value)
        recipe = self._array(value, number) if is_array else self._other(value, number)
        self._recipes[number] = recipe
        return recipe

    def _other(self, value: Any, number: int) -> Recipe:
        container = _BY_TYPE.get(type(value))
        if container is not None:
            return container(self, value, number)
        found = functions.visit(self, value, number)
        return objects.visit(self, value, number) if found is None else found

    # Arrays

    def _array(self, value: Any, number: int) -> Recipe:
        origin = "jax" if isinstance(value, jax.Array) else "numpy"
        if self._frozen or not self._is_data(value, origin):
            return self._array_content(value)
        return self.slot(value, ("captured" if self.captured else "argument", origin))

    def slot(self, array: Any, kind: tuple[str, str]) -> Recipe:
        """A slot for an array of this kind."""
        self.feed("slot", *kind)
        self.arrays.append(array)
        self.kinds.append(kind)
        return Slot(len(self.arrays) - 1)

    def _is_data(self, value: Any, origin: str) -> bool:
        """Arrays are; integer scalars may be sizes; captured NumPy values if JAX keeps their digits."""
        if origin == "jax":
            return True
        if isinstance(value, np.generic) and value.dtype.kind not in "fc":
            return False
        if isinstance(value, np.ndarray) and type(value) is not np.ndarray:
            return not self.captured and value.dtype.kind in "biufc"
        if value.dtype.kind not in "biufc":
            return False
        return not self.captured or keeps_its_digits(value)

    def _array_content(self, value: Any) -> Recipe:
        if isinstance(value, jax.core.Tracer):
            self.feed("tracer", value.aval, id(value))
            self.unseen.append(f"an array that is being traced, {value.aval}")
            return Keep(value)
        is_key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(value) if is_key else value)
        self.feed("array", value.dtype, array.shape)
        if array.dtype.hasobject:
            for item in array.ravel().tolist():
                self.visit(item)
        else:
            self.feed(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        if type(value) not in (np.ndarray,) or not self.slots:
            return Keep(value, fixed=not isinstance(value, np.ndarray))
        return Keep(value.copy(), fixed=True)

    # Containers

    def _tuple(self, value: tuple) -> Recipe:
        self.feed("tuple", len(value))
        parts = [self.visit(item) for item in value]
        if _are_kept(parts, value):
            return Keep(value, fixed=all(part.fixed for part in parts))
        return Make(next(self.fresh), lambda kitchen: tuple(part(kitchen) for part in parts))

    def _list(self, value: Any, number: int) -> Recipe:
        kind, length = type(value), getattr(value, "maxlen", None)
        self.feed(kind.__name__, len(value), length)
        if len(value) >= _LONG and set(map(type, value)) <= _MARSHALLED:
            self.feed(marshal.dumps(list(value), 2))
            copied = list(value)
            return Make(number, lambda _: kind(copied) if length is None else kind(copied, length))
        parts = [self.visit(item) for item in value]
        return Make(
            number,
            lambda _: kind() if length is None else kind((), length),
            lambda kitchen, made: made.extend(part(kitchen) for part in parts),
        )

    def _dict(self, value: dict, number: int) -> Recipe:
        self.feed(type(value).__name__, len(value))
        keys = list(value)
        if not self.captured:  # as a pytree
            with contextlib.suppress(TypeError):
                keys = sorted(keys)
        factory = self.visit(getattr(value, "default_factory", None))
        parts = [(self.visit(key), self.visit(value[key])) for key in keys]
        kind = type(value)
        return Make(
            number,
            lambda kitchen: kind(factory(kitchen)) if kind is defaultdict else kind(),
            lambda kitchen, made: made.update((key(kitchen), item(kitchen)) for key, item in parts),
        )

    def _set(self, value: Any, number: int) -> Recipe:
        def alone(item: Any) -> str:
            walk = Walk(slots=False)
            walk.visit(item)
            return walk.digest

        kind = type(value)
        self.feed(kind.__name__, len(value))
        items = sorted(value, key=alone)
        parts = [self.visit(item) for item in items]
        if kind is frozenset and _are_kept(parts, items):
            return Keep(value, fixed=all(part.fixed for part in parts))
        return Make(number, lambda kitchen: kind(part(kitchen) for part in parts))


def _are_kept(parts: list[Recipe], items: Any) -> bool:
    """Whether each recipe hands on the item itself."""
    return all(isinstance(part, Keep) and part.value is item for part, item in zip(parts, items, strict=True))


_BY_TYPE: dict[type, Callable[[Walk, Any, int], Recipe]] = {
    list: Walk._list,
    deque: Walk._list,
    dict: Walk._dict,
    OrderedDict: Walk._dict,
    defaultdict: Walk._dict,
    set: Walk._set,
    frozenset: Walk._set,
}
