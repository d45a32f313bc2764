"""Objects and classes in a walk.

A registered pytree is taken apart and put together as JAX does it; an object that pickles by default is copied with
its attributes. A user's class is known by what stands in it, and stays itself: its methods read the globals of their
module as they are when they are traced. Objects with a pickling of their own are known by what they would pickle.
"""

from __future__ import annotations

import abc
import copy
import enum
import random
from collections import deque
from collections.abc import Iterator
from types import (
    BuiltinFunctionType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    ModuleType,
    SimpleNamespace,
    WrapperDescriptorType,
)
from typing import Any, cast

import jax
import numpy as np
from jax.tree_util import default_registry

from probinfer.core.identity.bytecode import reads
from probinfer.core.identity.installed import is_installed, is_module_constant, resolves, version_of
from probinfer.core.identity.modules import visit_module
from probinfer.core.identity.recipes import Keep, Kitchen, Make, Recipe, Walking

__all__ = [
    "Known",
    "content_of_class",
    "visit",
    "visit_owner",
    "visit_without",
    "written_to",
]

_TABLES = ("pandas", "polars", "pyarrow", "xarray")  # copied by copy.deepcopy, which shares no numbers
_DESCRIPTORS = (
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    WrapperDescriptorType,
    BuiltinFunctionType,
)
_NOT_CONTENT = frozenset(
    (  # what Python and the standard library add to a class
        *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__", "__slots__"),
        *("__slotnames__", "__static_attributes__", "__firstlineno__", "__match_args__", "__orig_bases__"),
        *(
            "__parameters__",
            "__abstractmethods__",
            "_abc_impl",
            "__dataclass_fields__",
            "__dataclass_params__",
        ),
    )
)
_NUMBERS = (("flax.ids", "FlaxId"),)  # tell equal objects apart, which is no content
_USED_UP = (np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random, Iterator)
_OWN_PICKLING = ("__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__")


class Known:
    """Base of objects that know their digest and their recipe: ``visited(walk, number) -> Recipe``."""

    __slots__ = ()

    @abc.abstractmethod
    def visited(self, walk: Walking, number: int) -> Recipe:
        """Feed the walk and return the recipe."""


def visit(walk: Walking, value: Any, number: int) -> Recipe:
    """The recipe of anything that is no array, plain container or function."""
    kind = type(value)
    if isinstance(value, Known):
        return value.visited(walk, number)
    if isinstance(value, type):
        return _class(walk, value)
    if isinstance(value, ModuleType):
        return visit_module(walk, value, ((),))
    if isinstance(value, _DESCRIPTORS) or kind.__name__ == "_tuplegetter":
        walk.feed("descriptor", getattr(value, "__name__", kind.__name__))
        return Keep(value, fixed=True)
    if isinstance(value, (staticmethod, classmethod, property)):
        return walk.inside(_wrapper, value)
    if isinstance(value, (np.dtype, jax.tree_util.PyTreeDef)):
        return _named(walk, value)
    if (kind.__module__, kind.__qualname__) in _NUMBERS:
        walk.feed("number")
        return Keep(value, fixed=True)
    if isinstance(value, enum.Enum):
        walk.feed("enum", kind.__module__, kind.__qualname__, value.name)
        return Keep(value, fixed=True)
    if isinstance(value, MappingProxyType):
        return walk.visit(dict(value))
    if is_installed(kind.__module__) and is_module_constant(value):
        walk.feed("constant", kind.__module__, kind.__qualname__, getattr(value, "__name__", ""))
        return Keep(value, fixed=True)
    if isinstance(value, tuple):
        return _named_tuple(walk, value, number)
    if default_registry.flatten_one_level(value) is not None:
        return _pytree(walk, value, number)
    call = vars(kind).get("__call__")
    without = frozenset() if call is None or is_installed(kind.__module__) else _written_to(value, call)
    if without:
        visit_without(walk, value, without)
        return Keep(value)
    return walk.inside(lambda inner, owner: _object(inner, owner, number, frozenset()), value)


