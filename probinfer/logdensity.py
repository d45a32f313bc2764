"""Functions with arguments bound to them, as pytrees: arrays are data, everything else is static.

A log density is handed to jitted loops as an *argument*. ``LogDensity(fn, X, y)`` is therefore a pytree whose leaves
are the arrays found in ``fn`` and in its bound arguments; functions, strings, Python numbers and all other leaves are
part of its structure. Two such objects with the same function and structure share compiled code, whatever their
data; a new function object is a new structure and traces again.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from probinfer.types import field, pytree, strong_array

__all__ = ["Bound", "LogDensity", "StochasticLogDensity"]


class Static:
    """A leaf that belongs to the structure: equal if of one type and identical or, where hashable, equal."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static) or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or (_hashable(self.value) and bool(self.value == other.value))

    def __hash__(self) -> int:
        return hash((type(self.value), self.value)) if _hashable(self.value) else id(self.value)

    def __repr__(self) -> str:
        return f"Static({self.value!r})"


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _is_data(leaf: Any) -> bool:
    """Say whether a leaf is an array; floating NumPy scalars are, Python numbers and integer scalars are not."""
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind in "biufc"
    return isinstance(leaf, (jax.Array, np.floating))


@pytree
class Bound:
    """``fn`` with leading and keyword arguments bound: ``bound(*call_args) = fn(*args, *call_args, **kwargs)``.

    Array leaves of ``fn`` and of the arguments are the leaves of the object. All other leaves are static, compared by
    equality where they are hashable and by identity otherwise. Python numbers and NumPy integer scalars are static,
    so that they may be sizes and flags; a floating number that changes from call to call should be an array.

    Attributes:
        data: the array leaves, in the order of flattening.
        structure: the tree and its static leaves (``None`` where an array stands).
    """

    data: tuple
    structure: tuple = field(static=True)

    def __init__(self, fn: Any, *args: Any, **kwargs: Any):
        if not callable(fn):
            raise TypeError(
                f"the first argument must be a function, got {type(fn).__name__}; pass data after it"
            )
        leaves, treedef = jax.tree.flatten((fn, args, kwargs))
        data = tuple(strong_array(leaf) for leaf in leaves if _is_data(leaf))
        static = tuple(None if _is_data(leaf) else Static(leaf) for leaf in leaves)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "structure", (treedef, static))

    def __call__(self, *call_args: Any) -> Any:
        """Call the function with the bound arguments before ``call_args``."""
        treedef, static = self.structure
        data = iter(self.data)
        leaves = [next(data) if leaf is None else leaf.value for leaf in static]
        fn, args, kwargs = jax.tree.unflatten(treedef, leaves)
        return fn(*args, *call_args, **kwargs)


@pytree
class LogDensity(Bound):
    """A log density of a position, with its data bound: ``log_density(position) -> ()``.

    Example:
        >>> import jax.numpy as jnp
        >>> def log_normal_density(loc, position):
        ...     return -0.5 * jnp.sum((position - loc) ** 2)
        >>> log_density = LogDensity(log_normal_density, jnp.ones(2))
        >>> float(log_density(jnp.zeros(2)))
        -1.0
    """

    __init__ = Bound.__init__


@pytree
class StochasticLogDensity(Bound):
    """An unbiased estimate of a log density, with its data bound: ``estimate(key, position) -> ()``.

    One key a step is shared by all particles or chains of that step.
    """

    __init__ = Bound.__init__
