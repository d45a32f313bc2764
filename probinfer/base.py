"""The algorithm: a pair of pure functions, and the status codes that numerical work reports.

``step(key, state) -> (state, info)`` is the contract of blackjax, so both libraries run each other's algorithms.
The two functions are ``jax.tree_util.Partial`` objects: arrays bound to them are data, and a user's function is known
by what it depends on, not by its object. A jitted loop takes the algorithm as an *argument*; the same function with
new data, new hyperparameters or a rebuilt configuration traces nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from probinfer.identity import is_settled
from probinfer.logdensity import Bound

__all__ = ["Algorithm", "Status", "algorithm", "as_partial", "with_named_status"]


class Algorithm(NamedTuple):
    """``init`` makes a state; ``step(key, state) -> (state, info)`` advances it."""

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, Any]]


class Status(enum.IntEnum):
    """What numerical work reports of itself, carried as an integer through jitted code, and shown by its name.

    Larger is worse, so the status of a whole is the maximum over its parts. ``INTERRUPTED`` stands above all that might
    have been otherwise at the end of the work, and below what leaves no draws to use.

    >>> print(Status.OK, [Status(4)], f"{Status.NON_FINITE}")
    OK [Status.CHAINS_DISAGREE] NON_FINITE
    """

    OK = 0
    MAX_ITERATIONS = 1
    LINE_SEARCH_STALLED = 2
    DIVERGENT_TRANSITIONS = 3
    CHAINS_DISAGREE = 4
    POOR_APPROXIMATION = 5
    PRECISION_LOST = 6
    AT_LIMIT = 7
    NOTHING_LEARNED = 8
    INTERRUPTED = 9
    DEGENERATE_WEIGHTS = 10
    NOT_POSITIVE_DEFINITE = 11
    NON_FINITE = 12
    IMPROPER_DENSITY = 13

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Status.{self.name}"

    def __format__(self, spec: str) -> str:
        return format(int(self), spec) if spec else self.name


def with_named_status(info: Any) -> Any:
    """Return a report whose ``status`` is a ``Status`` where it was one concrete number, anything else as it is.

    Args:
        info: a report of an engine, or None.
    """
    status: Any = getattr(info, "status", None)
    known = isinstance(status, (int, np.generic, np.ndarray, jax.Array)) and not isinstance(
        status, jax.core.Tracer
    )
    if not known or np.ndim(status) or not hasattr(info, "_replace"):
        return info
    return info._replace(status=Status(int(status)))


def as_partial(fn: Callable) -> jax.tree_util.Partial:
    """Take a function as it is now, so that it may be an argument of a jitted function.

    What it depends on is read here (``probinfer.identity``): captured arrays are data, everything else is compared by
    content. Arguments bound by ``jax.tree_util.Partial`` stay data, functions among them are taken too, and so is a
    callable pytree (a ``LogDensity``), whose arrays are data already.
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
