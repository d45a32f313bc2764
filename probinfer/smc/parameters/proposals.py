"""Proposals of parameters: independent draws from a Student-t, and local steps of a random walk."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, PRNGKey
from probinfer.numerics import covariance_factor
from probinfer.smc.tempered.bridge import DEGREES_OF_FREEDOM

__all__ = ["LOCAL_SCALE", "propose"]

LOCAL_SCALE = 2.562  # over sqrt(d): Sherlock et al. (2015), a random walk with noise


def propose(
    key: PRNGKey, positions: Float[Array, "n d"], mean: Array, factor: Array, independent: Array
) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    r"""Propose new positions; return them and :math:`\log q(u' \to u) - \log q(u \to u')`.

    Args:
        key: random key.
        positions: of the particles.
        mean: (d,) of the Student-t.
        factor: of its scale matrix.
        independent: draws from the Student-t, or steps of a random walk.
    """
    num_particles, d = positions.shape
    # z sqrt(df / chi2_df), with the chi-squared as a sum of squared normals
    normal = jax.random.normal(key, (num_particles, d + DEGREES_OF_FREEDOM), positions.dtype)
    z, chi_normals = normal[:, :d], normal[:, d:]
    student = z / jnp.sqrt(jnp.mean(chi_normals**2, axis=1, keepdims=True))
    z = jnp.where(independent, student, z * (LOCAL_SCALE / math.sqrt(d)))
    step = jax.vmap(partial(covariance_factor.apply, factor))(z)
    proposed = jnp.where(independent, mean, positions) + step
    # The random walk is symmetric: its ratio is one.
    log_student = jax.vmap(partial(_log_student, factor))
    log_proposal_ratio = log_student(positions - mean) - log_student(proposed - mean)
    return proposed, jnp.where(independent, log_proposal_ratio, jnp.zeros_like(log_proposal_ratio))


def _log_student(factor: Array, centered: Float[Array, " d"]) -> Array:
    """Return the log density of a Student-t up to a constant."""
    if factor.ndim == 1:
        z = centered / factor
    else:
        z = jax.scipy.linalg.solve_triangular(factor, centered, lower=True)
    exponent = -(DEGREES_OF_FREEDOM + centered.shape[0]) / 2
    return exponent * jnp.log1p(jnp.sum(z**2) / DEGREES_OF_FREEDOM)
