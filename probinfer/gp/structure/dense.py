"""A Gaussian process times Gaussian sites: the n x n matrices that every approximation is made of.

With K the prior covariance and Λ = diag(λ2) the site precisions: the posterior covariance Σ = (K⁻¹ + Λ)⁻¹, the
reduction R = (K + Λ⁻¹)⁻¹ = Λ − ΛΣΛ, and the shrinkage M = I − ΣΛ = ΣK⁻¹. All three come from one inverse of
B = I + SKS, S = Λ^½, whose eigenvalues are at least one: Σ = S⁻¹(I − B⁻¹)S⁻¹, R = SB⁻¹S, M = S⁻¹B⁻¹S. Sites of
negative precision, which some likelihoods need, are taken in a second step, C = I − NΣ₊N with N = (−Λ₋)^½.

The rules for derivatives, dΣ = M dK Mᵀ − Σ dΛ Σ, dR = −R dK R + Mᵀ dΛ M, dM = −M dK R − Σ dΛ M, are written with
the matrices themselves, so derivatives of any order follow.

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
from probinfer.core.types import Array, Float
from probinfer.numerics.linalg import add_to_diagonal, inverse_from_cholesky, log_det_from_cholesky

__all__ = ["Precision", "negative_factor", "positive_factor", "precision"]


class Precision(NamedTuple):
    """What K and the site precisions decide, without the site means."""

    covariance: Array
    """Σ (N, N)."""
    reduction: Array
    """R (N, N)."""
    shrinkage: Array
    """M (N, N)."""
    log_det: Array
    """Scalar log |I + KΛ|."""
    status: Array
    """``Status``: ``NOT_POSITIVE_DEFINITE`` where K⁻¹ + Λ is not, ``NON_FINITE`` where K is not."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def precision(K: Float[Array, "N N"], lam2: Float[Array, " N"], signed: bool) -> Precision:
    """Condition a Gaussian process on sites of precision ``lam2``.

    Args:
        K: prior covariance.
        lam2: site precisions.
        signed: whether some may be negative; if not, negative ones are a failure.

    Returns:
        The matrices; NaN where the status is bad.
    """
    found = _positive(K, jnp.maximum(lam2, 0) if signed else lam2)
    if signed:
        found = jax.lax.cond(jnp.any(lam2 < 0), _lower, lambda found, lam2: found, found, lam2)
    return found


def _rule(signed, primals, tangents):
    K, lam2 = primals
    dK, dlam2 = tangents
    known = precision(K, lam2, signed)
    sigma, reduction, shrinkage = known.covariance, known.reduction, known.shrinkage
    dsigma, dreduction, dshrinkage = (jnp.zeros_like(K) for _ in range(3))
    dlog_det = jnp.zeros_like(known.log_det)
    if not isinstance(dK, SymbolicZero):
        through = shrinkage @ dK
        dsigma += through @ shrinkage.T
        dshrinkage -= through @ reduction
        dreduction -= reduction @ dK @ reduction
        dlog_det += jnp.sum(reduction * dK)
    if not isinstance(dlam2, SymbolicZero):
        scaled = sigma * dlam2
        dsigma -= scaled @ sigma
        dshrinkage -= scaled @ shrinkage
        dreduction += (shrinkage.T * dlam2) @ shrinkage
        dlog_det += jnp.dot(jnp.diagonal(sigma), dlam2)
    dstatus: Any = np.zeros(known.status.shape, jax.dtypes.float0)
    return known, Precision(dsigma, dreduction, dshrinkage, dlog_det, dstatus)


precision.defjvp(_rule, symbolic_zeros=True)


def _positive(K: Array, lam2: Array) -> Precision:
    s, chol = positive_factor(K, lam2)
    inverse = inverse_from_cholesky(chol)
    ratio = s[None, :] / s[:, None]
    shrinkage = inverse * ratio
    # Σ = S⁻¹(I − B⁻¹)S⁻¹ has no cancellation off the diagonal. On it there are two forms, one for strong sites and,
    # from Σ = MK, one for weak ones.
    strong = (1 - jnp.diagonal(inverse)) / (s * s)
    beside = jnp.sum(add_to_diagonal(shrinkage, -jnp.diagonal(shrinkage)) * K, 1)
    kii = jnp.diagonal(K)
    weak = (kii + beside) / (1 + s * s * kii)
    variance = jnp.where(s * s * kii > 1, strong, weak)
    sigma = -inverse / (s[:, None] * s[None, :])
    sigma = jnp.where(jnp.eye(len(s), dtype=bool), variance, sigma)
    finite = jnp.all(jnp.isfinite(jnp.diagonal(chol)))
    bad = jnp.where(jnp.all(jnp.isfinite(K)), int(Status.NOT_POSITIVE_DEFINITE), int(Status.NON_FINITE))
    status = jnp.where(finite, int(Status.OK), bad).astype(jnp.int32)
    return Precision(
        sigma, inverse * (s[:, None] * s[None, :]), shrinkage, log_det_from_cholesky(chol), status
    )


def positive_factor(K: Float[Array, "N N"], lam2: Float[Array, " N"]) -> tuple[Array, Array]:
    """S (N,), kept off zero, and the lower Cholesky factor (N, N) of I + SKS; NaN where a precision is negative."""
    smallest = float(jnp.finfo(K.dtype).tiny) ** 0.25
    s = jnp.where(lam2 < 0, jnp.nan, jnp.maximum(jnp.sqrt(jnp.abs(lam2)), smallest))
    B = add_to_diagonal(s[:, None] * K * s[None, :], jnp.ones_like(s))
    return s, jax.lax.linalg.cholesky(B, symmetrize_input=False)


def negative_factor(K: Float[Array, "N N"], lam2: Float[Array, " N"]) -> tuple[Array, Array]:
    """N (N,) and the lower Cholesky factor (N, N) of C = I − NΣ₊N, where Σ₊ knows the positive sites only."""
    return _negative(_positive(K, jnp.maximum(lam2, 0)).covariance, lam2)


def _negative(sigma: Array, lam2: Array) -> tuple[Array, Array]:
    n = jnp.sqrt(jnp.maximum(-lam2, 0))
    C = add_to_diagonal(-(n[:, None] * sigma * n[None, :]), jnp.ones_like(n))
    return n, jax.lax.linalg.cholesky(C, symmetrize_input=False)


def _lower(found: Precision, lam2: Array) -> Precision:
    """Take the negative sites too: Σ = Σ₊ + Σ₊N C⁻¹ NΣ₊, C = I − NΣ₊N."""
    n, chol = _negative(found.covariance, lam2)
    half = jax.scipy.linalg.solve_triangular(chol, n[:, None] * found.covariance, lower=True)
    sigma = found.covariance + half.T @ half
    shrinkage = add_to_diagonal(-(sigma * lam2[None, :]), jnp.ones_like(n))
    reduction = add_to_diagonal(-(lam2[:, None] * sigma * lam2[None, :]), lam2)
    exists = jnp.all(jnp.isfinite(jnp.diagonal(chol)))
    status = jnp.where(exists, found.status, int(Status.NOT_POSITIVE_DEFINITE)).astype(jnp.int32)
    return Precision(sigma, reduction, shrinkage, found.log_det + log_det_from_cholesky(chol), status)
