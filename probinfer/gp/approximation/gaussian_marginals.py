"""The marginals of a Gaussian process times Gaussian sites, and the normaliser of their product.

q(f) ∝ N(f; μ, K) Π t_i(f_i), t_i(f) = exp(λ1_i f − ½ λ2_i f²). The rules for derivatives are those of the marginals,
not of the matrices behind them: forward one product of n x n matrices for a tangent of K and n² operations for tangents
of the sites; backward the same.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from probinfer.core.types import Array, Float
from probinfer.gp.structure.dense import Precision, precision

__all__ = ["Marginals", "marginals", "marginals_from"]


class Marginals(NamedTuple):
    """What the sites leave of the prior at the training points."""

    mean: Array
    """(N,) posterior means, the prior mean plus K alpha."""
    variance: Array
    """(N,) posterior variances v = diag Σ."""
    alpha: Array
    """(N,) lam1 - lam2 m."""
    log_z: Array
    """Scalar log ∫ N(f; μ, K) Π t_i(f_i) df."""
    status: Array
    """``Status`` of the factorisation."""


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
        The marginals; NaN where the status is bad.
    """
    return marginals_from(precision(K, lam2, signed), prior_mean, lam1, lam2)


def marginals_from(
    known: Precision, prior_mean: Float[Array, " N"], lam1: Float[Array, " N"], lam2: Float[Array, " N"]
) -> Marginals:
    """The same where the matrices are known; differentiable through them."""
    # B⁻¹ is symmetric, so M = S⁻¹B⁻¹S and Mᵀ differ: both are products with a vector, n² operations.
    shift = known.covariance @ (lam1 - lam2 * prior_mean)  # m − μ
    alpha = known.shrinkage.T @ lam1 - known.reduction @ prior_mean
    log_z = (
        0.5 * jnp.dot(lam1 - lam2 * prior_mean, shift)
        + jnp.dot(lam1 - 0.5 * lam2 * prior_mean, prior_mean)
        - 0.5 * known.log_det
    )
    return Marginals(prior_mean + shift, jnp.diagonal(known.covariance), alpha, log_z, known.status)


def _rule(signed, primals, tangents):
    K, prior_mean, lam1, lam2 = primals
    dK, dprior, dlam1, dlam2 = tangents
    known = precision(K, lam2, signed)
    q = marginals_from(known, prior_mean, lam1, lam2)
    dvariance, dlog_z = jnp.zeros_like(lam1), jnp.zeros_like(q.log_z)
    dsites, dfield = jnp.zeros_like(lam1), jnp.zeros_like(lam1)
    if not isinstance(dlam1, SymbolicZero):
        dsites += dlam1
        dlog_z += jnp.dot(q.mean, dlam1)
    if not isinstance(dlam2, SymbolicZero):
        dsites -= q.mean * dlam2
        dvariance -= (known.covariance * known.covariance) @ dlam2
        dlog_z -= 0.5 * jnp.dot(q.mean * q.mean + q.variance, dlam2)
    if not isinstance(dprior, SymbolicZero):
        dfield += dprior
        dlog_z += jnp.dot(q.alpha, dprior)
    if not isinstance(dK, SymbolicZero):
        through = dK @ q.alpha
        dfield += through
        dvariance += jnp.sum((known.shrinkage @ dK) * known.shrinkage, 1)
        dlog_z += 0.5 * jnp.dot(q.alpha, through) - 0.5 * jnp.sum(known.reduction * dK)
    dmean = known.shrinkage @ dfield + known.covariance @ dsites
    dalpha = known.shrinkage.T @ dsites - known.reduction @ dfield
    dstatus: Any = np.zeros(q.status.shape, jax.dtypes.float0)
    return q, Marginals(dmean, dvariance, dalpha, dlog_z, dstatus)


marginals.defjvp(_rule, symbolic_zeros=True)