def _wrapper(walk: Walking, value: Any) -> Recipe:
    walk.feed(type(value).__name__)
    parts = (value.fget, value.fset, value.fdel) if isinstance(value, property) else (value.__func__,)
    for part in parts:
        walk.visit(part)
    return Keep(value)


def _named(walk: Walking, value: Any) -> Recipe:
    """A dtype by its name, the structure of a pytree by its nodes."""
    walk.feed(type(value).__name__)
    if isinstance(value, np.dtype):
        walk.feed(value.str, value.name)
        return Keep(value, fixed=True)
    data = value.node_data()
    with walk.content():
        walk.visit(data)
        for child in value.children():
            _named(walk, child)
    return Keep(value, fixed=True)


def _named_tuple(walk: Walking, value: tuple, number: int) -> Recipe:
    kind = type(value)
    walk.visit(kind)
    walk.feed("named tuple", len(value))
    parts = [walk.visit(item) for item in value]
    if not hasattr(kind, "_fields"):
        return Keep(value)
    return Make(number, lambda kitchen: tuple.__new__(kind, [part(kitchen) for part in parts]))


def _pytree(walk: Walking, value: Any, number: int) -> Recipe:
    """A registered pytree: its children are visited, the rest of it is static and stays as it is."""
    _, aux = default_registry.flatten_one_level(value)
    structure: Any
    children, structure = jax.tree.flatten(value, is_leaf=lambda node: node is not value)
    walk.feed("pytree", len(children))
    walk.visit(type(value))
    with walk.content():
        walk.inside(lambda inner, static: inner.visit(static), aux)
    parts = [walk.visit(child) for child in children]
    return Make(number, lambda kitchen: structure.unflatten([part(kitchen) for part in parts]))


# Objects


def _object(walk: Walking, value: Any, number: int, without: frozenset[str]) -> Recipe:
    kind = type(value)
    walk.visit(kind)
    if kind is SimpleNamespace:
        args, state, items, pairs = (), vars(value), None, None
    elif _pickles_by_default(kind):
        try:
            _, args, state, items, pairs = (*object.__reduce_ex__(value, 2), None, None)[:5]
        except TypeError:
            return _opaque(walk, value)
    else:
        return _by_pickling(walk, value)
    attributes, slots = state if isinstance(state, tuple) else (state or {}, {})
    state = {**(attributes or {}), **slots}
    parts = {}
    for name in sorted(map(str, set(state) - without)):
        walk.feed("attribute", name)
        parts[name] = walk.visit(state[name])
    if len(args) > 1 or items is not None or pairs is not None:  # a subclass of a built-in type
        with walk.content():
            walk.visit((args[1:], list(items or ()), list(pairs or ())))
        walk.live.append(value)
        return Keep(value)
    kept = all(isinstance(part, Keep) and part.value is state[name] for name, part in parts.items())
    if not state or (kept and is_installed(kind.__module__)):
        return Keep(value, fixed=not state)
    in_dict, new = set(attributes or {}), cast(Any, kind).__new__

    def fill(kitchen: Kitchen, made: Any) -> None:
        for name, part in parts.items():
            if name in in_dict:
                made.__dict__[name] = part(kitchen)
            else:
                object.__setattr__(made, name, part(kitchen))

    return Make(number, lambda _: new(kind), fill)


def _pickles_by_default(kind: type) -> bool:
    plain = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
    return plain and all(getattr(kind, n, None) is getattr(object, n, None) for n in _OWN_PICKLING)


def _by_pickling(walk: Walking, value: Any) -> Recipe:
    """An object with its own pickling: by what it would pickle, which is read and not copied.

    One that changes by being used is known by itself too: another in the state that it had is not the same later.
    """
    if isinstance(value, _USED_UP):
        walk.itself(value)
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:  # whatever a foreign object raises, it cannot be read
        return _opaque(walk, value)
    if isinstance(reduced, str):
        walk.feed("global", reduced)
        return Keep(value, fixed=True)
    func, args, state, items, pairs = (*reduced, None, None, None)[:5]
    with walk.content():
        walk.visit((func, args, state, list(items or ()), list(pairs or ())))
    if walk.slots and type(value).__module__.partition(".")[0] in _TABLES:
        return Keep(copy.deepcopy(value))
    walk.live.append(value)
    return Keep(value)


