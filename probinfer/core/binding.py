"""Functions with arguments bound to them, as pytrees: arrays are data, everything else is the structure.

A log density is handed to jitted loops as an *argument*. ``LogDensity(fn, X, y)`` is therefore a pytree whose leaves
are the arrays found in the bound arguments and in what ``fn`` depends on: its closure, the object behind a bound
method, the globals and the helpers that it reads. All the rest is read when the object is made
(``probinfer.core.identity``): two objects share compiled code exactly if their functions compute the same, whatever the
function objects are, and what is changed later, in place or by rebinding a name, does not reach an object made before.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import MethodType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from probinfer.core.identity import Known, Structure, Walk, is_settled, structure_of
from probinfer.core.identity.recipes import Keep, Make, Recipe, Walking
from probinfer.core.types import strong_array

__all__ = ["Bound", "Frozen", "Held", "LogDensity", "StochasticLogDensity", "frozen", "hold"]

T = TypeVar("T", bound=type)


class _Calls(threading.local):
    """How many bound functions call one another, and whether they see values in the place of traced arrays."""

    depth = 0
    looked_at: list | None = None  # structures of which values were given, while they are


_calls = _Calls()


def _pytree(cls: T) -> T:
    """Register a class of ``data`` and ``structure``; what JAX keeps knows the values that the data have now."""

    def flatten_with_keys(obj: Any) -> tuple:
        return ((jax.tree_util.GetAttrKey("data"), obj.data),), obj.structure.with_values(obj.data)

    def flatten(obj: Any) -> tuple:
        return (obj.data,), obj.structure.with_values(obj.data)

    def unflatten(structure: Structure, children: Any) -> Any:
        (data,) = children
        obj: Any = object.__new__(cls)
        obj._set(data, structure)
        return obj

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


@_pytree
class Held(Known):
    """A value with everything it depends on, as it was when it was handed in.

    Attributes:
        data: the arrays, in the order in which they were met.
        structure: everything else.
    """

    __slots__ = ("__weakref__", "_made", "data", "structure")
    data: tuple
    structure: Structure

    def _set(self, data: Any, structure: Structure) -> None:
        self.data, self.structure = data, structure
        self._made: tuple = ()

    def _hand_in(self, label: str, visit: Any) -> None:
        structure, arrays, kinds = structure_of(visit, label)
        data = tuple(_as_data(a, *kind) for a, kind in zip(arrays, kinds, strict=True))
        self._set(data, structure.with_values(data))

    def visited(self, walk: Walking, number: int) -> Recipe:
        """In another walk it stands for its value: known by its digest, its arrays in slots of their own."""
        if not walk.slots:
            return walk.visit(self.value)
        walk.feed("held", self.structure.digest)
        parts = self._slots(walk)
        if not parts:
            return Keep(self.value)
        return Make(number, lambda kitchen: self.structure.make([part(kitchen) for part in parts]))

    def _slots(self, walk: Walking) -> list[Recipe]:
        return [walk.slot(a, kind) for a, kind in zip(self.data, self.structure.kinds, strict=True)]

    @property
    def value(self) -> Any:
        """The value, made once for these data; with the values of traced arrays where a function looks at them."""
        if _calls.looked_at is not None:
            arrays = self.structure.concrete(self.data)
            if arrays is not None:
                _calls.looked_at.append(self.structure)
                return self.structure.make(arrays)
        if not self._made:
            self._made = (self.structure.make(self.data),)
        return self._made[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.structure.label}, {len(self.data)} arrays)"


def hold(value: Any) -> Held:
    """Take a value with everything it depends on; bound to a function it stands for itself.

    A value that is bound to several functions is read once.
    """
    held = object.__new__(Held)
    held._hand_in(getattr(value, "__qualname__", type(value).__name__), lambda walk: walk.arguments(value))
    return held


def _as_data(array: Any, place: str, origin: str) -> Any:
    """A copy of a NumPy array, which may be changed in place later; a strong array of an argument."""
    if origin == "numpy":
        if isinstance(array, jax.Array):  # one that was taken from NumPy before
            return array
        with jax.ensure_compile_time_eval():
            return jnp.array(array)
    return strong_array(array) if place == "argument" else array


class Frozen(Known):
    """A function that is a static field: equal to another one that depends on the same, captured arrays included.

    One on the host that holds what cannot be copied is called itself, so it is equal to itself alone.
    """

    __slots__ = ("__weakref__", "_live", "structure")
    structure: Structure
    _live: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function as it was when it was taken."""
        fn = self.structure.make(()) if self._live is None else self._live
        return fn(*args, **kwargs)

    def visited(self, walk: Walking, number: int) -> Recipe:
        """In another walk it is known by its digest."""
        if not walk.slots:
            return walk.visit(self.structure.make(()) if self._live is None else self._live)
        walk.feed("frozen", self.structure.digest if self._live is None else _as_object(self._live))
        return Keep(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Frozen) or self._live is not None or other._live is not None:
            return isinstance(other, Frozen) and _as_object(self._live) == _as_object(other._live)
        return self.structure == other.structure

    def __hash__(self) -> int:
        return hash(self.structure) if self._live is None else hash(_as_object(self._live))

    def __repr__(self) -> str:
        return self.structure.label


