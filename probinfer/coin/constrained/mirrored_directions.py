r"""Stein directions in the dual space of a mirror map, for kernels of the distance between positions.

With positions :math:`\theta_j`, dual coordinates :math:`\eta_j`, Jacobians :math:`T_j = d\theta_j/d\eta_j` and scores
:math:`s_j = \nabla_\eta \log \tilde\pi(\eta_j)` of the density of :math:`\eta`. For a mirror map :math:`T_j` is
:math:`\nabla^2\psi(\theta_j)^{-1}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Bool, Float
from probinfer.kernels.stationary import squared_distances

__all__ = ["adapted_direction", "mirrored_direction"]

_JITTER = 1e-5


def mirrored_direction(
    kernel: Any,
    positions: Float[Array, "N D"],
    jacobians: Float[Array, "N D d"],
    scores: Float[Array, "N d"],
    mask: Bool[Array, " N"],
) -> Float[Array, "N d"]:
    r"""Return :math:`\frac1N \sum_j k(\theta_j, \theta_i) s_j + T_j^\top \nabla_{\theta_j} k(\theta_j, \theta_i)`.

    Args:
        kernel: a function of the distance over a lengthscale.
        positions: theta.
        jacobians: T.
        scores: s.
        mask: which particles act on the others.

    Returns:
        The direction in eta. Memory O(N² + N D d).

    References:
        Shi, Liu and Mackey (2022), "Sampling with mirrored Stein operators", algorithm 1 (MSVGD).
    """
    value, slope, centered = _gram_and_slope(kernel, positions, mask)
    at_source, at_target = _pulled_back(slope, jacobians, centered)
    repulsion = at_source - jnp.einsum("ipd,ip->id", at_target, centered)
    return (value @ scores + repulsion) / jnp.maximum(jnp.sum(mask), 1)


def adapted_direction(
    kernel: Any,
    positions: Float[Array, "N D"],
    jacobians: Float[Array, "N D d"],
    scores: Float[Array, "N d"],
    mask: Bool[Array, " N"],
    hessian: Callable,
    cutoff: Any,
) -> Float[Array, "N d"]:
    r"""Return the direction of a kernel that is adapted to the mirror map.

    .. math:: E_{\theta''} k^{1/2}(\theta, \theta'') \nabla^2\psi(\theta'') k^{1/2}(\theta'', \theta')

    with the root from the eigenvectors of the Gram matrix.

    Args:
        kernel: a function of the distance over a lengthscale.
        positions: theta.
        jacobians: T.
        scores: s.
        mask: which particles act on the others.
        hessian: ``hessian(vectors (N, d)) -> (N, d)``, products with the Hessian of psi at every particle.
        cutoff: eigenvectors are used, the largest first, up to this share of the trace.

    Returns:
        The direction in eta; for the Hessian of a parabola and all eigenvectors it is that of ``mirrored_direction``.
        One N x N eigendecomposition; memory O(N² + N D d).

    References:
        Shi, Liu and Mackey (2022), "Sampling with mirrored Stein operators", section 4.3 (SVMD).
    """
    value, slope, centered = _gram_and_slope(kernel, positions, mask)

    # Leading eigenvectors of the Gram matrix
    value = jnp.where(mask[:, None], value, 0)
    values, vectors = jnp.linalg.eigh(value + _JITTER * jnp.eye(len(centered), dtype=centered.dtype))
    values = jnp.maximum(values, _JITTER / 10)
    larger = jnp.cumsum(values[::-1])[::-1] - values  # sum of the larger eigenvalues
    vectors = jnp.where(larger < cutoff * jnp.sum(values), vectors, 0)

    # Mean scores and gradients of the eigenfunctions
    slope = jnp.where(mask[:, None], slope, 0)
    at_source, at_target = _pulled_back(slope, jacobians, centered)
    gradients = vectors.T @ at_source - vectors.T @ jnp.einsum("lpd,lp->ld", at_target, centered)
    means = vectors.T @ jnp.where(mask[:, None], scores, 0) + gradients / values[:, None]

    # Apply the Hessian between the roots of the Gram matrix
    root = jnp.sqrt(values)[:, None]
    products = jnp.where(mask[:, None], hessian(vectors @ (root * means)), 0)
    return vectors @ (root * (vectors.T @ products)) / jnp.maximum(jnp.sum(mask), 1)


def _gram_and_slope(kernel: Any, positions: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Return the Gram matrix and its slope, 2 f' / lengthscale², for the columns in the mask; centered positions."""
    centered = positions - jnp.mean(positions, axis=0)
    scaled = centered / kernel.lengthscale
    squared = squared_distances(scaled, scaled)
    value, slope = jax.jvp(kernel.profile, (squared,), (jnp.ones_like(squared),))
    return value * mask, 2 * slope * mask / kernel.lengthscale**2, centered


def _pulled_back(slope: Array, jacobians: Array, positions: Array) -> tuple[Array, Array]:
    """Return sum_j slope_ij T_jᵀ theta_j, (N, d), and sum_j slope_ij T_j, (N, D, d)."""
    at_source = jnp.einsum("jpd,jp->jd", jacobians, positions)
    at_target = (slope @ jacobians.reshape(len(positions), -1)).reshape(jacobians.shape)
    return slope @ at_source, at_target
