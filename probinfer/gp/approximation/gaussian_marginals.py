"""The marginals of a Gaussian process times Gaussian sites, and the normalizer of their product.

q(f) ∝ N(f; μ, K) Π t_i(f_i), t_i(f) = exp(λ1_i f − ½ λ2_i f²). The derivative rule is that of the marginals, not of
the matrices behind them: one product of N x N matrices for a tangent of K and N² operations for tangents of the sites,
forward and backward.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from probinfer.core.types import Array, Float, Int
from probinfer.gp.structure.dense import PosteriorMatrices, posterior_matrices

__all__ = ["Marginals", "marginals", "marginals_from"]


class Marginals(NamedTuple):
    """The Gaussian posterior at the training points."""

    mean: Float[Array, " N"]
    """Posterior means m = μ + K alpha."""
    variance: Float[Array, " N"]
    """Posterior variances v = diag Σ."""
    alpha: Float[Array, " N"]
    """λ1 - λ2 m."""
    log_z: Float[Array, ""]
    """log ∫ N(f; μ, K) Π t_i(f_i) df."""
    status: Int[Array, ""]
    """``Status`` of the factorization."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def marginals(
    K: Float[Array, "N N"],
    prior_mean: Float[Array, " N"],
    lam1: Float[Array, " N"],
    lam2: Float[Array, " N"],
    signed: bool,
) -> Marginals:
    """Condition a Gaussian process on sites.

    Args:
        K: prior covariance.
        prior_mean: prior mean μ.
        lam1: first natural parameters of the sites.
        lam2: their precisions.
        signed: whether precisions may be negative.

    Returns:
        The marginals; NaN if the status is bad.
    """
    return marginals_from(posterior_matrices(K, lam2, signed), prior_mean, lam1, lam2)


def marginals_from(
    matrices: PosteriorMatrices,
    prior_mean: Float[Array, " N"],
    lam1: Float[Array, " N"],
    lam2: Float[Array, " N"],
) -> Marginals:
    """The same from matrices that were computed before; differentiable through them."""
    # B⁻¹ is symmetric, so M = S⁻¹B⁻¹S and Mᵀ differ: both are products with a vector, N² operations.
    shift = matrices.covariance @ (lam1 - lam2 * prior_mean)  # m − μ
    alpha = matrices.shrinkage.T @ lam1 - matrices.reduction @ prior_mean
    log_z = (
        0.5 * jnp.dot(lam1 - lam2 * prior_mean, shift)
        + jnp.dot(lam1 - 0.5 * lam2 * prior_mean, prior_mean)
        - 0.5 * matrices.log_det
    )
    return Marginals(
        mean=prior_mean + shift,
        variance=jnp.diagonal(matrices.covariance),
        alpha=alpha,
        log_z=log_z,
        status=matrices.status,
    )


def _marginals_jvp(signed, primals, tangents):
    K, prior_mean, lam1, lam2 = primals
    dK, dprior, dlam1, dlam2 = tangents
    matrices = posterior_matrices(K, lam2, signed)
    q = marginals_from(matrices, prior_mean, lam1, lam2)
    dvariance, dlog_z = jnp.zeros_like(lam1), jnp.zeros_like(q.log_z)
    # dm = M dfield + Σ dsites: what changes the prior mean, and what changes λ1 − λ2 m.
    dsites, dfield = jnp.zeros_like(lam1), jnp.zeros_like(lam1)
    if not isinstance(dlam1, SymbolicZero):
        dsites += dlam1
        dlog_z += jnp.dot(q.mean, dlam1)
    if not isinstance(dlam2, SymbolicZero):
        dsites -= q.mean * dlam2
        dvariance -= (matrices.covariance * matrices.covariance) @ dlam2
        dlog_z -= 0.5 * jnp.dot(q.mean * q.mean + q.variance, dlam2)
    if not isinstance(dprior, SymbolicZero):
        dfield += dprior
        dlog_z += jnp.dot(q.alpha, dprior)
    if not isinstance(dK, SymbolicZero):
        dK_alpha = dK @ q.alpha
        dfield += dK_alpha
        dvariance += jnp.sum((matrices.shrinkage @ dK) * matrices.shrinkage, 1)
        dlog_z += 0.5 * jnp.dot(q.alpha, dK_alpha) - 0.5 * jnp.sum(matrices.reduction * dK)
    dmean = matrices.shrinkage @ dfield + matrices.covariance @ dsites
    dalpha = matrices.shrinkage.T @ dsites - matrices.reduction @ dfield
    dstatus: Any = np.zeros(q.status.shape, jax.dtypes.float0)
    return q, Marginals(mean=dmean, variance=dvariance, alpha=dalpha, log_z=dlog_z, status=dstatus)


marginals.defjvp(_marginals_jvp, symbolic_zeros=True)
