"""The kernel base class: a kernel is the pytree of its hyperparameters, with its values, grams and their contraction.

Every kernel has four methods: ``evaluate`` for one pair, ``gram`` for all pairs, ``diag`` for the diagonal of a gram,
and ``contract`` for the gradient of ``Σ_ij G_ij k(x_i, x_j)``, the only derivative of k that a first-order method
needs. Hyperparameters are cast to the dtype of the inputs, so float32 inputs stay float32.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.arguments import check_floating
from probinfer.core.errors import shortened
from probinfer.core.types import Array, Float, Scalar, strong_array

__all__ = ["COMPOSITES", "Kernel", "cast", "check_inputs", "parameter"]


# The classes that the operators build. ``composite`` registers them, because it imports ``Kernel`` from here.
COMPOSITES: dict[str, Callable[..., Any]] = {}


class Kernel(abc.ABC):
    """A positive semi-definite function ``k(x, z)`` of two points in ``D`` dimensions."""

    @abc.abstractmethod
    def evaluate(self, x: Float[Array, " D"], z: Float[Array, " D"]) -> Scalar:
        """``k(x, z)`` for one pair of points."""

    @abc.abstractmethod
    def gram(self, X: Float[Array, "N D"], Z: Float[Array, "M D"] | None = None) -> Float[Array, "N M"]:
        """The matrix of ``k(x_i, z_j)``; for ``Z=None`` that of ``k(x_i, x_j)``, exactly symmetric."""

    @abc.abstractmethod
    def diag(self, X: Float[Array, "N D"]) -> Float[Array, " N"]:
        """``k(x_i, x_i)``, the diagonal of ``gram(X)``."""

    def contract(self, X: Float[Array, "N D"], G: Float[Array, "N N"]) -> tuple[Any, Float[Array, "N D"]]:
        """Gradient of ``Σ_ij G_ij k(x_i, x_j)`` for a symmetric G.

        Args:
            X: points.
            G: symmetric weights, held constant.

        Returns:
            The derivatives with respect to the leaves of the kernel, in a tree like the kernel (``float0`` for leaves
            that are not floating point), and the derivative with respect to X. Both can be differentiated again.
        """
        _, pullback = jax.vjp(lambda kernel, X: kernel.gram(X), self, X)
        return pullback(G)

    def on(self, dims: int | Sequence[int]) -> Kernel:
        """Apply the kernel to some columns of the inputs only."""
        return COMPOSITES["columns"](self, (dims,) if isinstance(dims, (int, np.integer)) else tuple(dims))

    def __add__(self, other: Any) -> Kernel:
        """``k1 + k2``."""
        return COMPOSITES["sum"]((self, other)) if isinstance(other, Kernel) else NotImplemented

    def __mul__(self, other: Any) -> Kernel:
        """``k1 · k2`` for a kernel, ``variance · k`` for a number or a scalar array."""
        if isinstance(other, Kernel):
            return COMPOSITES["product"]((self, other))
        return COMPOSITES["scaled"](self, other)

    def __rmul__(self, other: Any) -> Kernel:
        """``variance · k``."""
        return self * other


def parameter(name: str, value: Any, *, max_ndim: int = 0) -> Any:
    """Check the static properties of a hyperparameter, and turn numbers into strongly typed arrays.

    Args:
        name: its name, for error messages.
        value: a number, an array, or a placeholder for one (a prior, a tracer).
        max_ndim: 0 for scalars, 1 if one value for each input dimension is allowed.

    Returns:
        An array if ``value`` is numeric, otherwise ``value``.

    Raises:
        ValueError: The value has too many axes, or is a number that is not positive and finite.
        TypeError: The value is an integer or complex array, a string, a kernel or None.
    """
    if value is None or isinstance(value, (str, bytes, bool, Kernel)):
        raise TypeError(f"{name} must be a positive number or an array of them, got {shortened(value)}")
    if isinstance(value, (list, tuple, np.ndarray)) and np.asarray(value).dtype.kind not in "fiuc":
        raise TypeError(f"{name} must hold numbers, got {shortened(value)}")
    concrete = isinstance(value, (int, float, list, tuple, np.ndarray, np.generic))
    if concrete and not np.all(np.isfinite(value) & (np.asarray(value) > 0)):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        check_floating(name, value)
    value = strong_array(value)
    if isinstance(value, jax.Array) and value.ndim > max_ndim:
        allowed = (
            "a scalar" if max_ndim == 0 else "a scalar or a vector with one value for each input dimension"
        )
        raise ValueError(
            f"{name} must be {allowed}, got shape {value.shape}; stack whole kernels with jax.tree.map"
        )
    return value


def cast(value: Any, inputs: Array) -> Array:
    """Return the hyperparameter in the dtype of the inputs."""
    return jnp.asarray(value, dtype=inputs.dtype)


def check_inputs(X: Array, Z: Array | None = None) -> None:
    """Refuse inputs that are not floating-point matrices with the same number of columns.

    Raises:
        TypeError: The dtype of X or Z is not floating point.
        ValueError: X or Z is not two-dimensional, or they have different numbers of columns.
    """
    for name, value in (("X", X),) if Z is None else (("X", X), ("Z", Z)):
        check_floating(name, value)
        if value.ndim != 2:
            raise ValueError(
                f"{name} must have shape (N, D), got {value.shape}; use {name}[:, None] for one column"
            )
    if Z is not None and X.shape[1] != Z.shape[1]:
        raise ValueError(f"X and Z must have the same number of columns, got {X.shape[1]} and {Z.shape[1]}")
