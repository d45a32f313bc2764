"""Composite kernels: sums, products, scaled kernels, and kernels of some columns only.

Each class delegates ``contract`` to its parts by the rule of its derivative, so that a sum of stationary kernels keeps
their fast contraction.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from probinfer.core.types import Array, Float, Scalar, field, pytree
from probinfer.kernels.base import COMPOSITES, Kernel, cast, check_inputs, parameter

__all__ = ["ActiveDims", "Product", "Scaled", "Sum"]


@pytree
class Sum(Kernel):
    """``k(x, z) = Σ_t k_t(x, z)``, written ``k1 + k2``."""

    terms: Any = field()

    def __post_init__(self):
        object.__setattr__(self, "terms", _flattened("terms", self.terms, Sum))

    def evaluate(self, x: Float[Array, " D"], z: Float[Array, " D"]) -> Scalar:
        """The sum over the terms."""
        return _sum(term.evaluate(x, z) for term in self.terms)

    def gram(self, X: Float[Array, "N D"], Z: Float[Array, "M D"] | None = None) -> Float[Array, "N M"]:
        """The sum of the grams."""
        return _sum(term.gram(X, Z) for term in self.terms)

    def diag(self, X: Float[Array, "N D"]) -> Float[Array, " N"]:
        """The sum of the diagonals."""
        return _sum(term.diag(X) for term in self.terms)

    def contract(self, X: Float[Array, "N D"], G: Float[Array, "N N"]) -> tuple[Any, Float[Array, "N D"]]:
        """Contract each term with the same G."""
        parts = [term.contract(X, G) for term in self.terms]
        return _rebuild(self, tuple(part for part, _ in parts)), _sum(dX for _, dX in parts)


@pytree
class Product(Kernel):
    """``k(x, z) = Π_f k_f(x, z)``, written ``k1 * k2``."""

    factors: Any = field()

    def __post_init__(self):
        object.__setattr__(self, "factors", _flattened("factors", self.factors, Product))

    def evaluate(self, x: Float[Array, " D"], z: Float[Array, " D"]) -> Scalar:
        """The product over the factors."""
        return _product(factor.evaluate(x, z) for factor in self.factors)

    def gram(self, X: Float[Array, "N D"], Z: Float[Array, "M D"] | None = None) -> Float[Array, "N M"]:
        """The elementwise product of the grams."""
        return _product(factor.gram(X, Z) for factor in self.factors)

    def diag(self, X: Float[Array, "N D"]) -> Float[Array, " N"]:
        """The product of the diagonals."""
        return _product(factor.diag(X) for factor in self.factors)

    def contract(self, X: Float[Array, "N D"], G: Float[Array, "N N"]) -> tuple[Any, Float[Array, "N D"]]:
        """Contract each factor with ``G ∘`` the grams of the other factors."""
        grams = [factor.gram(X) for factor in self.factors]
        parts = [
            factor.contract(X, _product([G, *grams[:i], *grams[i + 1 :]]))
            for i, factor in enumerate(self.factors)
        ]
        return _rebuild(self, tuple(part for part, _ in parts)), _sum(dX for _, dX in parts)


@pytree
class Scaled(Kernel):
    """``variance · k(x, z)``, written ``variance * k``."""

    kernel: Any = field()
    variance: Any = field(default=1.0, constraint=constraints.positive, units=(0, 2))

    def __post_init__(self):
        object.__setattr__(self, "variance", parameter("variance", self.variance))

    def evaluate(self, x: Float[Array, " D"], z: Float[Array, " D"]) -> Scalar:
        """``variance · k(x, z)``."""
        return cast(self.variance, x) * self.kernel.evaluate(x, z)

    def gram(self, X: Float[Array, "N D"], Z: Float[Array, "M D"] | None = None) -> Float[Array, "N M"]:
        """``variance`` times the gram."""
        return cast(self.variance, X) * self.kernel.gram(X, Z)

    def diag(self, X: Float[Array, "N D"]) -> Float[Array, " N"]:
        """``variance`` times the diagonal."""
        return cast(self.variance, X) * self.kernel.diag(X)

    def contract(self, X: Float[Array, "N D"], G: Float[Array, "N N"]) -> tuple[Any, Float[Array, "N D"]]:
        """Contract the kernel with ``variance · G``; the derivative for the variance is ``Σ G ∘ gram``."""
        gram = self.kernel.gram(X)
        _, pullback = jax.vjp(lambda variance: cast(variance, X), self.variance)
        (dvariance,) = pullback(jnp.sum(G * gram))
        through_kernel, dX = self.kernel.contract(X, cast(self.variance, X) * G)
        return _rebuild(self, through_kernel, dvariance), dX


@pytree
class ActiveDims(Kernel):
    """``k`` of some columns of the inputs, written ``k.on((0, 2))``.

    Attributes:
        kernel: the kernel of these columns; it receives them as columns 0, 1, ...
        dims: distinct column numbers of X from 0 on; an integer for one column.

    Raises:
        TypeError: ``dims`` is a kernel, or not a sequence of numbers.
        ValueError: ``dims`` is empty, repeats a column or contains a negative number.
    """

    kernel: Any = field()
    dims: tuple[int, ...] = field(static=True)

    def __post_init__(self):
        if isinstance(self.dims, Kernel) or not isinstance(self.dims, (int, np.integer, Iterable)):
            raise TypeError(
                f"write ActiveDims(kernel, dims) or kernel.on(dims); dims was {type(self.dims).__name__}"
            )
        dims = (self.dims,) if isinstance(self.dims, (int, np.integer)) else tuple(self.dims)
        if not dims or len(set(dims)) != len(dims) or any(int(d) != d or d < 0 for d in dims):
            raise ValueError(f"dims must be distinct column numbers from 0 on, got {dims}")
        object.__setattr__(self, "dims", tuple(int(d) for d in dims))

    def evaluate(self, x: Float[Array, " D"], z: Float[Array, " D"]) -> Scalar:
        """``k`` of the selected entries."""
        return self.kernel.evaluate(self._select_columns(x), self._select_columns(z))

    def gram(self, X: Float[Array, "N D"], Z: Float[Array, "M D"] | None = None) -> Float[Array, "N M"]:
        """The gram of the selected columns."""
        check_inputs(X, Z)
        return self.kernel.gram(self._select_columns(X), None if Z is None else self._select_columns(Z))

    def diag(self, X: Float[Array, "N D"]) -> Float[Array, " N"]:
        """The diagonal of the selected columns."""
        return self.kernel.diag(self._select_columns(X))

    def contract(self, X: Float[Array, "N D"], G: Float[Array, "N N"]) -> tuple[Any, Float[Array, "N D"]]:
        """Contract on the selected columns; the gradient of the other columns is zero."""
        through_kernel, dX = self.kernel.contract(self._select_columns(X), G)
        return _rebuild(self, through_kernel), jnp.zeros_like(X).at[:, np.array(self.dims)].set(dX)

    def _select_columns(self, X: Array) -> Array:
        if max(self.dims) >= X.shape[-1]:
            raise ValueError(
                f"the kernel uses column {max(self.dims)}, but the inputs have {X.shape[-1]} columns"
            )
        return X[..., np.array(self.dims)]


def _flattened(name: str, kernels: Sequence[Any], cls: type) -> tuple[Any, ...]:
    """Flatten sums of sums and products of products, so that the hyperparameters have short names."""
    if len(kernels) == 0:
        raise ValueError(f"{name} must hold at least one kernel")
    groups = [getattr(kernel, name) if isinstance(kernel, cls) else (kernel,) for kernel in kernels]
    return tuple(kernel for group in groups for kernel in group)


def _rebuild(kernel: Kernel, *children: Any) -> Any:
    """Return a tree with the class and static fields of ``kernel`` and other children."""
    structure = jax.tree.structure(kernel, is_leaf=lambda node: node is not kernel)
    return jax.tree.unflatten(structure, children)


def _sum(parts: Any) -> Any:
    return functools.reduce(operator.add, parts)


def _product(parts: Any) -> Any:
    return functools.reduce(operator.mul, parts)


COMPOSITES.update(sum=Sum, product=Product, scaled=Scaled, columns=ActiveDims)
