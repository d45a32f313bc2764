"""Which code is installed and which is the user's.

Installed code (the standard library, site-packages, probinfer) does not change while a process runs: its functions,
classes and modules are known by their name and version. Everything else is the user's and is looked into.
"""

from __future__ import annotations

import importlib.metadata
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["is_installed", "is_module_constant", "resolves", "version_of"]

_PLACES = tuple(
    str(Path(place).resolve())
    for place in {
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        str(Path(__file__).parents[2]),
    }
)


def is_installed(module_name: str | None) -> bool:
    """Say whether a module, by its name, belongs to the installation; unknown modules are the user's."""
    if not module_name or module_name == "__main__" or module_name not in sys.modules:
        return False
    return _is_installed(module_name)


@cache
def _is_installed(module_name: str) -> bool:
    module = sys.modules[module_name]
    file = getattr(module, "__file__", None)
    if file is None:
        if module_name in sys.builtin_module_names:
            return True
        spec = getattr(module, "__spec__", None)
        if spec is not None and spec.origin in ("built-in", "frozen"):
            return True
        file = next(iter(getattr(module, "__path__", ())), None)
        if file is None:  # made by hand, as importlib.util and six do: by the package that it is part of
            parent = module_name.rpartition(".")[0]
            return bool(parent) and is_installed(parent)
    path = Path(file).resolve()
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    return any(path.is_relative_to(place) for place in _PLACES)


@cache
def version_of(module_name: str) -> str:
    """The version of the distribution a module belongs to; empty where it has none (the standard library)."""
    top = module_name.partition(".")[0]
    found = getattr(sys.modules.get(top), "__version__", None)
    if isinstance(found, str):
        return found
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        return ""


def resolves(value: Any) -> bool:
    """Say whether a function or class is what its module has under its qualified name."""
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    for part in (getattr(value, "__qualname__", None) or "<locals>").split("."):
        found = getattr(found, part, None)
    return found is value


def is_module_constant(value: Any) -> bool:
    """Say whether an object of an installed class is a global of the module of that class (a registry, a sentinel)."""
    module = sys.modules.get(type(value).__module__)
    return isinstance(module, ModuleType) and any(item is value for item in vars(module).values())
