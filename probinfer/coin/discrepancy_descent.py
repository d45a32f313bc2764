r"""Kernel Stein discrepancy descent: gradient descent of the squared discrepancy in the positions of the particles.

The squared discrepancy of a cloud from a density p is a double sum over its particles,
:math:`V = N^{-2} \sum_{jl} k_\pi(x_j, x_l)` with the Stein kernel :math:`k_\pi` (``numerics.stein.stein_gram``), and
its gradient is exact. V depends on each position directly and through its score s(x) = ∇ log p(x), so the chain rule
needs one product with the Hessian of log p per particle, which costs as much as a few gradients.

V has other stationary points besides the density: a cloud may stop between modes, or in a symmetry that the target does
not have. Start with a spread like that of the target.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from probinfer.coin.cloud_descent import descent
from probinfer.coin.engine.svgd import SVGD
from probinfer.core.algorithms import Algorithm
from probinfer.core.arguments import check_floating
from probinfer.core.identity import refresh_classes
from probinfer.core.types import Array, Bool, Float, Shaped, pytree
from probinfer.kernels import InverseMultiquadric
from probinfer.kernels.base import Kernel
from probinfer.numerics.stein import stein_gram

__all__ = ["KSDDescent", "hessian_products", "ksd_descent", "ksd_direction"]


@pytree
class KSDDescent(SVGD):
    """Descent of the kernel Stein discrepancy without a learning rate.

    An engine like ``coin.SVGD``, with the same settings, stopping rule and report; only the direction differs. It
    needs second derivatives, and it may stop at clouds that are not right, above all between modes, where ``coin.SVGD``
    goes on: compare the two.

    Args:
        num_particles: None: enough to keep 95 % of the standard deviation in this dimension, from 100 to 2000.
        max_steps: maximal number of steps.
        polish: as in ``coin.SVGD``.
        kernel: as in ``coin.ksd_descent``, like ``geometry``, ``bet`` and ``bandwidth``.

    References:
        Korba, Aubin-Frankowski, Majewski and Ablin (2021), "Kernel Stein discrepancy descent".
    """

    def _algorithm(self, logdensity_fn: Any) -> Algorithm:
        return ksd_descent(logdensity_fn, self.kernel, self.geometry, self.bet, bandwidth=self.bandwidth)


def ksd_descent(
    logdensity_fn: Any,
    kernel: Any = None,
    geometry: Any = None,
    bet: optax.GradientTransformation | None = None,
    *,
    bandwidth: str = "median",
) -> Algorithm:
    r"""Carry particles to a density along the gradient of their squared kernel Stein discrepancy.

    As ``coin.svgd``, with the same geometry, bets and bandwidth; only the direction differs.

    Args:
        logdensity_fn: log density of one position (a tree), twice differentiable, or a ``StochasticLogDensity``.
        kernel: three times differentiable. None: ``kernels.InverseMultiquadric()``, whose discrepancy detects whether a
            cloud converges. The lengthscale is in units of the root of the bandwidth, unless that is "fixed".
        geometry: as in ``coin.svgd``.
        bet: as in ``coin.svgd``.
        bandwidth: as in ``coin.svgd``.

    Returns:
        ``init(positions) -> CloudState`` with leaves (N, ...), whose ``.positions`` are the particles, and
        ``step(key, state) -> (CloudState, CloudInfo)``, for ``pi.run``. Memory O(N d) in addition to the densities.

    Raises:
        TypeError: ``logdensity_fn`` is not a function, the kernel has no lengthscale, or ``bet`` is not an optax
            transformation; from ``init``: the positions are not floating point.
        ValueError: The bandwidth rule is unknown; from ``init``: there are no leaves or fewer than two particles,
            leading axes differ, entries are NaN, particles are identical, or a coordinate has no spread but the
            geometry needs it.

    References:
        Korba, Aubin-Frankowski, Majewski and Ablin (2021), "Kernel Stein discrepancy descent"; Sharrock and Nemeth
        (2023), "Coin sampling", section 3.3.
    """
    kernel = InverseMultiquadric() if kernel is None else kernel
    return descent(logdensity_fn, _direction, kernel, geometry, bet, bandwidth=bandwidth)


def _direction(kernel: Any, z: Array, scores: Array, mask: Array, score_fn: Any) -> Array:
    """Return ``ksd_direction``, as ``descent`` calls it."""

    def curvature_fn(z, vectors):
        return jax.jvp(score_fn, (z,), (vectors,))[1]

    return ksd_direction(kernel, z, scores, curvature_fn, mask)


def hessian_products(
    logdensity_fn: Callable[[Array], Any], points: Float[Array, "N D"], vectors: Float[Array, "N D"]
) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
    r"""Return :math:`\nabla \log p(x_i)` and :math:`\nabla^2 \log p(x_i)\, v_i`, the derivative of the score along v.

    Args:
        logdensity_fn: log density of one point ``(D,)``, twice differentiable.
        points: where the derivatives are taken.
        vectors: one per point.

    Returns:
        Scores and products, in the units of 1 / point and of vector / point².
    """
    return jax.jvp(jax.vmap(jax.grad(logdensity_fn)), (points,), (vectors,))


def ksd_direction(
    kernel: Kernel,
    particles: Float[Array, "N D"],
    scores: Shaped[Array, "_ _"],
    curvature_fn: Callable[[Array, Array], Array],
    mask: Bool[Array, " N"] | None = None,
    *,
    tile: int = 256,
) -> Float[Array, "N D"]:
    r"""Return :math:`-\nabla_{x_i} \frac{1}{N^2} \sum_{jl} k_\pi(x_j, x_l)` for every particle.

    With the derivatives a and b of the double sum for positions and scores, the direction is
    :math:`-(a_i + \nabla^2 \log p(x_i)\, b_i)`. The kernel is held fixed, even if its lengthscale was computed from the
    particles.

    Args:
        kernel: three times differentiable; with the heavy tails of ``InverseMultiquadric`` distant particles interact.
        particles: the cloud x.
        scores: gradients of the log density at the particles.
        curvature_fn: ``curvature_fn(particles, vectors) -> (N, D)``: Hessians of the log density times vectors, for
            example the second result of ``hessian_products``.
        mask: which particles count; None: all. The others get the direction NaN, which freezes a bet on them.
        tile: the pairs are visited in squares of this many particles (static): memory O(N D) in addition to a few
            ``(tile, tile)`` arrays, or ``(tile, tile, D)`` for kernels that are not functions of a scaled distance.

    Returns:
        The direction of steepest descent of the squared discrepancy, in units of squared discrepancy / particle.

    Raises:
        ValueError: Scores or Hessian products do not have the shape of the particles.
        TypeError: Particles or scores are not floating point.

    References:
        Korba, Aubin-Frankowski, Majewski and Ablin (2021), "Kernel Stein discrepancy descent", equation 10.
    """
    refresh_classes(kernel)
    check_floating("particles", particles)
    check_floating("scores", scores)
    if particles.shape != scores.shape:
        raise ValueError(
            f"scores must have the shape of the particles, {particles.shape}, got {scores.shape}; give the gradient "
            "of the log density at each particle"
        )
    mask = jnp.ones(particles.shape[0], bool) if mask is None else mask
    position_gradient, score_gradient = _gradients(kernel, particles, scores, mask, tile=tile)
    products = curvature_fn(particles, score_gradient)
    if products.shape != particles.shape:
        raise ValueError(
            f"curvature_fn must return one Hessian product per particle, shape {particles.shape}, got {products.shape}"
        )
    return jnp.where(mask[:, None], -(position_gradient + products), jnp.nan)


@partial(jax.jit, static_argnames="tile")
def _gradients(
    kernel: Kernel, particles: Array, scores: Array, mask: Array, *, tile: int
) -> tuple[Array, Array]:
    """Return the derivatives of the mean of the Stein kernel over pairs, for positions and for scores.

    As the Stein kernel is symmetric, they are twice the derivatives for its first argument, also on the diagonal.
    """
    num_particles = particles.shape[0]
    tile = min(tile, num_particles)
    padding = -num_particles % tile

    # Tiles of positions, scores and weights; padding has weight zero
    weights = jnp.pad(mask.astype(particles.dtype), (0, padding)).reshape(-1, tile)
    count = jnp.maximum(jnp.sum(weights), 1)
    position_tiles, score_tiles = (
        jnp.pad(jnp.where(mask[:, None], a, 0), ((0, padding), (0, 0))).reshape(-1, tile, a.shape[1])
        for a in (particles, scores)
    )

    def row_gradients(rows):
        def add(total, sources):
            new = jax.grad(partial(_tile_sum, kernel))(rows, *sources)
            return jax.tree.map(jnp.add, total, new), None

        zeros = jax.tree.map(jnp.zeros_like, rows)
        return jax.lax.scan(add, zeros, (position_tiles, score_tiles, weights))[0]

    gradients = jax.lax.map(row_gradients, (position_tiles, score_tiles))
    by_position, by_score = (2 * a.reshape(-1, a.shape[-1])[:num_particles] / count**2 for a in gradients)
    return by_position, by_score


def _tile_sum(kernel: Any, rows: tuple[Array, Array], points: Array, scores: Array, weights: Array) -> Array:
    """Return the weighted sum of the Stein kernel between the rows and the sources."""
    return jnp.sum(stein_gram(kernel, *rows, points, scores) * weights)
