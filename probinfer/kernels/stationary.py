"""Kernels of a scaled distance: squared exponential, Matérn, rational quadratic, periodic.

All are ``k(x, z) = profile(|φ(x) − φ(z)|²)`` with a feature map φ: division by the lengthscales, or the map to a circle
for the periodic kernel. Distances are sums of squared differences, never differences of squares, so nothing cancels,
the distance of a point from itself is zero and grams are symmetric. A contraction with G needs ``M = G ∘ profile′`` and
the product ``M [φ, 1]``: ``O(N²)`` memory for any number of lengthscales, and it yields the gradient with respect to X.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from numpyro.distributions import constraints

from probinfer.core.types import Array, Float, Scalar, field, pytree
from probinfer.kernels.base import Kernel, cast, check_inputs, parameter

__all__ = [
    "RBF",
    "Matern12",
    "Matern32",
    "Matern52",
    "Periodic",
    "RationalQuadratic",
    "Stationary",
    "squared_distances",
]

_UNROLL = 16  # dimensions whose squares are added in one fused pass


class Stationary(Kernel):
    """``k(x, z) = profile(|φ(x) − φ(z)|²)``; a subclass defines ``profile``, and ``features`` if φ is not scaling."""

    variance: Any
    lengthscale: Any

    def __post_init__(self):
        object.__setattr__(self, "variance", parameter("variance", self.variance))
        object.__setattr__(self, "lengthscale", parameter("lengthscale", self.lengthscale, max_ndim=1))

    @abc.abstractmethod
    def profile(self, squared: Array) -> Array:
        """``k`` as a function of squared scaled distances, elementwise."""

    def features(self, X: Float[Array, "N D"]) -> Float[Array, "N F"]:
        """``φ(X)``: the inputs, relative to any common origin, in units of the lengthscale."""
        return X / _per_column(self.lengthscale, X)

    def evaluate(self, x: Float[Array, " D"], z: Float[Array, " D"]) -> Scalar:
        """``profile(|φ(x − z) − φ(0)|²)``."""
        pair = self.features(jnp.stack([x - z, jnp.zeros_like(x)]))
        return self.profile(jnp.sum((pair[0] - pair[1]) ** 2))

    def gram(self, X: Float[Array, "N D"], Z: Float[Array, "M D"] | None = None) -> Float[Array, "N M"]:
        """The profile of all squared distances between the features."""
        check_inputs(X, Z)
        origin = _origin(X)
        left = self.features(X - origin)
        right = left if Z is None else self.features(Z - origin)
        return self.profile(squared_distances(left, right))

    def diag(self, X: Float[Array, "N D"]) -> Float[Array, " N"]:
        """The variance, N times."""
        return jnp.broadcast_to(cast(self.variance, X), X.shape[:1])

    def contract(self, X: Float[Array, "N D"], G: Float[Array, "N N"]) -> tuple[Any, Float[Array, "N D"]]:
        """Pull G back through the profile, the distances and the features, in turn."""
        F, features_pullback = jax.vjp(lambda kernel, X: kernel.features(X - _origin(X)), self, X)
        squared = squared_distances(F, F)
        _, profile_pullback = jax.vjp(lambda kernel, squared: kernel.profile(squared), self, squared)
        through_profile, M = profile_pullback(G)
        through_features, dX = features_pullback(_contract_distances(F, M))
        return jax.tree.map(_add, through_profile, through_features), dX


@pytree
class RBF(Stationary):
    """Squared exponential ``variance · exp(−r²/2)``, ``r = |(x − z) / lengthscale|``.

    Attributes:
        variance: scalar, k(x, x): the square of the typical size of the function, in squared units of y.
        lengthscale: scalar, or ``(D,)`` with one for each column: the distance over which the function changes, in
            units of that column.
    """

    variance: Any = field(default=1.0, constraint=constraints.positive, units=(0, 2))
    lengthscale: Any = field(default=1.0, constraint=constraints.positive, units=(1, 0))

    def profile(self, squared: Array) -> Array:
        """``variance · exp(−r²/2)``."""
        return cast(self.variance, squared) * jnp.exp(-0.5 * squared)


@pytree
class Matern12(Stationary):
    """Exponential ``variance · exp(−r)``.

    Attributes:
        variance: scalar, k(x, x): the square of the typical size of the function, in squared units of y.
        lengthscale: scalar, or ``(D,)`` with one for each column: the distance over which the function changes, in
            units of that column.
    """

    variance: Any = field(default=1.0, constraint=constraints.positive, units=(0, 2))
    lengthscale: Any = field(default=1.0, constraint=constraints.positive, units=(1, 0))

    def profile(self, squared: Array) -> Array:
        """``variance · exp(−r)``."""
        return cast(self.variance, squared) * jnp.exp(-_root(squared))


@pytree
class Matern32(Stationary):
    """Once differentiable paths: ``variance · (1 + √3 r) exp(−√3 r)``.

    Attributes:
        variance: scalar, k(x, x): the square of the typical size of the function, in squared units of y.
        lengthscale: scalar, or ``(D,)`` with one for each column: the distance over which the function changes, in
            units of that column.
    """

    variance: Any = field(default=1.0, constraint=constraints.positive, units=(0, 2))
    lengthscale: Any = field(default=1.0, constraint=constraints.positive, units=(1, 0))

    def profile(self, squared: Array) -> Array:
        """``variance · (1 + √3 r) exp(−√3 r)``."""
        return cast(self.variance, squared) * _matern32(squared)


@pytree
class Matern52(Stationary):
    """Twice differentiable paths: ``variance · (1 + √5 r + 5 r²/3) exp(−√5 r)``.

    Attributes:
        variance: scalar, k(x, x): the square of the typical size of the function, in squared units of y.
        lengthscale: scalar, or ``(D,)`` with one for each column: the distance over which the function changes, in
            units of that column.
    """

    variance: Any = field(default=1.0, constraint=constraints.positive, units=(0, 2))
    lengthscale: Any = field(default=1.0, constraint=constraints.positive, units=(1, 0))

    def profile(self, squared: Array) -> Array:
        """``variance · (1 + √5 r + 5 r²/3) exp(−√5 r)``."""
        return cast(self.variance, squared) * _matern52(squared)


@pytree
class RationalQuadratic(Stationary):
    """A scale mixture of squared exponentials: ``variance · (1 + r² / (2 alpha))^(−alpha)``.

    Attributes:
        variance: scalar, k(x, x): the square of the typical size of the function, in squared units of y.
        lengthscale: scalar, or ``(D,)`` with one for each column: the distance over which the function changes, in
            units of that column.
        alpha: scalar; small: a wide mixture of lengthscales; large: the squared exponential.
    """

    variance: Any = field(default=1.0, constraint=constraints.positive, units=(0, 2))
    lengthscale: Any = field(default=1.0, constraint=constraints.positive, units=(1, 0))
    alpha: Any = field(default=1.0, constraint=constraints.positive, units=(0, 0))

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "alpha", parameter("alpha", self.alpha))

    def profile(self, squared: Array) -> Array:
        """``variance · exp(−alpha log1p(r² / (2 alpha)))``."""
        alpha = cast(self.alpha, squared)
        return cast(self.variance, squared) * jnp.exp(-alpha * jnp.log1p(squared / (2.0 * alpha)))


@pytree
class Periodic(Stationary):
    """``variance · exp(−2 Σ_d sin²(π (x_d − z_d) / period_d) / lengthscale_d²)``.

    Attributes:
        variance: scalar, k(x, x), in squared units of y.
        lengthscale: scalar or ``(D,)``, without a unit: how smooth the function is within a period (below 1: wiggly).
        period: scalar or ``(D,)``, in units of the column.

    References:
        MacKay (1998), Introduction to Gaussian processes: a squared exponential on the circle of each input.
    """

    variance: Any = field(default=1.0, constraint=constraints.positive, units=(0, 2))
    lengthscale: Any = field(default=1.0, constraint=constraints.positive, units=(0, 0))
    period: Any = field(default=1.0, constraint=constraints.positive, units=(1, 0))

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "period", parameter("period", self.period, max_ndim=1))

    def features(self, X: Float[Array, "N D"]) -> Float[Array, "N F"]:
        """``(sin, cos)(2π x / period) / lengthscale``: chords of length ``2 |sin(π Δ / period)| / lengthscale``."""
        angle = 2.0 * math.pi * X / _per_column(self.period, X)
        scale = _per_column(self.lengthscale, X)
        return jnp.concatenate([jnp.sin(angle) / scale, jnp.cos(angle) / scale], axis=1)

    def profile(self, squared: Array) -> Array:
        """``variance · exp(−r²/2)``."""
        return cast(self.variance, squared) * jnp.exp(-0.5 * squared)


def _origin(X: Array) -> Array:
    """Return a common origin near the data. Distances do not depend on it, so it has no derivative."""
    return lax.stop_gradient(jnp.mean(X, axis=0))


def _per_column(value: Any, X: Array) -> Array:
    value = cast(value, X)
    if value.ndim == 1 and value.shape[0] != X.shape[1]:
        raise ValueError(
            f"the kernel has {value.shape[0]} lengthscales or periods, but the inputs have {X.shape[1]} columns; "
            "give one value for each column, or a scalar"
        )
    return jnp.broadcast_to(value, X.shape[1:])


def _add(a: Any, b: Any) -> Any:
    """Add cotangents; those of integers have dtype float0, which cannot be added."""
    return a if a.dtype == jax.dtypes.float0 else a + b


@jax.custom_jvp
def squared_distances(A: Float[Array, "N D"], B: Float[Array, "M D"]) -> Float[Array, "N M"]:
    """``Σ_d (A_id − B_jd)²`` without cancellation, with derivatives of any order by matrix products.

    Args:
        A: points.
        B: points.

    Returns:
        The squared distances, exactly zero between equal points.
    """
    A, B = _columns(A), _columns(B)
    dims = A.shape[0]
    if dims <= 2 * _UNROLL:
        return _add_squares(jnp.zeros((A.shape[1], B.shape[1]), A.dtype), (A, B))
    pad = -dims % _UNROLL
    A, B = (jnp.pad(M, ((0, pad), (0, 0))).reshape(-1, _UNROLL, M.shape[1]) for M in (A, B))
    total, _ = lax.scan(
        lambda total, block: (_add_squares(total, block), None),
        jnp.zeros((A.shape[2], B.shape[2]), A.dtype),
        (A, B),
    )
    return total


def _columns(A: Array) -> Array:
    """``Aᵀ`` with each column of A contiguous in memory; the barrier keeps XLA from replacing it by a strided view."""
    return lax.optimization_barrier(A.T.reshape(-1)).reshape(A.shape[::-1])


def _add_squares(total: Array, block: tuple[Array, Array]) -> Array:
    """Add the squares over a few dimensions, written out so that they fuse into one pass."""
    for a, b in zip(*block, strict=True):
        total = total + (a[:, None] - b[None, :]) ** 2
    return total


@squared_distances.defjvp
def _squared_distances_jvp(primals, tangents):
    (A, B), (dA, dB) = primals, tangents
    origin = _origin(B)
    a, b = A - origin, B - origin
    # d|a − b|² = 2 (a·da + b·db − a·db − da·b)
    same_point = jnp.sum(a * dA, axis=1)[:, None] + jnp.sum(b * dB, axis=1)[None, :]
    return squared_distances(A, B), 2.0 * (same_point - a @ dB.T - dA @ b.T)


def _contract_distances(F: Array, M: Array) -> Array:
    """Gradient of ``Σ_ij M_ij |F_i − F_j|²`` with respect to F for symmetric M: ``4 (rowsum(M) F − M F)``."""
    F = F - _origin(F)
    product = M @ jnp.concatenate([F, jnp.ones((F.shape[0], 1), F.dtype)], axis=1)
    return 4.0 * (product[:, -1:] * F - product[:, :-1])


@jax.custom_jvp
def _root(squared: Array) -> Array:
    """``√s``, with derivative 0 where the points coincide up to rounding."""
    return jnp.sqrt(squared)


@_root.defjvp
def _root_jvp(primals, tangents):
    # A compiler may compute s twice with different rounding (0 and 1e-34), so that two selects on s could disagree:
    # therefore a floor under the root, and a single select.
    (s,), (ds,) = primals, tangents
    floor = (16.0 * float(jnp.finfo(s.dtype).eps)) ** 2
    return _root(s), jnp.where(s > floor, 0.5 * ds / _root(jnp.maximum(s, floor)), 0.0)


@jax.custom_jvp
def _matern32(s: Array) -> Array:
    r = math.sqrt(3.0) * _root(s)
    return (1.0 + r) * jnp.exp(-r)


@_matern32.defjvp
def _matern32_jvp(primals, tangents):
    (s,), (ds,) = primals, tangents
    # d/ds (1 + √(3s)) exp(−√(3s)) = −3/2 exp(−√(3s)), finite at 0 where the chain rule through √s is not
    return _matern32(s), -1.5 * jnp.exp(-math.sqrt(3.0) * _root(s)) * ds


@jax.custom_jvp
def _matern52(s: Array) -> Array:
    r = math.sqrt(5.0) * _root(s)
    return (1.0 + r + r * r / 3.0) * jnp.exp(-r)


@_matern52.defjvp
def _matern52_jvp(primals, tangents):
    (s,), (ds,) = primals, tangents
    return _matern52(s), -5.0 / 6.0 * _matern52_slope(s) * ds


@jax.custom_jvp
def _matern52_slope(s: Array) -> Array:
    r = math.sqrt(5.0) * _root(s)
    return (1.0 + r) * jnp.exp(-r)


@_matern52_slope.defjvp
def _matern52_slope_jvp(primals, tangents):
    (s,), (ds,) = primals, tangents
    return _matern52_slope(s), -2.5 * jnp.exp(-math.sqrt(5.0) * _root(s)) * ds
