"""Functions in a walk: their code, defaults, closures, and the globals that they read.

A user's function is made anew with a dictionary of its own in place of its globals and with cells of its own in its
closure, and so are the helpers it calls, the functions inside ``functools.partial``, ``jax.jit``, ``jax.custom_jvp``
and bound methods. What a function itself rebinds or changes in place (a counter, a memo) is its output: shared with
the original, and known by its object and not by what stands in it. A function that is defined again, with a list of its
own to write to, is therefore another one, although its code is the same.
"""

from __future__ import annotations

import builtins
import functools
import sys
from collections import deque
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any

import jax

from probinfer.core.identity import objects
from probinfer.core.identity.bytecode import Reads, reads
from probinfer.core.identity.installed import is_installed, resolves, version_of
from probinfer.core.identity.modules import visit_import, visit_module
from probinfer.core.identity.recipes import Keep, Kitchen, Make, Recipe, Walking

__all__ = ["is_settled", "visit"]

_JITTED = type(jax.jit(lambda: None))
_MEMO = type(functools.lru_cache(lambda: None))
_CONTAINERS = (list, dict, set, deque, bytearray)
_LOOK_UP = frozenset(("__import__", "eval", "exec", "globals"))
_EMPTY = object()


def is_settled(fn: Any) -> bool:
    """Say whether a callable is installed code found by its name, which depends on nothing of the user's."""
    if isinstance(fn, FunctionType):
        return _is_installed(fn) and resolves(fn)
    if isinstance(fn, (_JITTED, _MEMO, type)):
        return is_installed(fn.__module__) and resolves(fn)
    return isinstance(fn, BuiltinFunctionType) and isinstance(fn.__self__, (ModuleType, type(None)))


def _is_installed(fn: FunctionType) -> bool:
    """Say whether the globals of a function are those of an installed module, not a copy made by ``exec``."""
    module = fn.__globals__.get("__name__")
    return is_installed(module) and _in_its_module(fn)


def _in_its_module(fn: FunctionType) -> bool:
    return getattr(sys.modules.get(fn.__globals__.get("__name__") or ""), "__dict__", None) is fn.__globals__


def visit(walk: Walking, value: Any, number: int) -> Recipe | None:
    """The recipe of a function of any sort; ``None`` where the value is none."""
    found = next((visitor for kind, visitor in _VISITORS if isinstance(value, kind)), None)
    if found is None:
        return None
    if is_settled(value):
        name = f"{value.__module__}.{value.__qualname__}"
        walk.feed("installed", name, version_of(value.__module__ or ""))
        return Keep(value, fixed=True)
    return walk.inside(lambda inner, fn: found(inner, fn, number), value)


def _function(walk: Walking, fn: FunctionType, number: int) -> Recipe:
    found = reads(fn.__code__)
    walk.feed("function", fn.__qualname__, _digest_of_code(fn.__code__))
    defaults, keywords = walk.visit(fn.__defaults__), walk.visit(fn.__kwdefaults__)
    names = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
    cells = [_cell(walk, name, cell, found) for name, cell in names]
    outside, is_live = _globals(walk, fn, found)
    attributes = {}
    for name in sorted(set(vars(fn)) - {attribute for _, attribute in found.assigned}):
        walk.feed("attribute", name)
        attributes[name] = walk.visit(vars(fn)[name])
    if is_live:
        walk.live.append(fn)
        return Keep(fn)
    parts = [defaults, keywords, *outside.values(), *attributes.values()]
    if not cells and all(part.fixed for part in parts) and not _rebinds_later(fn, outside):
        return Keep(fn, fixed=True)
    space = {
        "__builtins__": fn.__globals__.get("__builtins__", builtins),
        "__name__": fn.__globals__.get("__name__"),
    }

    def create(kitchen: Kitchen) -> FunctionType:
        own = fn.__globals__ if _is_installed(fn) else dict(space)
        made = FunctionType(fn.__code__, own, fn.__name__, None, tuple(cell(kitchen) for cell in cells))
        made.__defaults__ = defaults(kitchen)
        made.__qualname__, made.__module__, made.__doc__ = fn.__qualname__, fn.__module__, fn.__doc__
        made.__annotations__ = fn.__annotations__
        return made

    def fill(kitchen: Kitchen, made: FunctionType) -> None:
        made.__kwdefaults__ = keywords(kitchen)
        if made.__globals__ is not fn.__globals__:
            made.__globals__.update((name, part(kitchen)) for name, part in outside.items())
        vars(made).update((name, part(kitchen)) for name, part in attributes.items())

    return Make(number, create, fill)


def _rebinds_later(fn: FunctionType, outside: dict[str, Recipe]) -> bool:
    """Whether it reads a user's global: the name may be bound to another value later. Imported names are not."""
    if outside and not _in_its_module(fn):
        return True
    values = ((name, fn.__globals__[name]) for name in outside)
    return any(
        not isinstance(value, ModuleType) and not (is_settled(value) and value.__name__ == name)
        for name, value in values
    )


def _cell(walk: Walking, name: str, cell: CellType, found: Reads) -> Recipe:
    value = _EMPTY
    try:
        value = cell.cell_contents
    except ValueError:
        walk.feed("empty")
    if name in found.rebound or (name in found.changed and isinstance(value, _CONTAINERS)):
        walk.feed("written", name)
        walk.itself(cell)
        return Keep(cell)
    written = _written(name, value, found)
    if written:
        objects.visit_without(walk, value, written)
        return Keep(cell)
    return walk.visit(cell)


