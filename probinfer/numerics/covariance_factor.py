r"""A factor R of the covariance of weighted particles, :math:`R R^\top \approx \Sigma`, dense or diagonal.

A dense factor is lower triangular (d, d), a diagonal one holds the standard deviations (d,). In the coordinates
:math:`z = R^{-1} u` the particles have about unit covariance.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float
from probinfer.numerics import weights

__all__ = ["MAX_DENSE_DIMENSION", "apply", "apply_transpose", "estimate", "identity", "solve_rows"]

MAX_DENSE_DIMENSION = 64  # in more dimensions few users can afford the particles that a dense estimate needs


def estimate(log_weights: Float[Array, " n"], positions: Float[Array, "n d"]) -> Float[Array, "..."]:
    r"""Return a factor of the weighted covariance, shrunk towards its diagonal by :math:`(d+1)/(d+1+\mathrm{ESS})`.

    Args:
        log_weights: of the particles, unnormalized.
        positions: of the particles.

    Returns:
        (d, d) up to ``MAX_DENSE_DIMENSION`` dimensions, else (d,). NaN if the weights are degenerate or a coordinate
        does not vary.
    """
    dimension = positions.shape[1]
    if dimension > MAX_DENSE_DIMENSION:
        return jnp.sqrt(weights.variance(log_weights, positions))
    covariance = weights.covariance(log_weights, positions)
    shrinkage = (dimension + 1) / (dimension + 1 + weights.ess(log_weights))
    diagonal = jnp.diag(covariance)
    scale = jnp.sqrt(diagonal)
    # Shrink and factorize the correlation: coordinates of very different scales do not spoil the Cholesky factor.
    correlation = (1 - shrinkage) * covariance / (scale[:, None] * scale) + shrinkage * jnp.eye(
        dimension, dtype=scale.dtype
    )
    return scale[:, None] * jnp.linalg.cholesky(correlation)


def identity(dimension: int, dtype: jnp.dtype) -> Float[Array, "..."]:
    """Return the factor of the identity, in the shape that ``estimate`` returns.

    Args:
        dimension: d.
        dtype: of the positions.
    """
    return jnp.ones(dimension, dtype) if dimension > MAX_DENSE_DIMENSION else jnp.eye(dimension, dtype=dtype)


def apply(factor: Float[Array, "..."], z: Float[Array, " d"]) -> Float[Array, " d"]:
    """Return R z: from coordinates of unit covariance to positions."""
    return factor * z if factor.ndim == 1 else factor @ z


def apply_transpose(factor: Float[Array, "..."], gradient: Float[Array, " d"]) -> Float[Array, " d"]:
    """Return R' g: the gradient in coordinates of unit covariance.

    Written as a product from the left: in a vectorized loop XLA's single-threaded CPU code computed ``R @ g`` for
    ``R.T @ g``.
    """
    return factor * gradient if factor.ndim == 1 else gradient @ factor


def solve_rows(factor: Float[Array, "..."], centered: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Return :math:`R^{-1} v` of each row: from centered positions to coordinates of unit covariance."""
    if factor.ndim == 1:
        return centered / factor
    return jax.scipy.linalg.solve_triangular(factor, centered.T, lower=True).T
