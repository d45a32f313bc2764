"""Words: the array and function types of the library, and the one decorator that makes a pytree.

A *registered* class is a frozen dataclass whose fields are either data (arrays or further pytrees) or static
(hashable, compared by equality when a jitted function decides whether to trace again). JAX rebuilds such objects
with placeholders, stacked arrays, distributions or plain ``object()`` in the place of arrays, so they are rebuilt
without ``__init__`` and ``__post_init__``, and their fields carry no array annotations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

__all__ = [
    "Array",
    "ArrayTree",
    "Bool",
    "Float",
    "Int",
    "Key",
    "LogDensityFn",
    "PRNGKey",
    "PyTree",
    "Scalar",
    "Shaped",
    "StochasticLogDensityFn",
    "field",
    "pytree",
    "strong_array",
]

PRNGKey = Key[Array, ""]
Scalar = Float[Array, ""]
ArrayTree = PyTree
LogDensityFn = Callable[[PyTree], Array]
StochasticLogDensityFn = Callable[[PRNGKey, PyTree], Array]

T = TypeVar("T")


def field(
    *,
    static: bool = False,
    constraint: Any = None,
    units: Any = None,
    default: Any = dataclasses.MISSING,
    **kwargs,
) -> Any:
    """Describe a field of a registered class.

    Args:
        static: part of the structure (hashable), not a leaf.
        constraint: a NumPyro constraint on the values of the leaf; ``None`` means unconstrained.
        units: which powers of the units of inputs and outputs the values have, a pair of numbers, or a function of the
            object that gives one; ``(0, 0)`` for pure numbers, ``None`` where that is not known.
        default: the default value.
        **kwargs: passed to ``dataclasses.field``.

    Returns:
        The dataclass field, with ``static``, ``constraint`` and ``units`` in its metadata.
    """
    if default is not dataclasses.MISSING:
        kwargs["default"] = default
    return dataclasses.field(metadata={"static": static, "constraint": constraint, "units": units}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(field, dataclasses.field))
def pytree(cls: type[T]) -> type[T]:
    """Register a class as a frozen dataclass and a JAX pytree, rebuilt without ``__init__``."""
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    data = tuple(f.name for f in fields if not f.metadata.get("static", False))
    static = tuple(f.name for f in fields if f.metadata.get("static", False))

    def flatten_with_keys(obj):
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(obj, name)) for name in data)
        return children, tuple(getattr(obj, name) for name in static)

    def flatten(obj):
        return tuple(getattr(obj, name) for name in data), tuple(getattr(obj, name) for name in static)

    def unflatten(aux, children):
        obj = object.__new__(cls)
        for name, value in zip(data, children, strict=True):
            object.__setattr__(obj, name, value)
        for name, value in zip(static, aux, strict=True):
            object.__setattr__(obj, name, value)
        return obj

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def strong_array(value: Any) -> Any:
    """Turn a Python or NumPy number into an array with a dtype of its own (not weakly typed).

    Python numbers become the default float type; NumPy and JAX arrays keep their dtype. Anything else (a tracer,
    a distribution, a nested pytree) is returned as it came.

    Args:
        value: a number, an array, a list or tuple of numbers, or anything else.

    Returns:
        A strongly typed ``jax.Array`` where ``value`` was numeric, otherwise ``value``.
    """
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (int, float, list, tuple)):
        return jnp.asarray(np.asarray(value, dtype=float), dtype=jnp.result_type(float))
    if isinstance(value, (np.ndarray, np.generic)):
        return jnp.asarray(value)
    if isinstance(value, jax.Array) and value.aval.weak_type:
        return jax.lax.convert_element_type(value, value.dtype)
    return value
