"""What a run is, in a few short texts that are the same in every process.

Two runs with the same description make the same draws; a checkpoint is continued only by the run it describes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from types import CodeType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["describe", "digest"]


def describe(key: Any, functions: Any, state: Any, num_steps: int, thin: int) -> dict[str, Any]:
    """Describe a run as a dictionary that goes into JSON.

    Functions are described by their names, code and closures, arrays by their shapes, dtypes and bytes, so that a run
    with other data, another key or another setting is told apart.

    Args:
        key: the key of the run.
        functions: a pytree of ``Partial``: the step and what is recorded of it.
        state: the state the run starts from.
        num_steps: its length.
        thin: steps per record.

    Returns:
        Entries by name; which of two entries differs says what differs between two runs.
    """
    return {
        "functions": _function_names(functions),
        "algorithm": digest(functions),
        "state": [f"{jax.tree_util.keystr(p)} {x.dtype}{list(x.shape)}" for p, x in _named_leaves(state)],
        "initial values": digest(state),
        "key": digest(key),
        "num_steps": num_steps,
        "thin": thin,
    }


def digest(tree: Any) -> str:
    """A short hash of the functions, settings and arrays of a pytree, the same in every process."""
    state = hashlib.sha256()
    _feed(state.update, tree, set())
    return state.hexdigest()[:16]


def _feed(update: Callable[[bytes], None], value: Any, seen: set[int]) -> None:
    """Feed a hash with a value: functions by code and closure, arrays by bytes, containers by structure and leaves."""
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(value) if is_key else value)  # type: ignore[arg-type]
        update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    elif isinstance(value, CodeType):
        update(value.co_code)
        for constant in value.co_consts:
            if isinstance(constant, (CodeType, int, float, str)):
                _feed(update, constant, seen)
    elif isinstance(value, jax.tree_util.Partial):
        _feed(update, value.func, seen)
        _feed(update, (value.args, value.keywords), seen)
    elif hasattr(value, "__code__"):
        _feed_function(update, value, seen)
    else:
        _feed_tree(update, value, seen)


def _feed_function(update: Callable[[bytes], None], function: Any, seen: set[int]) -> None:
    if id(function) in seen:  # recursion through a closure
        return
    seen.add(id(function))
    update(f"{function.__module__}.{function.__qualname__}".encode())
    _feed(update, function.__code__, seen)
    for value in _closed_over(function):
        _feed(update, value, seen)


def _feed_tree(update: Callable[[bytes], None], tree: Any, seen: set[int]) -> None:
    """A leaf by its text; a container by its outermost type and its leaves, ``Partial`` objects opened."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, jax.tree_util.Partial))
    if len(leaves) == 1 and leaves[0] is tree:
        update(_without_addresses(repr(tree)).encode())
        return
    update(_without_addresses(str(structure)).encode())
    for leaf in leaves:
        _feed(update, leaf, seen)


def _closed_over(function: Any) -> list[Any]:
    """The values in the closure of a function; a cell may still be empty."""
    values = []
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:
            continue
    return values


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _named_leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _function_names(tree: Any) -> list[str]:
    """Names of the functions in a tree of ``Partial``, in their order."""
    partials = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, jax.tree_util.Partial))
    return [getattr(leaf.func, "__qualname__", "?") for leaf in partials if hasattr(leaf, "func")]