def _as_object(fn: Any) -> Any:
    """The objects of a callable: bound methods are made anew whenever they are looked up."""
    return (id(fn.__self__), id(fn.__func__)) if isinstance(fn, MethodType) else id(fn)


def frozen(fn: Any, *, on_host: bool = False) -> Any:
    """Take a function that is to be a static field; installed functions stay as they are.

    Args:
        fn: a callable.
        on_host: it runs outside JAX: one that holds what cannot be copied (a connection, a pool) is called itself.
    """
    if is_settled(fn) or isinstance(fn, Frozen):
        return fn

    def visit(walk: Walk) -> Recipe:
        with walk.content():
            return walk.visit(fn)

    taken = object.__new__(Frozen)
    taken.structure = structure_of(visit, getattr(fn, "__qualname__", type(fn).__name__))[0]
    taken._live = fn if on_host and taken.structure.holds_live else None
    return taken


@_pytree
class Bound(Held):
    """``fn`` with leading and keyword arguments bound: ``bound(*call_args) = fn(*args, *call_args, **kwargs)``.

    The leaves of the object are the array leaves of the arguments and the arrays that ``fn`` depends on. Python numbers
    and NumPy integer scalars are part of the structure, so that they may be sizes and flags; a floating number that
    changes from call to call should be an array.

    A function that looks at the values of NumPy arrays, or of captured arrays, in Python (``int(g.max()) + 1``,
    ``np.log(y)``) is given the values, and new values compile again. JAX arrays bound as arguments are traced.
    """

    __slots__ = ()

    def __init__(self, fn: Any, *args: Any, **kwargs: Any):
        if not callable(fn):
            raise TypeError(
                f"the first argument must be a function, got {type(fn).__name__}; pass data after it"
            )

        def visit(walk: Walk) -> Recipe:
            parts = walk.visit(fn), walk.arguments(args), walk.arguments(kwargs)
            return Make(next(walk.fresh), lambda kitchen: tuple(part(kitchen) for part in parts))

        self._hand_in(getattr(fn, "__qualname__", type(fn).__name__), visit)

    def visited(self, walk: Walking, number: int) -> Recipe:
        """In another walk it is a function with slots of its own."""
        if not walk.slots:
            return walk.visit(self.value)
        walk.feed("bound", type(self).__name__, self.structure.digest)
        parts = self._slots(walk)
        if not parts:
            return Keep(self)
        return Make(number, lambda kitchen: self._with([part(kitchen) for part in parts]))

    def _with(self, arrays: list) -> Bound:
        other = object.__new__(type(self))
        other._set(tuple(arrays), self.structure.with_values(self.data))
        return other

    def __call__(self, *call_args: Any) -> Any:
        """Call the function with the bound arguments before ``call_args``."""
        try:
            with _calling(_calls.looked_at):
                return self._call(call_args)
        except Exception:
            if _calls.depth or self.structure.concrete(self.data) is None:
                raise
        looked_at: list[Structure] = []
        with _calling(looked_at):
            result = self._call(call_args)
        for structure in looked_at:
            structure.looks_at_values()
        return result

    def _call(self, call_args: tuple) -> Any:
        fn, args, kwargs = self.value
        return fn(*args, *call_args, **kwargs)


@contextlib.contextmanager
def _calling(looked_at: list | None) -> Iterator[None]:
    before = _calls.depth, _calls.looked_at
    _calls.depth, _calls.looked_at = before[0] + 1, looked_at
    try:
        yield
    finally:
        _calls.depth, _calls.looked_at = before


@_pytree
class LogDensity(Bound):
    """A log density of a position, with its data bound: ``log_density(position) -> ()``.

    Example:
        >>> import jax.numpy as jnp
        >>> def log_normal_density(loc, position):
        ...     return -0.5 * jnp.sum((position - loc) ** 2)
        >>> log_density = LogDensity(log_normal_density, jnp.ones(2))
        >>> float(log_density(jnp.zeros(2)))
        -1.0
    """

    __slots__ = ()


@_pytree
class StochasticLogDensity(Bound):
    """An unbiased estimate of a log density, with its data bound: ``estimate(key, position) -> ()``.

    One key a step is shared by all particles or chains of that step.
    """

    __slots__ = ()