def _opaque(walk: Walking, value: Any) -> Recipe:
    """What cannot be read: in a process it is itself, for a store it is its type, and the walk says so."""
    kind = type(value)
    walk.unseen.append(f"an object of {kind.__module__}.{kind.__qualname__}, which cannot be read")
    walk.feed("opaque", kind.__module__, kind.__qualname__)
    if walk.slots:
        walk.feed(id(value))
        walk.live.append(value)
    return Keep(value)


def visit_without(walk: Walking, value: Any, without: frozenset[str]) -> None:
    """Hash an object that the function writes to, without the attributes that it sets; the object itself stays."""
    walk.itself(value)
    if isinstance(value, FunctionType):
        walk.visit(walk.bare.setdefault(id(value), _without_attributes(value)))
    elif _pickles_by_default(type(value)) or isinstance(value, SimpleNamespace):
        walk.inside(lambda inner, owner: _object(inner, owner, -1, without), value)
    else:
        walk.feed("written")


def _without_attributes(fn: FunctionType) -> FunctionType:
    bare = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    bare.__kwdefaults__, bare.__qualname__ = fn.__kwdefaults__, fn.__qualname__
    return bare


def visit_owner(walk: Walking, owner: Any, function: Any) -> Recipe:
    """The object behind a bound method; one that the method writes to is shared, without what is written."""
    without = _written_to(owner, function)
    if not without or default_registry.flatten_one_level(owner) is not None:
        return walk.visit(owner)
    visit_without(walk, owner, without)
    return Keep(owner)


def _written_to(owner: Any, function: Any) -> frozenset[str]:
    """Names of the attributes of an object that one of its methods sets or changes in place."""
    return written_to(owner, *_written_by(type(owner), function, set()))


def written_to(value: Any, assigned: set[str], filled: set[str]) -> frozenset[str]:
    """Names of the attributes of an object that are set, and of those that are containers and are filled."""
    state = getattr(value, "__dict__", None)
    if state is None or isinstance(value, type):
        return frozenset()
    return frozenset(
        assigned | {name for name in filled if isinstance(state.get(name), (list, dict, set, deque))}
    )


def _written_by(kind: type, function: Any, seen: set) -> tuple[set[str], set[str]]:
    """Attributes that a method, and the methods of its class that it names, assign or change in place."""
    code = getattr(function, "__code__", None)
    if code is None or code in seen:
        return set(), set()
    seen.add(code)
    found, this = reads(code), "".join(code.co_varnames[:1])
    assigned = {attribute for name, attribute in found.assigned if name == this}
    filled = {attribute for name, attribute in found.filled if name == this}
    for name in code.co_names:
        if name != "__init__":
            more = _written_by(kind, getattr(kind, name, None), seen)
            assigned |= more[0]
            filled |= more[1]
    return assigned, filled


# Classes


def _class(walk: Walking, kind: type) -> Recipe:
    walk.feed("class", kind.__module__, kind.__qualname__)
    if is_installed(kind.__module__):
        walk.feed(version_of(kind.__module__))
        if not resolves(kind) and walk.slots:
            walk.feed(id(kind))
        return Keep(kind, fixed=True)
    if walk.in_class:
        content_of_class(walk, kind)
    else:
        walk.feed(walk.class_digest(kind))
        walk.live.append(kind)
    return Keep(kind)


def content_of_class(walk: Walking, kind: type) -> None:
    """Hash what stands in a user's class and in its user-made bases: methods, values, properties."""
    for base in kind.__mro__:
        if is_installed(base.__module__):
            walk.feed(base.__module__, base.__qualname__)
            continue
        for name in sorted(set(vars(base)) - _NOT_CONTENT):
            walk.feed(name)
            walk.visit(vars(base)[name])
