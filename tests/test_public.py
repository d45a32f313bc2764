"""The public surface: every module says what it offers, all of it exists and is described, examples run."""

import ast
import doctest
import importlib
import inspect
import pkgutil

import pytest

import probinfer

MODULES = sorted(
    ["probinfer"]
    + [
        info.name
        for info in pkgutil.walk_packages(probinfer.__path__, "probinfer.")
        if not info.name.endswith("__main__")
    ]
)


def is_signpost(module) -> bool:
    """A package that re-exports nothing: its docstring leads to its files."""
    body = ast.parse(inspect.getsource(module)).body
    return hasattr(module, "__path__") and len(body) == 1


@pytest.mark.parametrize("name", MODULES)
def test_module_offers_what_it_says(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    if is_signpost(module):
        return
    offered = getattr(module, "__all__", None)
    assert offered is not None, f"{name} has no __all__"
    assert len(set(offered)) == len(offered), f"{name}.__all__ repeats a name"
    missing = [entry for entry in offered if not hasattr(module, entry)]
    assert not missing, f"{name}.__all__ lists names that do not exist: {missing}"


def is_described(obj) -> bool:
    """A docstring of its own: not the signature that NamedTuple and dataclass put in its place."""
    doc = obj.__dict__.get("__doc__") if inspect.isclass(obj) else obj.__doc__
    return bool(doc) and not doc.startswith(f"{obj.__name__}(")


@pytest.mark.parametrize("name", MODULES)
def test_what_is_offered_is_described(name):
    module = importlib.import_module(name)
    for entry in getattr(module, "__all__", ()):
        obj = getattr(module, entry)
        ours = getattr(obj, "__module__", "").startswith("probinfer")
        if ours and (inspect.isclass(obj) or inspect.isroutine(obj)):
            assert is_described(obj), f"{name}.{entry} has no docstring"


SLOW = {"probinfer.smc.fusion", "probinfer.checks.calibration.numpyro_models", "probinfer.betting"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODULES]
)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_the_root_shows_what_it_offers():
    assert dir(probinfer) == sorted(probinfer.__all__)
    assert probinfer.data.read_csv
    assert issubclass(probinfer.ConvergenceWarning, UserWarning)


@pytest.mark.parametrize("name", [name for name in MODULES if "." in name])
def test_no_function_hides_its_module(name):
    """``from probinfer.room import thing`` must mean one thing: the module, or what another module defines."""
    module = importlib.import_module(name)
    parent, _, last = name.rpartition(".")
    assert getattr(importlib.import_module(parent), last) is module
    own = getattr(module, last, None)
    assert inspect.ismodule(own) or getattr(own, "__module__", None) != name
