"""Shifted keys: ``--key-offset N`` reads every ``jax.random.key(seed)`` of the tests as ``key(seed + N)``.

A fixed key is no fixed result: programs compiled for another processor round differently, and chaotic trajectories
amplify it. A test that holds over keys holds over processors. Keys that the library makes for itself keep their
meaning, and so do NumPy's generators: they make the data of a case, with the same bits everywhere.
"""

import ast
import sys
from collections import defaultdict
from functools import cache, wraps
from pathlib import Path

import jax

TESTS = Path(__file__).parent
MAKERS = {name: getattr(jax.random, name) for name in ("key", "PRNGKey")}


def shift(offset):
    """Add the offset to the seed of every key that a file of the tests makes from here on."""
    for name, make in MAKERS.items():
        setattr(jax.random, name, _shifted(make, offset))


def _shifted(make, offset):
    @wraps(make)
    def wrapper(seed, **options):
        by_a_test = TESTS in Path(sys._getframe(1).f_code.co_filename).parents
        return make(seed + offset if by_a_test else seed, **options)

    return wrapper


def depends_on_keys(item):
    """Whether names that a test, its parameters and its fixtures use lead to code of the tests that makes a key."""
    return item.originalname in leading_to_keys(item.path)


@cache
def leading_to_keys(file):
    """Top-level names of a file and its helpers from which the making of a key is reached, fixtures for all included.

    Names are all that is looked at, strings included (they may name fixtures): this counts too many, not too few.
    """
    conftest = TESTS / "conftest.py"
    fixtures = set() if file == conftest else leading_to_keys(conftest)
    uses, makes = defaultdict(set), set()
    for statement in _statements(file):
        nodes = list(ast.walk(statement))
        names = set().union(*map(_names, nodes))
        for name in _defined(statement):
            uses[name] |= names
            if any(map(_makes_key, nodes)) or _asks_for(statement) & fixtures:
                makes.add(name)
    while more := {name for name, names in uses.items() if names & makes} - makes:
        makes |= more
    return makes


@cache
def _statements(file):
    """Top-level statements of a file and of the modules of the tests that it imports."""
    body = ast.parse(file.read_text()).body
    helpers = {helper for node in body if isinstance(node, ast.ImportFrom) for helper in _imported(node)}
    return sum((_statements(helper) for helper in sorted(helpers)), body)


def _imported(node):
    module = TESTS.parent.joinpath(*(node.module or "").split("."))
    files = [module.with_suffix(".py"), *(module / f"{alias.name}.py" for alias in node.names)]
    return [file for file in files if TESTS in file.parents and file.exists() and file != Path(__file__)]


def makes_no_key(file):
    """Whether neither a file of the tests nor one that it imports makes a key."""
    return not any(_makes_key(node) for statement in _statements(file) for node in ast.walk(statement))


def _asks_for(statement):
    """Fixtures that a test or another fixture asks for; the arguments of other functions are no fixtures."""
    if not isinstance(statement, ast.FunctionDef):
        return set()
    is_fixture = any(
        "fixture" in _names(node) for mark in statement.decorator_list for node in ast.walk(mark)
    )
    if not (is_fixture or statement.name.startswith("test")):
        return set()
    return {argument.arg for argument in statement.args.args}


def _defined(statement):
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    stored = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
    return {node.id for node in stored if isinstance(node.ctx, ast.Store)}


def _names(node):
    if isinstance(node, ast.Name):
        return {node.id}
    if isinstance(node, ast.Attribute):
        return {node.attr}
    if isinstance(node, ast.arg):
        return {node.arg}
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def _makes_key(node):
    return isinstance(node, ast.Attribute) and node.attr in MAKERS and "random" in _names(node.value)
