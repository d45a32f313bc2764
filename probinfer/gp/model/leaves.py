"""The leaves of a model by name: dotted paths such as ``kernel.lengthscale``, their constraints, and replacement.

A tree shaped like a model may have distributions or markers in place of numbers. NumPyro's distributions are pytrees
themselves, so such trees are traversed along the structure of the model and never flattened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from numpyro.distributions import constraints

__all__ = ["constraint_of", "get_leaf", "leaf_names", "map_named", "replace"]


def leaf_names(model: Any) -> tuple[str, ...]:
    """The dotted names of the leaves of a model, in the order of ``jax.tree.leaves``."""
    paths, _ = jax.tree_util.tree_flatten_with_path(model)
    return tuple(_dotted(path) for path, _ in paths)


def map_named(fn: Callable, model: Any) -> Any:
    """Build a tree shaped like ``model`` with ``fn(name, leaf)`` at its leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(_dotted(path), leaf), model)


def get_leaf(tree: Any, name: str) -> Any:
    """The leaf or part of a tree at a dotted name.

    Raises:
        KeyError: nothing has that name.
    """
    for part in name.split("."):
        tree = _child(tree, part, name)
    return tree


def replace(tree: Any, values: dict[str, Any]) -> Any:
    """Replace leaves by dotted name, for example ``replace(prior, {"kernel.variance": gp.fixed})``.

    Args:
        tree: a model, or a prior shaped like one.
        values: new leaves by dotted name.

    Returns:
        A new tree; the argument is not changed.

    Raises:
        KeyError: nothing in the tree has that name; the message lists the parts that it has.
    """
    for name, value in values.items():
        tree = _replaced(tree, name.split("."), value, name)
    return tree


def constraint_of(model: Any, name: str) -> Any:
    """The constraint in the metadata of the field of a leaf; real if there is none."""
    *parents, last = name.split(".")
    owner = model
    for part in parents:
        owner = _child(owner, part, name)
    if dataclasses.is_dataclass(owner):
        for item in dataclasses.fields(owner):
            if item.name == last:
                constraint = item.metadata.get("constraint")
                return constraints.real if constraint is None else constraint
    return constraints.real


def _dotted(path) -> str:
    return ".".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path)


def _child(tree, part, name):
    if isinstance(tree, dict) and part in tree:
        return tree[part]
    if isinstance(tree, (list, tuple)) and part.isdigit() and int(part) < len(tree):
        return tree[int(part)]
    if dataclasses.is_dataclass(tree) and part in {item.name for item in dataclasses.fields(tree)}:
        return getattr(tree, part)
    has = [item.name for item in dataclasses.fields(tree)] if dataclasses.is_dataclass(tree) else []
    raise KeyError(
        f"nothing is called {name!r}: {type(tree).__name__} has {', '.join(has) or 'no part'} and not {part!r}"
    )


def _replaced(tree, parts, value, name):
    if not parts:
        return value
    child = _replaced(_child(tree, parts[0], name), parts[1:], value, name)
    if isinstance(tree, dict):
        return {**tree, parts[0]: child}
    if isinstance(tree, (list, tuple)):
        items = list(tree)
        items[int(parts[0])] = child
        return type(tree)(items)
    return dataclasses.replace(tree, **{parts[0]: child})
