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
from probinfer.core.types import Array, Float
from probinfer.kernels.base import Kernel
from probinfer.numerics.linalg import (
    SpdInverse,
    add_to_diagonal,
    climb,
    relative_jitter,
    spd_inverse_from_cholesky,
    spd_inverse_tangent,
    triangular_solve,
)

__all__ = ["Evidence", "gaussian_evidence", "inner"]


class Evidence(NamedTuple):
    """What conditioning on Gaussian observations leaves behind, ``A = K(X, X) + diag(noise_variance) + jitter I``."""

    log_evidence: Array
    """Scalar ``log N(residual; 0, A)``; NaN when the status is bad."""
    chol: Array
    """(N, N) lower Cholesky factor of A."""
    alpha: Array
    """(N,) ``A⁻¹ residual``: the posterior mean at z is ``K(z, X) alpha``."""
    jitter: Array
    """Scalar that was added to the diagonal, 0 for a matrix that needed none."""
    status: Array
    """``Status`` as an integer."""


@jax.custom_jvp
def gaussian_evidence(
    kernel: Kernel,
    X: Float[Array, "N D"],
    residual: Float[Array, " N"],
    noise_variance: Float[Array, " N"],
) -> Evidence:
    """``log N(residual; 0, K(X, X) + diag(noise_variance))`` and the factor behind it.

    The value costs one Cholesky factorisation; its gradient with respect to everything (hyperparameters, X, residual,
    noise) one inverse more. The factor and alpha may be differentiated too, and cost nothing when they are not.

    Args:
        kernel: covariance of the latent function.
        X: inputs.
        residual: observations minus the prior mean.
        noise_variance: variance of the noise of each observation, in squared units of the residual.

    Returns:
        The evidence; nothing raises, a failure shows in ``status`` and as NaN in the value and its derivatives.

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, equations 2.30 and 5.9.
    """
    mean_variance = _mean_variance(kernel, X, noise_variance)
    chol, jitter, status = climb(_covariance, mean_variance, kernel, X, noise_variance)
    half_solved = triangular_solve(chol, residual)
    alpha = triangular_solve(chol, half_solved, transpose=True)
    return _evidence(chol, jnp.sum(half_solved**2), alpha, jitter, status)


@gaussian_evidence.defjvp
def _gaussian_evidence_jvp(primals, tangents):
    kernel, X, residual, noise_variance = primals
    dkernel, dX, dresidual, dnoise = tangents
    # The tangents of the factor, alpha and the jitter; where nobody asks for them they are never computed.
    known, dknown = jax.jvp(_solve, primals, tangents)
    alpha = known.solution
    value = _evidence(known.chol, jnp.dot(residual, alpha), alpha, known.jitter, known.status)

    G = _evidence_weights(known, _mean_variance(kernel, X, noise_variance))
    through_kernel, through_X = kernel.contract(X, G)
    dlog_evidence = (
        inner(through_kernel, dkernel, residual.dtype)
        + jnp.sum(through_X * dX)
        - jnp.dot(alpha, dresidual)
        + jnp.dot(jnp.diagonal(G), dnoise)
    )
    return value, Evidence(dlog_evidence, dknown.chol, dknown.solution, dknown.jitter, dknown.status)


@jax.custom_jvp
def _solve(kernel: Kernel, X: Array, residual: Array, noise_variance: Array) -> SpdInverse:
    """``spd_inverse`` of the covariance, which is built where it is needed and not kept."""
    mean_variance = _mean_variance(kernel, X, noise_variance)
    chol, jitter, status = climb(_covariance, mean_variance, kernel, X, noise_variance)
    return spd_inverse_from_cholesky(chol, jitter, status, residual)


@_solve.defjvp
def _solve_jvp(primals, tangents):
    kernel, X, _, noise_variance = primals
    dkernel, dX, dresidual, dnoise = tangents
    known = _solve(*primals)
    _, dK = jax.jvp(_covariance, (kernel, X, noise_variance), (dkernel, dX, dnoise))
    return known, spd_inverse_tangent(known, _mean_variance(kernel, X, noise_variance), dK, dresidual)


def _mean_variance(kernel: Kernel, X: Array, noise_variance: Array) -> Array:
    """The mean diagonal of the covariance, in O(N)."""
    return jnp.mean(kernel.diag(X) + noise_variance)


def _covariance(kernel: Kernel, X: Array, noise_variance: Array) -> Array:
    return add_to_diagonal(kernel.gram(X), noise_variance)


def _evidence(chol: Array, quad: Array, alpha: Array, jitter: Array, status: Array) -> Evidence:
    size = chol.shape[0]
    half_log_det = jnp.sum(jnp.log(jnp.diagonal(chol)))
    log_evidence = -0.5 * quad - half_log_det - 0.5 * size * math.log(2.0 * math.pi)
    overflow = jnp.where(jnp.isfinite(log_evidence), int(Status.OK), int(Status.NON_FINITE))
    bad = (status != Status.OK) | (overflow != Status.OK)
    status = jnp.where(status == Status.OK, overflow, status).astype(jnp.int32)
    return Evidence(jnp.where(bad, jnp.nan, log_evidence), chol, alpha, jitter, status)


def _evidence_weights(known: SpdInverse, mean_variance: Array) -> Array:
    """``G = ½ (α αᵀ − A⁻¹)``, plus ``c tr(G) / N`` on the diagonal for a jitter of ``c · mean(diag A)``."""
    alpha = known.solution
    G = 0.5 * (alpha[:, None] * alpha[None, :] - known.inverse)
    trace = 0.5 * (jnp.dot(alpha, alpha) - jnp.sum(jnp.diagonal(known.inverse)))
    return add_to_diagonal(G, relative_jitter(known.jitter, mean_variance) * trace / G.shape[0])


def inner(gradient: Any, tangent: Any, dtype: Any) -> Array:
    """``Σ gradient · tangent`` over the floating-point leaves; integer leaves have no derivative."""
    total = jnp.zeros((), dtype)
    for g, t in zip(jax.tree.leaves(gradient), jax.tree.leaves(tangent), strict=True):
        if t.dtype != jax.dtypes.float0:
            total = total + jnp.sum(g * t).astype(dtype)
    return total
