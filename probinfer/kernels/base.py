"""A kernel is the pytree of its hyperparameters, with a rule for pairs, for grams and for contractions of grams.

Every kernel answers four questions: ``evaluate`` one pair, ``gram`` of all pairs, its ``diag``, and ``contract``: the
gradient of ``Σ_ij G_ij k(x_i, x_j)``, which is all that a first-order method ever needs of the derivatives of k.
Hyperparameters are cast to the dtype of the inputs, so float32 inputs stay float32.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import check_floating, shortened
from probinfer.core.types import Array, Float, Scalar, strong_array

__all__ = ["COMPOSITES", "Kernel", "cast", "check_inputs", "parameter"]


# What the operators make, filled in by ``composite``, which needs ``Kernel`` first.
COMPOSITES: dict[str, Callable[..., Any]] = {}


class Kernel(abc.ABC):
    """A positive semi-definite function ``k(x, z)`` of two points in ``D`` dimensions."""

    @abc.abstractmethod
    def evaluate(self, x: Float[Array, " D"], z: Float[Array, " D"]) -> Scalar:
        """``k(x, z)`` for one pair of points."""

    @abc.abstractmethod
    def gram(self, X: Float[Array, "N D"], Z: Float[Array, "M D"] | None = None) -> Float[Array, "N M"]:
        """The matrix of ``k(x_i, z_j)``; with ``Z=None`` that of X with itself, exactly symmetric."""

    @abc.abstractmethod
    def diag(self, X: Float[Array, "N D"]) -> Float[Array, " N"]:
        """``k(x_i, x_i)``, the diagonal of ``gram(X)``."""

    def contract(self, X: Float[Array, "N D"], G: Float[Array, "N N"]) -> tuple[Any, Float[Array, "N D"]]:
        """Gradient of ``Σ_ij G_ij k(x_i, x_j)`` for a symmetric G.

        Args:
            X: points.
            G: symmetric weights, held constant.

        Returns:
            A tree like the kernel with the derivatives with respect to its leaves (``float0`` for leaves that are
            not floating point), and the derivative with respect to X. Both are differentiable in turn.
        """
        _, pullback = jax.vjp(lambda kernel, X: kernel.gram(X), self, X)
        return pullback(G)

    def on(self, dims: int | Sequence[int]) -> Kernel:
        """The same kernel on some columns of the inputs."""
        return COMPOSITES["columns"](self, (dims,) if isinstance(dims, (int, np.integer)) else tuple(dims))

    def __add__(self, other: Any) -> Kernel:
        """``k1 + k2``."""
        return COMPOSITES["sum"]((self, other)) if isinstance(other, Kernel) else NotImplemented

    def __mul__(self, other: Any) -> Kernel:
        """``k1 k2`` for a kernel, ``variance · k`` for a number or a scalar array."""
        if isinstance(other, Kernel):
            return COMPOSITES["product"]((self, other))
        return COMPOSITES["scaled"](self, other)

    def __rmul__(self, other: Any) -> Kernel:
        """``variance · k``."""
        return self * other


def parameter(name: str, value: Any, *, max_ndim: int = 0) -> Any:
    """Check what is static about a hyperparameter and make numbers strong arrays.

    Args:
        name: its name, for the message.
        value: a number, an array, or anything that may stand in the place of one (a prior, a tracer).
        max_ndim: 0 for scalars, 1 where one value for each input dimension is allowed.

    Returns:
        An array where ``value`` was numeric, otherwise ``value``.

    Raises:
        ValueError: too many axes, or a number that is not positive and finite.
        TypeError: an integer or complex array, a text, a kernel, or nothing.
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


def cast(value: Any, like: Array) -> Array:
    """The hyperparameter in the dtype of the inputs."""
    return jnp.asarray(value, dtype=like.dtype)


def check_inputs(X: Array, Z: Array | None = None) -> None:
    """Refuse inputs that are not two tables of floating-point numbers with the same columns.

    Raises:
        TypeError: an integer dtype.
        ValueError: not two-dimensional, or different numbers of columns.
    """
    for name, value in (("X", X),) if Z is None else (("X", X), ("Z", Z)):
        check_floating(name, value)
        if value.ndim != 2:
            raise ValueError(
                f"{name} must have shape (N, D), got {value.shape}; use {name}[:, None] for one column"
            )
    if Z is not None and X.shape[1] != Z.shape[1]:
        raise ValueError(f"X and Z must have the same number of columns, got {X.shape[1]} and {Z.shape[1]}")