def _visit_cell(walk: Walking, cell: CellType, number: int) -> Recipe:
    try:
        content = walk.visit(cell.cell_contents)
    except ValueError:
        return Make(number, lambda _: CellType())

    def fill(kitchen: Kitchen, made: CellType) -> None:
        made.cell_contents = content(kitchen)

    return Make(number, lambda _: CellType(), fill)


def _globals(walk: Walking, fn: FunctionType, found: Reads) -> tuple[dict[str, Recipe], bool]:
    """Recipes of the user's globals by name, and whether the function must stay with the globals it has."""
    space = fn.__globals__
    if _is_installed(fn):
        return {}, False
    outside: dict[str, Recipe] = {}
    is_live = False
    for name, chains in found.names:
        if name not in space:
            walk.feed("builtin" if hasattr(builtins, name) else "missing", name)
            if name in _LOOK_UP:
                walk.unseen.append(f"what {fn.__qualname__} finds by {name}()")
        elif name in found.rebound:
            walk.itself(space)
            is_live = True
        else:
            walk.feed("global", name)
            outside[name] = _outside(walk, name, space[name], chains, found)
    for name, taken in found.imports:
        is_live |= visit_import(walk, name, taken)
    return outside, is_live or bool(found.rebound & set(space))


def _outside(walk: Walking, name: str, value: Any, chains: tuple, found: Reads) -> Recipe:
    if name in found.changed and isinstance(value, _CONTAINERS):
        walk.feed("written")
        walk.itself(value)
        return Keep(value)
    if isinstance(value, ModuleType):
        return visit_module(walk, value, chains)
    written = _written(name, value, found)
    if written:
        objects.visit_without(walk, value, written)
        return Keep(value)
    return walk.visit(value)


def _written(name: str, value: Any, found: Reads) -> frozenset[str]:
    """The attributes that a function sets or changes in place on the object of a name."""
    return objects.written_to(
        value, {a for n, a in found.assigned if n == name}, {a for n, a in found.filled if n == name}
    )


@functools.lru_cache(maxsize=4096)
def _digest_of_code(code: CodeType) -> bytes:
    """What a code object does: its instructions, names and constants, not where it stands in a file."""
    return repr(
        (
            code.co_code,
            code.co_names,
            code.co_varnames,
            code.co_freevars,
            code.co_cellvars,
            (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags),
            getattr(code, "co_exceptiontable", b""),
            tuple(_constant(constant) for constant in code.co_consts),
        )
    ).encode("utf-8", "surrogatepass")


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _digest_of_code(value)
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    if isinstance(value, frozenset):
        return sorted(repr(_constant(item)) for item in value)
    return type(value).__name__, repr(value)


# Callables that wrap a function


def _method(walk: Walking, method: MethodType, number: int) -> Recipe:
    function, owner = method.__func__, method.__self__
    walk.feed("method")
    call = walk.visit(function)
    if isinstance(owner, type):
        bound = walk.visit(owner)
    else:
        bound = objects.visit_owner(walk, owner, function)
    return Make(number, lambda kitchen: MethodType(call(kitchen), bound(kitchen)))


def _builtin_method(walk: Walking, method: Any, number: int) -> Recipe:
    walk.feed("method", method.__name__)
    owner = walk.visit(method.__self__)
    return Make(number, lambda kitchen: getattr(owner(kitchen), method.__name__))


def _partial(walk: Walking, value: functools.partial, number: int) -> Recipe:
    kind = type(value)
    walk.feed("partial", kind.__qualname__)
    func, args, keywords = walk.visit(value.func), walk.visit(value.args), walk.visit(value.keywords)
    return Make(number, lambda kitchen: kind(func(kitchen), *args(kitchen), **_filled(keywords, kitchen)))


def _filled(recipe: Recipe, kitchen: Kitchen) -> dict:
    """A dictionary that is needed complete: its filling is done now."""
    made = recipe(kitchen)
    if isinstance(recipe, Make) and recipe.fill is not None and not made:
        recipe.fill(kitchen, made)
    return made


def _jitted(walk: Walking, value: Any, number: int) -> Recipe:
    """A jitted function keeps its traces: one whose function is made anew is jitted anew with its settings."""
    info = value._jit_info
    walk.feed("jit", info.static_argnums, info.static_argnames, info.inline)
    function = walk.visit(value.__wrapped__)
    if isinstance(function, Keep):
        if not function.fixed:
            walk.live.append(value)
        return Keep(value, fixed=function.fixed)
    settings = {
        "static_argnums": info.static_argnums,
        "static_argnames": info.static_argnames,
        "inline": info.inline,
    }
    return Make(number, lambda kitchen: jax.jit(function(kitchen), **settings))


def _memoized(walk: Walking, value: Any, number: int) -> Recipe:
    walk.feed("memo")
    function, settings = walk.visit(value.__wrapped__), value.cache_parameters()
    if function.fixed:
        return Keep(value, fixed=True)
    return Make(number, lambda kitchen: functools.lru_cache(**settings)(function(kitchen)))


_VISITORS = (
    (FunctionType, _function),
    (MethodType, _method),
    (functools.partial, _partial),
    (_JITTED, _jitted),
    (_MEMO, _memoized),
    ((BuiltinFunctionType, MethodWrapperType), _builtin_method),
    (CellType, _visit_cell),
)
