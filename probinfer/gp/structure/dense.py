"""The N x N matrices of a Gaussian process times Gaussian sites, which every approximation is built from.

With K the prior covariance and Λ = diag(λ2) the site precisions: the posterior covariance Σ = (K⁻¹ + Λ)⁻¹, the
reduction R = (K + Λ⁻¹)⁻¹ = Λ − ΛΣΛ, and the shrinkage M = I − ΣΛ = ΣK⁻¹. All three come from one inverse of
B = I + SKS, S = Λ^½, whose eigenvalues are at least one: Σ = S⁻¹(I − B⁻¹)S⁻¹, R = SB⁻¹S, M = S⁻¹B⁻¹S. Sites with a
negative precision, which some likelihoods need, are added in a second step, C = I − NΣ₊N with N = (−Λ₋)^½.

The derivative rules, dΣ = M dK Mᵀ − Σ dΛ Σ, dR = −R dK R + Mᵀ dΛ M, dM = −M dK R − Σ dΛ M, are written with
the matrices themselves, so derivatives of any order exist.

References:
    Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, section 3.4.3.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from probinfer.core.status import Status
from probinfer.core.types import Array, Float, Int
from probinfer.numerics.linalg import add_to_diagonal, inverse_from_cholesky, log_det_from_cholesky

__all__ = ["PosteriorMatrices", "negative_factor", "positive_factor", "posterior_matrices"]


class PosteriorMatrices(NamedTuple):
    """The matrices that depend on K and the site precisions, and not on the site means."""

    covariance: Float[Array, "N N"]
    """Posterior covariance Σ = (K⁻¹ + Λ)⁻¹."""
    reduction: Float[Array, "N N"]
    """R = (K + Λ⁻¹)⁻¹: the data reduce the prior covariance by K R K."""
    shrinkage: Float[Array, "N N"]
    """M = I - ΣΛ = ΣK⁻¹, the weight of the prior mean in the posterior mean."""
    log_det: Float[Array, ""]
    """log |I + KΛ|."""
    status: Int[Array, ""]
    """``Status``: ``NOT_POSITIVE_DEFINITE`` if K⁻¹ + Λ is not positive definite, ``NON_FINITE`` if K is not finite."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def posterior_matrices(K: Float[Array, "N N"], lam2: Float[Array, " N"], signed: bool) -> PosteriorMatrices:
    """Condition a Gaussian process on sites of precision ``lam2``.

    Args:
        K: prior covariance.
        lam2: site precisions.
        signed: whether precisions may be negative; if False, a negative precision is a failure.

    Returns:
        The matrices; NaN if the status is bad.
    """
    matrices = _positive(K, jnp.maximum(lam2, 0) if signed else lam2)
    if signed:
        matrices = jax.lax.cond(
            jnp.any(lam2 < 0), _add_negative, lambda matrices, lam2: matrices, matrices, lam2
        )
    return matrices


def _posterior_matrices_jvp(signed, primals, tangents):
    K, lam2 = primals
    dK, dlam2 = tangents
    matrices = posterior_matrices(K, lam2, signed)
    sigma, reduction, shrinkage = matrices.covariance, matrices.reduction, matrices.shrinkage
    dsigma, dreduction, dshrinkage = (jnp.zeros_like(K) for _ in range(3))
    dlog_det = jnp.zeros_like(matrices.log_det)
    if not isinstance(dK, SymbolicZero):
        shrinkage_dK = shrinkage @ dK
        dsigma += shrinkage_dK @ shrinkage.T
        dshrinkage -= shrinkage_dK @ reduction
        dreduction -= reduction @ dK @ reduction
        dlog_det += jnp.sum(reduction * dK)
    if not isinstance(dlam2, SymbolicZero):
        sigma_dlam2 = sigma * dlam2
        dsigma -= sigma_dlam2 @ sigma
        dshrinkage -= sigma_dlam2 @ shrinkage
        dreduction += (shrinkage.T * dlam2) @ shrinkage
        dlog_det += jnp.dot(jnp.diagonal(sigma), dlam2)
    dstatus: Any = np.zeros(matrices.status.shape, jax.dtypes.float0)
    tangent = PosteriorMatrices(
        covariance=dsigma, reduction=dreduction, shrinkage=dshrinkage, log_det=dlog_det, status=dstatus
    )
    return matrices, tangent


posterior_matrices.defjvp(_posterior_matrices_jvp, symbolic_zeros=True)


