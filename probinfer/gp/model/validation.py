"""Checks of the data of a Gaussian process, at the boundary of the library."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.arguments import check_finite, check_floating

__all__ = ["check_data", "check_inputs", "check_outputs", "is_traced"]


def check_data(X: Any, y: Any, likelihood: Any) -> tuple[jax.Array, jax.Array]:
    """Check training data and convert them to arrays.

    Args:
        X: inputs ``(N, D)``, floating point.
        y: outputs ``(N,)``, floating point of the same dtype; for classes and counts also integers or truth values.
        likelihood: likelihood of the outputs; ``check_outputs`` calls its own check of their values.

    Returns:
        ``X`` and ``y`` as arrays.

    Raises:
        TypeError: an array is not floating point, or the dtypes differ.
        ValueError: shapes do not fit, N or D is zero, an entry is NaN or infinite, or an integer is too large for the
            dtype.
    """
    X = check_inputs(X)
    if not getattr(likelihood, "outputs_have_unit", False):
        y = _integers_as_floating(y, X.dtype)
    y = _array("y", y)
    if y.ndim != 1:
        hint = "; use y.ravel()" if y.ndim == 2 and 1 in y.shape else ""
        raise ValueError(f"y must have shape (N,), got {y.shape}{hint}")
    if X.shape[0] != y.shape[0]:
        raise ValueError(
            f"X has {X.shape[0]} rows but y has {y.shape[0]} entries; they must be the same points"
        )
    if X.dtype != y.dtype:
        raise TypeError(f"X is {X.dtype} but y is {y.dtype}; convert one, for example y.astype(X.dtype)")
    return X, y


def check_inputs(X: Any, columns: int | None = None, dtype: Any = None) -> jax.Array:
    """Check an input matrix and convert it to an array.

    Args:
        X: inputs ``(N, D)``, floating point.
        columns: the required D; by default any.
        dtype: the required dtype; by default any.

    Returns:
        ``X`` as an array.

    Raises:
        TypeError: not floating point, or not the required dtype.
        ValueError: not a matrix, no rows or columns, another number of columns, or an entry is NaN or infinite.
    """
    X = _array("X", X)
    if X.ndim != 2:
        hint = "; one input column is X[:, None]" if X.ndim == 1 else ""
        raise ValueError(f"X must have shape (N, D), got {X.shape}{hint}")
    if 0 in X.shape:
        raise ValueError(f"X has shape {X.shape}: at least one row and one column are needed")
    if columns is not None and X.shape[1] != columns:
        raise ValueError(f"X has {X.shape[1]} columns, the model was conditioned on {columns}")
    if dtype is not None and X.dtype != dtype:
        raise TypeError(
            f"X is {X.dtype}, the training data are {dtype}; convert it with X.astype({np.dtype(dtype)})"
        )
    return X


def check_outputs(likelihood: Any, y: Any) -> Any:
    """Outputs in the form that the likelihood takes; unchanged while a function is traced, when they have no values.

    Raises:
        ValueError: an output is impossible under the likelihood.
    """
    if isinstance(y, jax.core.Tracer) or not hasattr(likelihood, "check_outputs"):
        return y
    return likelihood.check_outputs(y)


def is_traced(tree: Any) -> bool:
    """Whether a tree contains an array without a value, because a function of it is traced."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _integers_as_floating(y, dtype):
    """Integers and truth values in the dtype of the inputs; anything else unchanged."""
    array: Any = y if isinstance(y, jax.Array) else np.asarray(y)
    if array.dtype.kind not in "biu":
        return y
    if isinstance(array, jax.core.Tracer):
        return array.astype(dtype)
    floating = np.asarray(array).astype(dtype)
    if (floating != np.asarray(array)).any():
        raise ValueError(f"y has integers that {np.dtype(dtype)} cannot represent exactly; use float64 data")
    return floating


def _array(name, value):
    array: Any = value if isinstance(value, jax.Array) else np.asarray(value)
    if not isinstance(value, jax.Array) and array.dtype == object:
        raise TypeError(
            f"{name} must be an array of numbers, got objects; convert categories to columns of floats"
        )
    check_floating(name, array)
    if array.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must be float32 or float64, got {array.dtype}")
    check_finite(name, array)
    return jnp.asarray(array)
