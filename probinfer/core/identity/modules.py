"""Modules in a walk: installed ones by name and version, of a user's module the attributes that are asked of it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from probinfer.core.identity.installed import is_installed, version_of
from probinfer.core.identity.recipes import Keep, Kitchen, Make, Recipe, Walking

__all__ = ["visit_import", "visit_module"]


def visit_module(walk: Walking, module: ModuleType, chains: tuple) -> Recipe:
    """An installed module by its name and version; of a user's module the attributes that are asked of it."""
    walk.feed("module", module.__name__)
    if is_installed(module.__name__):
        walk.feed(version_of(module.__name__))
        return Keep(module, fixed=True)
    tails: dict[str, list] = {}
    for chain in chains:
        if chain:
            tails.setdefault(chain[0], []).append(chain[1:])
        else:
            walk.unseen.append(f"module {module.__name__}, which is handed on as a whole")
    parts = {}
    for name in sorted(tails):
        if not hasattr(module, name):
            walk.feed("missing", name)
            continue
        walk.feed("attribute", name)
        value = getattr(module, name)
        is_module = isinstance(value, ModuleType)
        parts[name] = visit_module(walk, value, tuple(tails[name])) if is_module else walk.visit(value)
    return Make(next(walk.fresh), lambda _: _View(module), lambda kitchen, made: made.fill(parts, kitchen))


class _View(ModuleType):
    """A module as a function saw it: the attributes that it asked for, and the module itself for all others."""

    def __init__(self, module: ModuleType):
        super().__init__(module.__name__)
        self.__dict__["_module"] = module

    def fill(self, parts: dict[str, Recipe], kitchen: Kitchen) -> None:
        self.__dict__.update((name, part(kitchen)) for name, part in parts.items())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def visit_import(walk: Walking, name: str, taken: tuple[str, ...]) -> bool:
    """Hash what a function imports from a user's module when it is called; say whether there was anything."""
    module = sys.modules.get(name)
    walk.feed("import", name)
    if module is None or is_installed(name):
        return False
    visit_module(walk, module, tuple((item,) for item in taken) or ((),))
    return True
