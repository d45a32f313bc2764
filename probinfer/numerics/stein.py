r"""The Stein operator of a log density p, applied to a positive-definite kernel.

With scores :math:`s(x) = \nabla \log p(x)`, which need no normalizer, the operator turns a function into one of mean
zero under p. Applied once to :math:`k(\cdot, x)` and averaged over a cloud it is the direction that carries the cloud
to p fastest (``stein_direction``); applied to both arguments it is a kernel ``h`` whose mean over pairs of draws, the
squared kernel Stein discrepancy, is zero for draws of p (``stein_gram``, ``stein_sums``).

Kernels of a scaled distance go through matrix products and the derivatives of their profile; any other kernel through
automatic differentiation of ``evaluate``, pair by pair. They must be twice differentiable: not ``Matern12``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.arguments import check_floating
from probinfer.core.types import Array, Bool, Float, Shaped
from probinfer.kernels.base import Kernel, cast
from probinfer.kernels.stationary import RBF, Stationary, squared_distances
from probinfer.numerics.pairwise import PairSums, pair_sums

__all__ = ["stein_direction", "stein_gram", "stein_sums"]

_COLUMNS = 2048
_FEW = 4  # columns up to which distances are differences written out; above, a matrix product


@partial(jax.jit, static_argnames="tile")
def stein_direction(
    kernel: Kernel,
    particles: Float[Array, "N D"],
    scores: Float[Array, "_ _"],
    keep: Bool[Array, " N"] | None = None,
    *,
    tile: int = 256,
) -> Float[Array, "N D"]:
    r"""Return :math:`\phi(x_i) = \frac1N \sum_j [k(x_j, x_i) s_j + \nabla_{x_j} k(x_j, x_i)]` for every particle.

    A particle that is not kept is no source for the others: N counts those that are. Its own direction is NaN, which
    freezes a bet on it.

    Args:
        kernel: differentiable.
        particles: the cloud x.
        scores: gradients of the log density at the particles, ``(N, D)``.
        keep: which particles count; None: those whose score is finite.
        tile: the pairs are visited in blocks of this many rows (static) and at most 2048 columns: memory O(N D)
            beside a few blocks, each ``D`` times as large for kernels that are not functions of a scaled distance.

    Returns:
        The direction of steepest descent of the Kullback-Leibler divergence, in the units of the particles, in their
        dtype or float32, whichever is wider.

    Raises:
        ValueError: the scores do not have the shape of the particles.
        TypeError: not floating point.

    References:
        Liu and Wang (2016), "Stein variational gradient descent", equation 8.
    """
    _check(particles, scores)
    dtype = jnp.result_type(particles.dtype, jnp.float32)
    keep = jnp.all(jnp.isfinite(scores), axis=1) if keep is None else keep
    cloud, slopes = (jnp.where(keep[:, None], a, 0).astype(dtype) for a in (particles, scores))
    total = _block_sums(_directions(kernel), kernel, cloud, slopes, keep.astype(dtype), tile)
    count = jnp.maximum(jnp.sum(keep.astype(dtype)), 1)
    return jnp.where(keep[:, None], total / count, jnp.nan)


def stein_gram(
    kernel: Kernel,
    X: Float[Array, "N D"],
    scores_x: Shaped[Array, "_ _"],
    Z: Float[Array, "M D"] | None = None,
    scores_z: Shaped[Array, "_ _"] | None = None,
) -> Float[Array, "N M"]:
    r"""Return the Stein kernel of all pairs.

    .. math:: h(x, z) = s_x^\top s_z k + s_x^\top \nabla_z k + s_z^\top \nabla_x k + \mathrm{tr} \nabla_x \nabla_z k

    Args:
        kernel: twice differentiable.
        X: points.
        scores_x: gradients of the log density at X, ``(N, D)``.
        Z: further points; None: X again.
        scores_z: gradients at Z, ``(M, D)``.

    Returns:
        The matrix of ``h(x_i, z_j)``; its mean over independent draws of the density is zero.

    Raises:
        ValueError: scores do not have the shape of their points.
        TypeError: not floating point.

    References:
        Liu, Lee and Jordan (2016), "A kernelized Stein discrepancy", equation 11 (theorem 3.6).
    """
    _check(X, scores_x)
    if Z is None or scores_z is None:
        Z, scores_z = X, scores_x
    _check(Z, scores_z)
    block = _radial_gram if _is_radial(kernel) else _pairwise_gram
    return block(kernel, X, scores_x, Z, scores_z)


def stein_sums(
    kernels: tuple[Kernel, ...],
    points: Float[Array, "N D"],
    scores: Float[Array, "_ _"],
    weights: Shaped[Array, "N m"] | None = None,
    *,
    tile: int = 512,
) -> PairSums:
    r"""Return the sums over pairs of the Stein kernels: discrepancies, row sums, bootstrap forms.

    The U-statistic of kernel s is ``totals[s] / (N (N − 1))``, the V-statistic ``(totals[s] + traces[s]) / N²``.

    Args:
        kernels: one Stein kernel each; ``row_sums``, ``forms`` and ``linear`` belong to their sum.
        points: draws.
        scores: gradients of the log density at the draws, ``(N, D)``.
        weights: columns w of the forms :math:`\sum_{i \ne j} w_i w_j h_{ij}`; None: none.
        tile: side of the squares in which the pairs are visited.

    Returns:
        Sums without the diagonal, and the traces. Memory O(N (D + m)).

    Raises:
        ValueError: shapes that do not agree.
        TypeError: not floating point.
    """
    _check(points, scores)
    weights = jnp.zeros((points.shape[0], 0), jnp.int8) if weights is None else weights
    return pair_sums(jax.tree_util.Partial(_stein_blocks, kernels), (points, scores), weights, tile=tile)


def _stein_blocks(kernels: tuple[Kernel, ...], rows: Any, columns: Any) -> Array:
    return jnp.stack([stein_gram(kernel, *rows, *columns) for kernel in kernels])


def _check(points: Array, scores: Array) -> None:
    for name, value in (("points", points), ("scores", scores)):
        check_floating(name, value)
    if points.ndim != 2 or points.shape != scores.shape:
        raise ValueError(
            f"points and scores must both have shape (N, D), got {points.shape} and {scores.shape}"
        )


def _is_radial(kernel: Kernel) -> bool:
    """A profile of ``|(x − z) / lengthscale|²``: features are plain divisions."""
    return isinstance(kernel, Stationary) and type(kernel).features is Stationary.features


def _slopes(kernel: Any, squared: Array) -> tuple[Array, Array, Array]:
    """The profile and its two derivatives with respect to the squared scaled distance."""

    def first(u):
        return jax.jvp(kernel.profile, (u,), (jnp.ones_like(u),))

    (value, slope), (_, curvature) = jax.jvp(first, (squared,), (jnp.ones_like(squared),))
    return value, slope, curvature


def _scaled(kernel: Any, *points: Array) -> tuple[Array, list[Array]]:
    """Lengthscales, and points from a common origin in units of them."""
    scale = jnp.broadcast_to(cast(kernel.lengthscale, points[0]), points[0].shape[1:])
    origin = jnp.mean(points[0], axis=0)
    return scale, [(X - origin) / scale for X in points]


def _directions(kernel: Kernel) -> tuple[Any, Any]:
    """The two functions of a kernel: what is prepared of all particles at once, and the sum over a block of sources."""
    if not _is_radial(kernel):
        return _pairwise_parts, _pairwise_direction
    return (
        (_gaussian_parts, _gaussian_direction) if type(kernel) is RBF else (_radial_parts, _radial_direction)
    )


def _block_sums(functions: Any, kernel: Any, cloud: Array, scores: Array, held: Array, rows: int) -> Array:
    """Sum over all sources for every particle, block by block: rows in a map, columns in a scan."""
    prepare, block = functions
    size = cloud.shape[0]
    targets, sources = prepare(kernel, cloud, scores, held)
    across = min(rows if prepare is _pairwise_parts else _COLUMNS, size)
    rows = min(rows, size)
    if rows == across == size:
        return block(kernel, targets, sources)
    targets, sources = (_cut(part, length) for part, length in ((targets, rows), (sources, across)))

    def toward(target):
        def add(total, source):
            return total + block(kernel, target, source), None

        first = jax.tree.map(lambda a: a[0], sources)
        if across >= size:
            return block(kernel, target, first)
        shape = jax.eval_shape(block, kernel, target, first)
        return jax.lax.scan(add, jnp.zeros(shape.shape, shape.dtype), sources)[0]

    return jax.lax.map(toward, targets).reshape(-1, cloud.shape[1])[:size]


def _cut(parts: Any, length: int) -> Any:
    """Leaves (N, ...) in blocks (blocks, length, ...); rows of zeros fill the last."""

    def one(a):
        a = jnp.pad(a, [(0, -a.shape[0] % length)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(-1, length, *a.shape[1:])

    return jax.tree.map(one, parts)


# exp(−|a − b|²/2): with R = [s − b / lengthscale, 1] one product of the gram holds pull and push together.


def _gaussian_parts(kernel: Any, X: Array, scores: Array, held: Array) -> tuple[Any, Any]:
    scale, features = _features(kernel, X, held)
    ones = jnp.ones_like(held)[:, None]
    right = (
        jnp.concatenate([scores - features / scale, ones], axis=1)
        * (held * cast(kernel.variance, X))[:, None]
    )
    if X.shape[1] <= _FEW:
        return (features, features / scale), (features, right)
    half = -0.5 * jnp.sum(features**2, axis=1, keepdims=True)
    targets = jnp.concatenate([features, half, ones], axis=1)
    sources = jnp.concatenate([features, ones, half], axis=1)
    return (targets, features / scale), (sources, right)


def _gaussian_direction(kernel: Any, target: Any, source: Any) -> Array:
    (a, pushed), (b, right) = target, source
    exponent = -0.5 * _differences(a, b) if a.shape[1] <= _FEW else jnp.minimum(_product(a, b.T), 0)
    total = _product(jnp.exp(exponent), right)
    return total[:, :-1] + total[:, -1:] * pushed


# Any profile f: value f s_j and slope ∇_j k = 2 f′ (b − a) / lengthscale, two products of the gram.


def _radial_parts(kernel: Any, X: Array, scores: Array, held: Array) -> tuple[Any, Any]:
    scale, features = _features(kernel, X, held)
    ends = 2 * jnp.concatenate([features / scale, jnp.ones_like(held)[:, None]], axis=1) * held[:, None]
    squares = jnp.sum(features**2, axis=1)
    return (features, squares, features / scale), (features, squares, scores * held[:, None], ends)


def _radial_direction(kernel: Any, target: Any, source: Any) -> Array:
    (a, a_squared, pushed), (b, b_squared, scores, ends) = target, source
    if a.shape[1] <= _FEW:
        squared = _differences(a, b)
    else:
        squared = jnp.maximum(a_squared[:, None] + b_squared[None, :] - 2 * _product(a, b.T), 0)
    value, slope = jax.jvp(kernel.profile, (squared,), (jnp.ones_like(squared),))
    total = _product(slope, ends)
    return _product(value, scores) + total[:, :-1] - total[:, -1:] * pushed


def _features(kernel: Any, X: Array, held: Array) -> tuple[Array, Array]:
    """Lengthscales, and the particles that are held from their mean, in units of the lengthscales; 0 for the others."""
    scale = jnp.broadcast_to(cast(kernel.lengthscale, X), X.shape[1:])
    origin = X.T @ held / jnp.maximum(jnp.sum(held), 1)
    return scale, (X - origin) / scale * held[:, None]


def _differences(a: Array, b: Array) -> Array:
    """``|a − b|²`` written out over few columns, so that it fuses with the profile into one pass."""
    total = (a[:, None, 0] - b[None, :, 0]) ** 2
    for k in range(1, a.shape[1]):
        total = total + (a[:, None, k] - b[None, :, k]) ** 2
    return total


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _pairwise_parts(kernel: Any, X: Array, scores: Array, held: Array) -> tuple[Any, Any]:
    return X, (X, scores, held)


def _pairwise_direction(kernel: Any, X: Any, source: Any) -> Array:
    sources, scores, held = source

    def pair(x, y, score):
        value, gradient = jax.value_and_grad(lambda y: kernel.evaluate(y, x))(y)
        return value * score + gradient

    pushes = jax.vmap(lambda x: jax.vmap(lambda y, score: pair(x, y, score))(sources, scores))(X)
    return jnp.einsum("j,ijd->id", held, pushes)


def _radial_gram(kernel: Any, X: Array, scores_x: Array, Z: Array, scores_z: Array) -> Array:
    scale, (a, b) = _scaled(kernel, X, Z)
    value, slope, curvature = _slopes(kernel, squared_distances(a, b))
    p, q = a / scale, b / scale  # ∇_x k = 2 f′ (p − q) = −∇_z k
    own = jnp.sum(scores_x * p, axis=1)[:, None] + jnp.sum(scores_z * q, axis=1)[None, :]
    along = own - scores_x @ q.T - p @ scores_z.T  # (s_x − s_z)ᵀ (p − q)
    trace = -2 * slope * jnp.sum(1 / scale**2) - 4 * curvature * squared_distances(p, q)
    return value * (scores_x @ scores_z.T) - 2 * slope * along + trace


def _pairwise_gram(kernel: Any, X: Array, scores_x: Array, Z: Array, scores_z: Array) -> Array:
    def pair(x, score_x, z, score_z):
        value, (dx, dz) = jax.value_and_grad(kernel.evaluate, argnums=(0, 1))(x, z)
        mixed = jax.jacfwd(jax.grad(kernel.evaluate, argnums=0), argnums=1)(x, z)
        return value * score_x @ score_z + score_x @ dz + score_z @ dx + jnp.trace(mixed)

    rows = jax.vmap(pair, (None, None, 0, 0))
    return jax.vmap(rows, (0, 0, None, None))(X, scores_x, Z, scores_z)
