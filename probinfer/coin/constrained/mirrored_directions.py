r"""Stein directions in the dual space of a mirror map, for kernels of the distance of the positions.

With positions :math:`\theta_j`, dual coordinates :math:`\eta_j`, Jacobians :math:`T_j = d\theta_j/d\eta_j` and scores
:math:`s_j = \nabla_\eta \log \tilde\pi(\eta_j)` of the density of :math:`\eta`, where :math:`T_j` of a mirror map is
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
        mask: particles that the others feel.

    Returns:
        The direction in eta. Memory O(N² + N D d).

    References:
        Shi, Liu and Mackey (2022), "Sampling with mirrored Stein operators", algorithm 1 (MSVGD).
    """
    value, slope, flat = _slopes(kernel, positions, mask)
    own = jnp.einsum("jpd,jp->jd", jacobians, flat)
    spread = (slope @ jacobians.reshape(len(flat), -1)).reshape(jacobians.shape)
    pushed = slope @ own - jnp.einsum("ipd,ip->id", spread, flat)
    return (value @ scores + pushed) / jnp.maximum(jnp.sum(mask), 1)


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
        mask: particles that the others feel.
        hessian: ``hessian(vectors (N, d)) -> (N, d)``, products with the Hessian of psi at every particle.
        cutoff: eigenvectors are kept, the largest first, until they hold this share of the trace.

    Returns:
        The direction in eta; with the Hessian of a parabola and all eigenvectors that of ``mirrored_direction``. One
        N x N eigendecomposition; memory O(N² + N D d).

    References:
        Shi, Liu and Mackey (2022), "Sampling with mirrored Stein operators", section 4.3 (SVMD).
    """
    value, slope, flat = _slopes(kernel, positions, mask)
    value = jnp.where(mask[:, None], value, 0)
    values, vectors = jnp.linalg.eigh(value + _JITTER * jnp.eye(len(flat), dtype=flat.dtype))
    values = jnp.maximum(values, _JITTER / 10)
    larger = jnp.cumsum(values[::-1])[::-1] - values
    vectors = jnp.where(larger < cutoff * jnp.sum(values), vectors, 0)
    slope = jnp.where(mask[:, None], slope, 0)
    own = jnp.einsum("jpd,jp->jd", jacobians, flat)
    spread = (slope @ jacobians.reshape(len(flat), -1)).reshape(jacobians.shape)
    gradients = vectors.T @ (slope @ own) - vectors.T @ jnp.einsum("lpd,lp->ld", spread, flat)
    means = vectors.T @ jnp.where(mask[:, None], scores, 0) + gradients / values[:, None]
    root = jnp.sqrt(values)[:, None]
    turned = hessian(vectors @ (root * means))
    turned = jnp.where(mask[:, None], turned, 0)
    return vectors @ (root * (vectors.T @ turned)) / jnp.maximum(jnp.sum(mask), 1)


def _slopes(kernel: Any, positions: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Gram matrix and its slope, 2 f' / lengthscale², of the kept columns; positions from their mean."""
    flat = positions - jnp.mean(positions, axis=0)
    scaled = flat / kernel.lengthscale
    squared = squared_distances(scaled, scaled)
    value, slope = jax.jvp(kernel.profile, (squared,), (jnp.ones_like(squared),))
    return value * mask, 2 * slope * mask / kernel.lengthscale**2, flat
