"""Kernels that do not depend on a scaled distance: linear, polynomial, constant, white noise."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import constraints

from probinfer.core.types import Array, Float, Scalar, field, pytree
from probinfer.kernels.base import Kernel, cast, check_inputs, parameter

__all__ = ["Constant", "Linear", "Polynomial", "White"]


@pytree
class Linear(Kernel):
    """``k(x, z) = Σ_d variance_d x_d z_d``: Bayesian linear regression without an intercept (add ``Constant()``)."""

    variance: Any = field(default=1.0, constraint=constraints.positive, units=(-2, 2))

    def __post_init__(self):
        object.__setattr__(self, "variance", parameter("variance", self.variance, max_ndim=1))

    def evaluate(self, x: Float[Array, " D"], z: Float[Array, " D"]) -> Scalar:
        """``Σ_d variance_d x_d z_d``."""
        return jnp.sum(cast(self.variance, x) * x * z)

    def gram(self, X: Float[Array, "N D"], Z: Float[Array, "M D"] | None = None) -> Float[Array, "N M"]:
        """``X diag(variance) Zᵀ``."""
        check_inputs(X, Z)
        root = jnp.sqrt(cast(self.variance, X))
        left = X * root
        return left @ (left if Z is None else Z * root).T

    def diag(self, X: Float[Array, "N D"]) -> Float[Array, " N"]:
        """``Σ_d variance_d X_nd²``."""
        return jnp.sum(cast(self.variance, X) * X * X, axis=1)


def _slope_units(kernel):
    return -2, 2 / kernel.degree


def _offset_units(kernel):
    return 0, 2 / kernel.degree


@pytree
class Polynomial(Kernel):
    """``k(x, z) = (variance · xᵀz + offset)^degree``: all monomials up to a degree."""

    variance: Any = field(default=1.0, constraint=constraints.positive, units=_slope_units)
    offset: Any = field(default=1.0, constraint=constraints.positive, units=_offset_units)
    degree: int = field(default=2, static=True)

    def __post_init__(self):
        if not isinstance(self.degree, int) or self.degree < 1:
            raise ValueError(f"degree must be an integer of at least 1, got {self.degree!r}")
        object.__setattr__(self, "variance", parameter("variance", self.variance))
        object.__setattr__(self, "offset", parameter("offset", self.offset))

    def evaluate(self, x: Float[Array, " D"], z: Float[Array, " D"]) -> Scalar:
        """``(variance · xᵀz + offset)^degree``."""
        return self._power(jnp.sum(x * z))

    def gram(self, X: Float[Array, "N D"], Z: Float[Array, "M D"] | None = None) -> Float[Array, "N M"]:
        """``(variance · X Zᵀ + offset)^degree``, elementwise."""
        check_inputs(X, Z)
        return self._power(X @ (X if Z is None else Z).T)

    def diag(self, X: Float[Array, "N D"]) -> Float[Array, " N"]:
        """``(variance · |x|² + offset)^degree``."""
        return self._power(jnp.sum(X * X, axis=1))

    def _power(self, inner: Array) -> Array:
        return (cast(self.variance, inner) * inner + cast(self.offset, inner)) ** self.degree


@pytree
class Constant(Kernel):
    """``k(x, z) = variance``: an unknown constant function."""

    variance: Any = field(default=1.0, constraint=constraints.positive, units=(0, 2))

    def __post_init__(self):
        object.__setattr__(self, "variance", parameter("variance", self.variance))

    def evaluate(self, x: Float[Array, " D"], z: Float[Array, " D"]) -> Scalar:
        """The variance."""
        return cast(self.variance, x)

    def gram(self, X: Float[Array, "N D"], Z: Float[Array, "M D"] | None = None) -> Float[Array, "N M"]:
        """The variance in every entry."""
        check_inputs(X, Z)
        return jnp.full((X.shape[0], (X if Z is None else Z).shape[0]), cast(self.variance, X))

    def diag(self, X: Float[Array, "N D"]) -> Float[Array, " N"]:
        """The variance, N times."""
        return jnp.full(X.shape[:1], cast(self.variance, X))


@pytree
class White(Kernel):
    """Noise that is independent for each observation, even at equal inputs.

    ``gram(X)`` is ``variance · I``. Different sets of points share no noise, so ``gram(X, Z)`` and ``evaluate`` are
    zero.
    """

    variance: Any = field(default=1.0, constraint=constraints.positive, units=(0, 2))

    def __post_init__(self):
        object.__setattr__(self, "variance", parameter("variance", self.variance))

    def evaluate(self, x: Float[Array, " D"], z: Float[Array, " D"]) -> Scalar:
        """Zero: two observations share no noise."""
        return jnp.zeros((), x.dtype)

    def gram(self, X: Float[Array, "N D"], Z: Float[Array, "M D"] | None = None) -> Float[Array, "N M"]:
        """``variance · I``, or zero between two sets of points."""
        check_inputs(X, Z)
        if Z is not None:
            return jnp.zeros((X.shape[0], Z.shape[0]), X.dtype)
        return cast(self.variance, X) * jnp.eye(X.shape[0], dtype=X.dtype)

    def diag(self, X: Float[Array, "N D"]) -> Float[Array, " N"]:
        """The variance, N times."""
        return jnp.full(X.shape[:1], cast(self.variance, X))

    def contract(self, X: Float[Array, "N D"], G: Float[Array, "N N"]) -> tuple[Any, Float[Array, "N D"]]:
        """``tr G`` for the variance, zero for X."""
        _, pullback = jax.vjp(lambda kernel: kernel.diag(X), self)
        return pullback(jnp.diagonal(G))[0], jnp.zeros_like(X)
