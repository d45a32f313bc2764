"""What a run is, in a few short texts that are the same in every process.

Two runs with the same description make the same draws; a checkpoint is continued only by the run it describes.
"""

from __future__ import annotations

from typing import Any

import jax

from probinfer.core.binding import Bound
from probinfer.core.identity import Walk

__all__ = ["describe", "digest", "unseen"]


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
        "not seen": unseen(functions),
        "state": [f"{jax.tree_util.keystr(p)} {x.dtype}{list(x.shape)}" for p, x in _named_leaves(state)],
        "initial values": digest(state),
        "key": digest(key),
        "num_steps": num_steps,
        "thin": thin,
    }


def digest(tree: Any) -> str:
    """A short hash of the functions, settings and arrays of a pytree, the same in every process.

    Functions enter with all that they depend on (``probinfer.core.identity``), the values of captured arrays and tables
    included. What cannot be read enters with its type only; ``unseen`` names it.
    """
    walk = Walk(slots=False)
    walk.visit(tree)
    return walk.digest[:16]


def unseen(tree: Any) -> list[str]:
    """What the digest of a pytree cannot see, in words: a change of it goes unnoticed."""
    walk = Walk(slots=False)
    walk.visit(tree)
    return sorted(set(walk.unseen))


def _named_leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _function_names(tree: Any) -> list[str]:
    """Names of the functions in a tree of ``Partial``, in their order; of a taken function its own name."""
    names = []
    for partial in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, jax.tree_util.Partial)):
        if isinstance(partial, jax.tree_util.Partial):
            name = getattr(partial.func, "__qualname__", "?")
            taken = partial.args[0] if name == "_call" and partial.args else None
            names.append(taken.structure.label if isinstance(taken, Bound) else name)
    return names