def _positive(K: Array, lam2: Array) -> PosteriorMatrices:
    s, chol = positive_factor(K, lam2)
    # M = S⁻¹B⁻¹S and R = SB⁻¹S: products of positive numbers, nothing cancels.
    inverse = inverse_from_cholesky(chol)
    ratio = s[None, :] / s[:, None]
    shrinkage = inverse * ratio
    # Σ = S⁻¹(I − B⁻¹)S⁻¹ has no cancellation off the diagonal. On it, 1 − (B⁻¹)ᵢᵢ cancels for weak sites, so the
    # diagonal of Σ = MK is solved for Σᵢᵢ there.
    strong_variance = (1 - jnp.diagonal(inverse)) / (s * s)
    off_diagonal = jnp.sum(add_to_diagonal(shrinkage, -jnp.diagonal(shrinkage)) * K, 1)
    kii = jnp.diagonal(K)
    weak_variance = (kii + off_diagonal) / (1 + s * s * kii)
    variance = jnp.where(s * s * kii > 1, strong_variance, weak_variance)
    sigma = -inverse / (s[:, None] * s[None, :])
    sigma = jnp.where(jnp.eye(len(s), dtype=bool), variance, sigma)
    finite = jnp.all(jnp.isfinite(jnp.diagonal(chol)))
    bad = jnp.where(jnp.all(jnp.isfinite(K)), int(Status.NOT_POSITIVE_DEFINITE), int(Status.NON_FINITE))
    status = jnp.where(finite, int(Status.OK), bad).astype(jnp.int32)
    return PosteriorMatrices(
        covariance=sigma,
        reduction=inverse * (s[:, None] * s[None, :]),
        shrinkage=shrinkage,
        log_det=log_det_from_cholesky(chol),
        status=status,
    )


def positive_factor(K: Float[Array, "N N"], lam2: Float[Array, " N"]) -> tuple[Array, Array]:
    """S (N,), bounded away from 0, and the lower Cholesky factor (N, N) of I + SKS; NaN if a precision is negative."""
    # S is divided by: the fourth root of the smallest number keeps 1/S² finite, and S² is far below any rounding.
    smallest = float(jnp.finfo(K.dtype).tiny) ** 0.25
    s = jnp.where(lam2 < 0, jnp.nan, jnp.maximum(jnp.sqrt(jnp.abs(lam2)), smallest))
    B = add_to_diagonal(s[:, None] * K * s[None, :], jnp.ones_like(s))
    return s, jax.lax.linalg.cholesky(B, symmetrize_input=False)


def negative_factor(K: Float[Array, "N N"], lam2: Float[Array, " N"]) -> tuple[Array, Array]:
    """N (N,) and the lower Cholesky factor (N, N) of C = I − NΣ₊N, where Σ₊ has the positive sites only."""
    return _negative(_positive(K, jnp.maximum(lam2, 0)).covariance, lam2)


def _negative(sigma: Array, lam2: Array) -> tuple[Array, Array]:
    n = jnp.sqrt(jnp.maximum(-lam2, 0))
    C = add_to_diagonal(-(n[:, None] * sigma * n[None, :]), jnp.ones_like(n))
    return n, jax.lax.linalg.cholesky(C, symmetrize_input=False)


def _add_negative(matrices: PosteriorMatrices, lam2: Array) -> PosteriorMatrices:
    """Add the sites of negative precision: Σ = Σ₊ + Σ₊N C⁻¹ NΣ₊, C = I − NΣ₊N."""
    n, chol = _negative(matrices.covariance, lam2)
    half = jax.scipy.linalg.solve_triangular(chol, n[:, None] * matrices.covariance, lower=True)
    sigma = matrices.covariance + half.T @ half
    shrinkage = add_to_diagonal(-(sigma * lam2[None, :]), jnp.ones_like(n))
    reduction = add_to_diagonal(-(lam2[:, None] * sigma * lam2[None, :]), lam2)
    exists = jnp.all(jnp.isfinite(jnp.diagonal(chol)))
    status = jnp.where(exists, matrices.status, int(Status.NOT_POSITIVE_DEFINITE)).astype(jnp.int32)
    return PosteriorMatrices(
        covariance=sigma,
        reduction=reduction,
        shrinkage=shrinkage,
        log_det=matrices.log_det + log_det_from_cholesky(chol),
        status=status,
    )
