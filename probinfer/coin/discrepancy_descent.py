r"""The direction of kernel Stein discrepancy descent: the particles as the variables of one smooth function.

The squared discrepancy of a cloud from a density p is a double sum over its particles,
:math:`V = N^{-2} \sum_{jl} k_\pi(x_j, x_l)` with the Stein kernel :math:`k_\pi` (``stein.stein_gram``), and its
gradient is exact. A particle enters by its place and by its score s(x) = ∇ log p(x), so the chain rule asks for one
product with the Hessian of log p a particle, which is as dear as a few gradients.

Its fixed points are more than the density asks for: a cloud may rest between modes, or symmetric about an axis that
the target does not have. Start with a spread like that of the target.
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
from probinfer.core.errors import check_floating
from probinfer.core.identity import notice
from probinfer.core.types import Array, Bool, Float, Shaped, pytree
from probinfer.kernels import InverseMultiquadric
from probinfer.kernels.base import Kernel
from probinfer.numerics.stein import stein_gram

__all__ = ["KSDDescent", "hessian_products", "ksd_descent", "ksd_direction"]


@pytree
class KSDDescent(SVGD):
    """Descent of the kernel Stein discrepancy without a learning rate.

    An engine like ``coin.SVGD``, with the same settings, stopping rule and report; only the direction differs. It
    needs second derivatives, and it may rest at clouds that are not right, between modes above all, where
    ``coin.SVGD`` goes on: compare the two.

    Args:
        num_particles: None: enough to keep 95 % of the standard deviation in as many dimensions, 100 to 2000.
        max_steps: the most steps.
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

    The twin of ``coin.svgd``, with the same geometry, bets and bandwidth: only the direction differs.

    Args:
        logdensity_fn: log density of one position (a tree), twice differentiable, or a ``StochasticLogDensity``.
        kernel: None: ``kernels.InverseMultiquadric()``, whose discrepancy sees whether a cloud converges; three times
            differentiable. The lengthscale is in units of the root of the bandwidth, unless that is "fixed".
        geometry: as in ``coin.svgd``.
        bet: as in ``coin.svgd``.
        bandwidth: as in ``coin.svgd``.

    Returns:
        ``init(positions) -> CloudState`` with leaves (N, ...), whose ``.positions`` are the particles, and
        ``step(key, state) -> (CloudState, CloudInfo)``, for ``pi.run``. Memory O(N d) beside that of the densities.

    Raises:
        TypeError: ``logdensity_fn`` is no function, a kernel without a lengthscale, a ``bet`` that is no optax
            transformation; from ``init``: positions that are not floating point.
        ValueError: an unknown bandwidth rule; from ``init``: no leaves, leading axes that differ, fewer than two
            particles, NaN, identical particles, or a coordinate without spread where the geometry needs one.

    References:
        Korba, Aubin-Frankowski, Majewski and Ablin (2021), "Kernel Stein discrepancy descent"; Sharrock and Nemeth
        (2023), "Coin sampling", section 3.3.
    """
    kernel = InverseMultiquadric() if kernel is None else kernel
    return descent(logdensity_fn, _direction, kernel, geometry, bet, bandwidth=bandwidth)


def _direction(kernel: Any, z: Array, scores: Array, mask: Array, score_fn: Any) -> Array:
    """Return ``ksd_direction``, as ``descent`` calls it."""

    def curvature(z, vectors):
        return jax.jvp(score_fn, (z,), (vectors,))[1]

    return ksd_direction(kernel, z, scores, curvature, mask)


def hessian_products(
    logdensity_fn: Callable[[Array], Any], points: Float[Array, "N D"], vectors: Float[Array, "N D"]
) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
    r"""Return :math:`\nabla \log p(x_i)` and :math:`\nabla^2 \log p(x_i)\, v_i`, the derivative of the score along v.

    Args:
        logdensity_fn: log density of one point ``(D,)``, twice differentiable.
        points: where.
        vectors: one a point.

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

    With a and b the derivatives of the double sum for places and scores, the direction is
    :math:`-(a_i + \nabla^2 \log p(x_i)\, b_i)`. The kernel is held fixed, also where its lengthscale was taken from
    the particles.

    Args:
        kernel: three times differentiable; the heavy tails of ``InverseMultiquadric`` let far particles be seen.
        particles: the cloud x.
        scores: gradients of the log density at the particles.
        curvature_fn: ``curvature_fn(particles, vectors) -> (N, D)``: Hessians of the log density times vectors, for
            example the second result of ``hessian_products``.
        mask: which particles count; None: all. The others get the direction NaN, which freezes a bet on them.
        tile: the pairs are visited in squares of this many particles (static): memory O(N D) beside some
            ``(tile, tile)`` arrays, ``(tile, tile, D)`` for kernels that are not functions of a scaled distance.

    Returns:
        The direction of steepest descent of the squared discrepancy, in units of squared discrepancy / particle.

    Raises:
        ValueError: scores or Hessian products do not have the shape of the particles.
        TypeError: not floating point.

    References:
        Korba, Aubin-Frankowski, Majewski and Ablin (2021), "Kernel Stein discrepancy descent", equation 10.
    """
    notice(kernel)
    check_floating("particles", particles)
    check_floating("scores", scores)
    if particles.shape != scores.shape:
        raise ValueError(
            f"scores must have the shape of the particles, {particles.shape}, got {scores.shape}; give the gradient "
            "of the log density at each particle"
        )
    mask = jnp.ones(particles.shape[0], bool) if mask is None else mask
    by_place, by_score = _gradients(kernel, particles, scores, mask, tile=tile)
    curved = curvature_fn(particles, by_score)
    if curved.shape != particles.shape:
        raise ValueError(
            f"curvature_fn must return one Hessian product a particle, shape {particles.shape}, got {curved.shape}"
        )
    return jnp.where(mask[:, None], -(by_place + curved), jnp.nan)


@partial(jax.jit, static_argnames="tile")
def _gradients(
    kernel: Kernel, particles: Array, scores: Array, mask: Array, *, tile: int
) -> tuple[Array, Array]:
    """Derivatives of the mean of the Stein kernel over pairs, for places and for scores.

    The Stein kernel is symmetric: twice the derivative for its first argument, the diagonal included.
    """
    size = particles.shape[0]
    tile = min(tile, size)
    pad = -size % tile
    held = jnp.pad(mask.astype(particles.dtype), (0, pad)).reshape(-1, tile)
    count = jnp.maximum(jnp.sum(held), 1)
    cloud, slopes = (
        jnp.pad(jnp.where(mask[:, None], a, 0), ((0, pad), (0, 0))).reshape(-1, tile, a.shape[1])
        for a in (particles, scores)
    )

    def toward(rows):
        def add(total, source):
            new = jax.grad(partial(_block_sum, kernel))(rows, *source)
            return jax.tree.map(jnp.add, total, new), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, rows), (cloud, slopes, held))[0]

    both = jax.lax.map(toward, (cloud, slopes))
    places, by_score = (2 * a.reshape(-1, a.shape[-1])[:size] / count**2 for a in both)
    return places, by_score


def _block_sum(kernel: Any, rows: tuple[Array, Array], points: Array, scores: Array, held: Array) -> Array:
    """Sum of the Stein kernel over the rows and the sources that are not padding."""
    return jnp.sum(stein_gram(kernel, *rows, points, scores) * held)
