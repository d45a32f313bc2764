"""The log evidence of an exact Gaussian process, with a gradient that costs about one inverse.

``log N(r; 0, A)`` with ``A = K(X, X) + diag(noise) + jitter I``. Its differential is ``⟨G, dA⟩ − αᵀ dr`` with
``α = A⁻¹ r`` and ``G = ½ (α αᵀ − A⁻¹)``: one symmetric matrix, contracted by the kernel with its own derivatives. The
cost does not depend on the number of hyperparameters, forward or reverse, and every piece of the rule is itself
differentiable.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.status import Status
from probinfer.core.types import Array, Float, Int
from probinfer.kernels.base import Kernel
from probinfer.numerics.linalg import (
    SpdInverse,
    add_to_diagonal,
    cholesky_with_jitter,
    relative_jitter,
    spd_inverse_from_cholesky,
    spd_inverse_tangent,
    triangular_solve,
)

__all__ = ["GaussianEvidence", "gaussian_evidence", "inner"]


class GaussianEvidence(NamedTuple):
    """The evidence of Gaussian observations and its factors, ``A = K(X, X) + diag(noise_variance) + jitter I``."""

    log_evidence: Float[Array, ""]
    """``log N(residual; 0, A)``; NaN if the status is bad."""
    chol: Float[Array, "N N"]
    """Lower Cholesky factor of A."""
    alpha: Float[Array, " N"]
    """``A⁻¹ residual``: the posterior mean at z is ``K(z, X) alpha``."""
    jitter: Float[Array, ""]
    """Added to the diagonal; 0 if nothing was needed."""
    status: Int[Array, ""]
    """``Status`` as an integer."""


@jax.custom_jvp
def gaussian_evidence(
    kernel: Kernel,
    X: Float[Array, "N D"],
    residual: Float[Array, " N"],
    noise_variance: Float[Array, " N"],
) -> GaussianEvidence:
    """``log N(residual; 0, K(X, X) + diag(noise_variance))`` and the factor behind it.

    The value costs one Cholesky factorization, and its gradient with respect to everything (hyperparameters, X,
    residual, noise) one more inverse. The factor and alpha can be differentiated too; tangents that are not used cost
    nothing.

    Args:
        kernel: covariance of the latent function.
        X: inputs.
        residual: observations minus the prior mean.
        noise_variance: variance of the noise of each observation, in squared units of the residual.

    Returns:
        The evidence. Nothing raises: a failure shows in ``status``, and as NaN in the value and its derivatives.

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, equations 2.30 and 5.9.
    """
    mean_variance = _mean_variance(kernel, X, noise_variance)
    chol, jitter, status = cholesky_with_jitter(_covariance, mean_variance, kernel, X, noise_variance)
    half_solved = triangular_solve(chol, residual)
    alpha = triangular_solve(chol, half_solved, transpose=True)
    return _evidence(chol, jnp.sum(half_solved**2), alpha, jitter, status)


@gaussian_evidence.defjvp
def _gaussian_evidence_jvp(primals, tangents):
    kernel, X, residual, noise_variance = primals
    dkernel, dX, dresidual, dnoise = tangents
    # The tangents of the factor, alpha and the jitter: compiled away if they are not used.
    factored, dfactored = jax.jvp(_solve, primals, tangents)
    alpha = factored.solution
    value = _evidence(factored.chol, jnp.dot(residual, alpha), alpha, factored.jitter, factored.status)

    # R&W eq. 5.9 for all hyperparameters at once: ⟨G, dA⟩ = ½ tr((α αᵀ − A⁻¹) dA)
    G = _evidence_weights(factored, _mean_variance(kernel, X, noise_variance))
    kernel_gradient, X_gradient = kernel.contract(X, G)
    dlog_evidence = (
        inner(kernel_gradient, dkernel, residual.dtype)
        + jnp.sum(X_gradient * dX)
        - jnp.dot(alpha, dresidual)
        + jnp.dot(jnp.diagonal(G), dnoise)
    )
    tangent = GaussianEvidence(
        log_evidence=dlog_evidence,
        chol=dfactored.chol,
        alpha=dfactored.solution,
        jitter=dfactored.jitter,
        status=dfactored.status,
    )
    return value, tangent


@jax.custom_jvp
def _solve(kernel: Kernel, X: Array, residual: Array, noise_variance: Array) -> SpdInverse:
    """``spd_inverse`` of the covariance, which is built again for its derivative instead of being stored."""
    mean_variance = _mean_variance(kernel, X, noise_variance)
    chol, jitter, status = cholesky_with_jitter(_covariance, mean_variance, kernel, X, noise_variance)
    return spd_inverse_from_cholesky(chol, jitter, status, residual)


@_solve.defjvp
def _solve_jvp(primals, tangents):
    kernel, X, _, noise_variance = primals
    dkernel, dX, dresidual, dnoise = tangents
    factored = _solve(*primals)
    _, dK = jax.jvp(_covariance, (kernel, X, noise_variance), (dkernel, dX, dnoise))
    return factored, spd_inverse_tangent(factored, _mean_variance(kernel, X, noise_variance), dK, dresidual)


def _mean_variance(kernel: Kernel, X: Array, noise_variance: Array) -> Array:
    """The mean diagonal of the covariance, in O(N)."""
    return jnp.mean(kernel.diag(X) + noise_variance)


def _covariance(kernel: Kernel, X: Array, noise_variance: Array) -> Array:
    return add_to_diagonal(kernel.gram(X), noise_variance)


def _evidence(chol: Array, quad: Array, alpha: Array, jitter: Array, status: Array) -> GaussianEvidence:
    size = chol.shape[0]
    half_log_det = jnp.sum(jnp.log(jnp.diagonal(chol)))
    log_evidence = -0.5 * quad - half_log_det - 0.5 * size * math.log(2.0 * math.pi)
    overflow = jnp.where(jnp.isfinite(log_evidence), int(Status.OK), int(Status.NON_FINITE))
    bad = (status != Status.OK) | (overflow != Status.OK)
    status = jnp.where(status == Status.OK, overflow, status).astype(jnp.int32)
    return GaussianEvidence(
        log_evidence=jnp.where(bad, jnp.nan, log_evidence),
        chol=chol,
        alpha=alpha,
        jitter=jitter,
        status=status,
    )


def _evidence_weights(factored: SpdInverse, mean_variance: Array) -> Array:
    """``G = ½ (α αᵀ − A⁻¹)``, plus ``c tr(G) / N`` on the diagonal for a jitter of ``c · mean(diag A)``."""
    alpha = factored.solution
    G = 0.5 * (alpha[:, None] * alpha[None, :] - factored.inverse)
    trace = 0.5 * (jnp.dot(alpha, alpha) - jnp.sum(jnp.diagonal(factored.inverse)))
    return add_to_diagonal(G, relative_jitter(factored.jitter, mean_variance) * trace / G.shape[0])


def inner(gradient: Any, tangent: Any, dtype: Any) -> Array:
    """``Σ gradient · tangent`` over the floating-point leaves; integer leaves have no derivative."""
    total = jnp.zeros((), dtype)
    for g, t in zip(jax.tree.leaves(gradient), jax.tree.leaves(tangent), strict=True):
        if t.dtype != jax.dtypes.float0:
            total = total + jnp.sum(g * t).astype(dtype)
    return total
