r"""The spread of weighted particles: a root R of their covariance, :math:`R R^\top \approx \Sigma`, dense or diagonal.

A dense root is lower triangular (d, d), a diagonal one is the standard deviations (d,). In the coordinates
:math:`z = R^{-1} u` the particles have about unit covariance.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float
from probinfer.numerics import weights

__all__ = ["LARGEST_DENSE", "first_root", "pull", "push", "root_of", "standardized"]

LARGEST_DENSE = 64  # dimensions; above, so many particles that a dense estimate is good are rarely affordable


def root_of(log_weights: Float[Array, " n"], positions: Float[Array, "n d"]) -> Float[Array, "..."]:
    r"""Return the root of the weighted covariance, shrunk towards its diagonal by :math:`(d+1)/(d+1+\mathrm{ESS})`.

    Args:
        log_weights: of the particles, unnormalised.
        positions: of the particles.

    Returns:
        (d, d) up to ``LARGEST_DENSE`` dimensions, else (d,). NaN where the weights are degenerate or nothing varies.
    """
    dimension = positions.shape[1]
    if dimension > LARGEST_DENSE:
        return jnp.sqrt(weights.variance(log_weights, positions))
    covariance = weights.covariance(log_weights, positions)
    share = (dimension + 1) / (dimension + 1 + weights.ess(log_weights))
    diagonal = jnp.diag(covariance)
    scale = jnp.sqrt(diagonal)
    correlation = (1 - share) * covariance / (scale[:, None] * scale) + share * jnp.eye(
        dimension, dtype=scale.dtype
    )
    return scale[:, None] * jnp.linalg.cholesky(correlation)


def first_root(dimension: int, dtype: jnp.dtype) -> Float[Array, "..."]:
    """Return the root of the identity, in the shape that ``root_of`` returns.

    Args:
        dimension: d.
        dtype: of the positions.
    """
    return jnp.ones(dimension, dtype) if dimension > LARGEST_DENSE else jnp.eye(dimension, dtype=dtype)


def push(root: Float[Array, "..."], z: Float[Array, " d"]) -> Float[Array, " d"]:
    """Return R z: from coordinates of unit covariance to positions."""
    return root * z if root.ndim == 1 else root @ z


def pull(root: Float[Array, "..."], gradient: Float[Array, " d"]) -> Float[Array, " d"]:
    """Return R' g: a gradient in coordinates of unit covariance.

    A product from the left: inside a vectorised loop XLA's single-threaded CPU code took ``R.T @ g`` for ``R @ g``.
    """
    return root * gradient if root.ndim == 1 else gradient @ root


def standardized(root: Float[Array, "..."], centred: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Return :math:`R^{-1} v` of each row: from positions, their centre at zero, to coordinates of unit covariance."""
    if root.ndim == 1:
        return centred / root
    return jax.scipy.linalg.solve_triangular(root, centred.T, lower=True).T
