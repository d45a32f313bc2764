"""The algorithm: a pair of pure functions, with the data that they need.

``step(key, state) -> (state, info)`` is the contract of blackjax, so both libraries run each other's algorithms.
The two functions are ``jax.tree_util.Partial`` objects: arrays bound to them are data, and a user's function is known
by what it depends on, not by its object. A jitted loop takes the algorithm as an *argument*; the same function with
new data, new hyperparameters or a rebuilt configuration traces nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from probinfer.core.binding import Bound
from probinfer.core.identity import is_settled

__all__ = ["Algorithm", "algorithm", "as_partial"]


class Algorithm(NamedTuple):
    """``init`` makes a state; ``step(key, state) -> (state, info)`` advances it."""

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, Any]]


def as_partial(fn: Callable) -> jax.tree_util.Partial:
    """Take a function as it is now, so that it may be an argument of a jitted function.

    What it depends on is read here (``probinfer.core.identity``): captured arrays are data, everything else is
    compared by content. Arguments bound by ``jax.tree_util.Partial`` stay data, functions among them are taken too, and
    so is a callable pytree (a ``LogDensity``), whose arrays are data already.
    """
    if isinstance(fn, jax.tree_util.Partial):
        return _taken(fn)
    if is_settled(fn):
        return jax.tree_util.Partial(fn)
    return jax.tree_util.Partial(_call, fn if isinstance(fn, Bound) else Bound(fn))


def _taken(partial: jax.tree_util.Partial) -> jax.tree_util.Partial:
    """A ``Partial`` with its function taken, and those of the partials bound to it; itself where nothing is to do."""
    leaves, structure = jax.tree.flatten((partial.args, partial.keywords), is_leaf=_is_partial)
    taken = [_taken(leaf) if _is_partial(leaf) else leaf for leaf in leaves]
    if all(old is new for old, new in zip(leaves, taken, strict=True)):
        if is_settled(partial.func):
            return partial
        return jax.tree_util.Partial(_call, Bound(partial.func), *partial.args, **partial.keywords)
    args, keywords = jax.tree.unflatten(structure, taken)
    if is_settled(partial.func):
        return jax.tree_util.Partial(partial.func, *args, **keywords)
    return jax.tree_util.Partial(_call, Bound(partial.func), *args, **keywords)


def _is_partial(leaf: Any) -> bool:
    return isinstance(leaf, jax.tree_util.Partial)


def _call(fn: Callable, *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


def algorithm(init_fn: Callable, step_fn: Callable, *bound: Any) -> Algorithm:
    """Bind the same leading arguments to module-level functions.

    Args:
        init_fn: ``init_fn(*bound, ...) -> state``.
        step_fn: ``step_fn(*bound, key, state) -> (state, info)``.
        *bound: pytrees: a configuration, a ``LogDensity``, data.

    Returns:
        The algorithm, a pytree whose leaves are the arrays in ``bound``.
    """
    return Algorithm(jax.tree_util.Partial(init_fn, *bound), jax.tree_util.Partial(step_fn, *bound))
