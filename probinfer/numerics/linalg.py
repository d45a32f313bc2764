"""Symmetric positive-definite matrices: Cholesky factors with a status, a fast inverse, derivatives of every order.

A covariance matrix is factorized as it is. Only if that fails, a jitter is added to its diagonal: a multiple of the
mean diagonal that grows by powers of ten (the jitter ladder). The multiple is a constant and the mean diagonal is not,
so every derivative here is the derivative of the matrix *with* its jitter. The derivative rules call functions that
have a rule themselves, so derivatives of any order exist, forward and reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from probinfer.core.status import Status
from probinfer.core.types import Array, Float, Int, Scalar

__all__ = [
    "LogdetQuad",
    "SpdInverse",
    "add_to_diagonal",
    "cholesky_solve",
    "cholesky_with_jitter",
    "inverse_from_cholesky",
    "log_det_from_cholesky",
    "logdet_quad",
    "relative_jitter",
    "safe_cholesky",
    "spd_inverse",
    "spd_inverse_from_cholesky",
    "spd_inverse_tangent",
    "triangular_solve",
]

# First and last multiple of the mean diagonal that is tried, by dtype.
_LADDER = {jnp.dtype("float64"): (-12, -6), jnp.dtype("float32"): (-6, -3)}


class SpdInverse(NamedTuple):
    """The inverse of ``A = K + jitter I`` and the solution of ``A x = y``."""

    chol: Array
    """(N, N) lower Cholesky factor L, ``L Lᵀ = A``."""
    inverse: Array
    """(N, N) the inverse of A, both triangles filled."""
    solution: Array
    """(N,) ``A⁻¹ y``."""
    log_det: Array
    """Scalar ``log det A``."""
    jitter: Array
    """Scalar added to the diagonal, 0 for a matrix that needed none."""
    status: Array
    """``Status`` as an integer."""


class LogdetQuad(NamedTuple):
    """The two terms of a Gaussian log density with covariance ``A = K + jitter I``."""

    log_det: Array
    """Scalar ``log det A``."""
    quad: Array
    """Scalar ``yᵀ A⁻¹ y``."""
    jitter: Array
    """Scalar added to the diagonal."""
    status: Array
    """``Status`` as an integer."""


def triangular_solve(
    L: Float[Array, "N N"], b: Float[Array, "N *M"], *, transpose: bool = False
) -> Float[Array, "N *M"]:
    """Solve ``L x = b``, or ``Lᵀ x = b`` with ``transpose=True``.

    Args:
        L: lower triangular; what is above the diagonal is not read.
        b: a vector or the columns of a matrix.
        transpose: solve with the transpose.

    Returns:
        x, shaped like ``b``.
    """
    columns = b[:, None] if b.ndim == 1 else b
    x = lax.linalg.triangular_solve(L, columns, left_side=True, lower=True, transpose_a=transpose)
    return x.reshape(b.shape)


def cholesky_solve(L: Float[Array, "N N"], b: Float[Array, "N *M"]) -> Float[Array, "N *M"]:
    """Solve ``L Lᵀ x = b`` for a vector or the columns of a matrix."""
    return triangular_solve(L, triangular_solve(L, b), transpose=True)


def log_det_from_cholesky(L: Float[Array, "N N"]) -> Scalar:
    """``log det L Lᵀ = 2 Σ log L_ii``."""
    return 2.0 * jnp.sum(jnp.log(jnp.diagonal(L)))


def add_to_diagonal(K: Float[Array, "N N"], value: Float[Array, "*N"]) -> Float[Array, "N N"]:
    """``K + diag(value)`` for a scalar or a vector, in one pass that fuses with its neighbors."""
    row = lax.broadcasted_iota(jnp.int32, K.shape, 0)
    column = lax.broadcasted_iota(jnp.int32, K.shape, 1)
    return jnp.where(row == column, K + value, K)


@jax.custom_jvp
def safe_cholesky(K: Float[Array, "N N"]) -> tuple[Float[Array, "N N"], Scalar, Int[Array, ""]]:
    """``L Lᵀ = K + jitter I`` with the smallest jitter of a ladder that works.

    Zero is tried first and costs one factorization. The next rungs are ``c · mean(diag K)`` with c = 1e-12 ... 1e-6
    (float64) or 1e-6 ... 1e-3 (float32). No error is raised; see ``status``.

    Args:
        K: symmetric, positive definite up to rounding; only the upper triangle is read.

    Returns:
        The lower factor, the jitter and the status: ``OK``, ``NOT_POSITIVE_DEFINITE`` (the last rung failed too) or
        ``NON_FINITE`` (K holds NaN or infinities); unless it is ``OK`` the factor is NaN. The factor and the jitter may
        be differentiated any number of times.
    """
    return cholesky_with_jitter(_identity, _mean_diagonal(K), K)


@safe_cholesky.defjvp
def _safe_cholesky_jvp(primals, tangents):
    (K,), (dK,) = primals, tangents
    L, jitter, status = safe_cholesky(K)
    dK, djitter = _jittered_tangent(dK, jitter, _mean_diagonal(K))
    return (L, jitter, status), (_cholesky_tangent(L, dK), djitter, _no_tangent(status))


def inverse_from_cholesky(L: Float[Array, "N N"]) -> Float[Array, "N N"]:
    """``(L Lᵀ)⁻¹`` from the lower factor, exactly symmetric.

    On a CPU by backward bordering, whose ``2 N³ / 3`` operations are matrix products of large blocks; elsewhere from
    a triangular solve and one product.

    Args:
        L: lower triangular factor; what is above the diagonal is not read.

    Returns:
        The inverse, both triangles filled; NaN where the factor is NaN.
    """
    return _inverse(L)


@jax.custom_jvp
def _inverse(L: Array) -> Array:
    return lax.platform_dependent(L, cpu=_inverse_by_bordering, default=_inverse_by_solve)


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
    (L,), (dL,) = primals, tangents
    inverse = _inverse(L)
    half = inverse @ (jnp.tril(dL) @ (jnp.tril(L).T @ inverse))
    return inverse, -(half + half.T)


@jax.custom_jvp
def spd_inverse(K: Float[Array, "N N"], y: Float[Array, " N"]) -> SpdInverse:
    """``A⁻¹``, ``A⁻¹ y`` and ``log det A`` for ``A = K + jitter I``, with the jitter of ``safe_cholesky``.

    The derivatives, with ``dA = dK + jitter · mean(diag dK) / mean(diag K) I``, are
    ``d A⁻¹ = −A⁻¹ dA A⁻¹``, ``d A⁻¹y = A⁻¹(dy − dA A⁻¹y)``, ``d log det A = Σ A⁻¹ ∘ dA``.

    Args:
        K: symmetric; only the upper triangle is read.
        y: right-hand side.

    Returns:
        The factor, inverse, solution, log determinant, jitter and status; NaN where the factorization failed.
    """
    return spd_inverse_from_cholesky(*safe_cholesky(K), y)


@spd_inverse.defjvp
def _spd_inverse_jvp(primals, tangents):
    (K, y), (dK, dy) = primals, tangents
    solved = spd_inverse(K, y)
    return solved, spd_inverse_tangent(solved, _mean_diagonal(K), dK, dy)


def spd_inverse_from_cholesky(
    L: Float[Array, "N N"], jitter: Scalar, status: Int[Array, ""], y: Float[Array, " N"]
) -> SpdInverse:
    """Return the result of ``spd_inverse``, given the results of ``safe_cholesky``."""
    inverse = inverse_from_cholesky(L)
    return SpdInverse(L, inverse, cholesky_solve(L, y), log_det_from_cholesky(L), jitter, status)


def spd_inverse_tangent(solved: SpdInverse, mean_diagonal: Scalar, dK: Array, dy: Array) -> SpdInverse:
    """Return the tangent of ``spd_inverse``, for the derivative rules of functions that build K themselves."""
    dA, djitter = _jittered_tangent(dK, solved.jitter, mean_diagonal)
    return SpdInverse(
        chol=_cholesky_tangent(solved.chol, dA),
        inverse=-(solved.inverse @ dA @ solved.inverse),
        solution=solved.inverse @ (dy - dA @ solved.solution),
        log_det=jnp.sum(solved.inverse * dA),
        jitter=djitter,
        status=_no_tangent(solved.status),
    )


@jax.custom_jvp
def logdet_quad(K: Float[Array, "N N"], y: Float[Array, " N"]) -> LogdetQuad:
    """``log det A`` and ``yᵀ A⁻¹ y`` for ``A = K + jitter I``.

    The value costs a factorization and one triangular solve, the first derivative one inverse, whatever the number of
    parameters that K depends on. With ``α = A⁻¹ y``: ``d log det A = Σ A⁻¹ ∘ dA``, ``d quad = 2 αᵀ dy − αᵀ dA α``.

    Args:
        K: symmetric; only the upper triangle is read.
        y: the vector.

    Returns:
        The two terms, the jitter and the status; NaN where the factorization failed.
    """
    L, jitter, status = safe_cholesky(K)
    return LogdetQuad(log_det_from_cholesky(L), jnp.sum(triangular_solve(L, y) ** 2), jitter, status)


@logdet_quad.defjvp
def _logdet_quad_jvp(primals, tangents):
    (K, y), (dK, dy) = primals, tangents
    solved = spd_inverse(K, y)
    dA, djitter = _jittered_tangent(dK, solved.jitter, _mean_diagonal(K))
    alpha = solved.solution
    value = LogdetQuad(solved.log_det, jnp.dot(y, alpha), solved.jitter, solved.status)
    dquad = 2.0 * jnp.dot(alpha, dy) - jnp.dot(alpha, dA @ alpha)
    return value, LogdetQuad(jnp.sum(solved.inverse * dA), dquad, djitter, _no_tangent(solved.status))


def cholesky_with_jitter(
    build: Callable[..., Array], mean_diagonal: Scalar, *operands: Any
) -> tuple[Array, Array, Array]:
    """Factorize ``build(*operands)``; the jitter ladder of ``safe_cholesky`` without its rule for derivatives.

    Each rung builds the matrix again, so that no copy is kept for the ladder and LAPACK works in place: fresh memory
    from the system costs more than the arithmetic.

    Args:
        build: ``build(*operands) -> (N, N)``, symmetric; it must not bind traced arrays itself.
        mean_diagonal: the mean diagonal of that matrix.
        *operands: pytrees of arrays.

    Returns:
        The lower factor, the jitter, the status.
    """
    first, last = _LADDER[jnp.dtype(mean_diagonal.dtype)]
    jitters = jnp.asarray(10.0 ** np.arange(first, last + 1), mean_diagonal.dtype) * mean_diagonal

    def failed(carry):
        rung, _, status = carry
        return (status == Status.NOT_POSITIVE_DEFINITE) & (rung < len(jitters))

    def next_rung(carry):
        rung, _, _ = carry
        # The barrier ties the matrix to the rung; otherwise it would be built before the loop, needed or not.
        jitter, inside = lax.optimization_barrier((jitters[rung], operands))
        U = _upper_factor(add_to_diagonal(build(*inside), jitter))
        status = _factor_status(U)
        return rung + 1, jnp.where(status == Status.OK, U, jnp.nan), status

    U = _upper_factor(build(*operands))
    rung, U, status = lax.while_loop(failed, next_rung, (jnp.int32(0), U, _factor_status(U)))
    status = lax.cond(
        status == Status.OK,
        lambda *_: status,
        lambda *inside: jnp.where(
            jnp.all(jnp.isfinite(build(*inside))), status, jnp.int32(Status.NON_FINITE)
        ),
        *operands,
    )
    return U.T, jnp.where(rung == 0, 0.0, jitters[jnp.maximum(rung - 1, 0)]), status


def _upper_factor(K: Array) -> Array:
    """Return ``Lᵀ`` of a symmetric matrix; the transposes match LAPACK's column order, so nothing is copied."""
    return lax.linalg.cholesky(K.T, symmetrize_input=False).T


def _factor_status(factor: Array) -> Array:
    finite = jnp.all(jnp.isfinite(jnp.diagonal(factor)))
    return jnp.where(finite, jnp.int32(Status.OK), jnp.int32(Status.NOT_POSITIVE_DEFINITE))


def _identity(K: Array) -> Array:
    return K


def _mean_diagonal(K: Array) -> Array:
    return jnp.mean(jnp.diagonal(K))


def _no_tangent(status: Array) -> Any:
    """Integers have no derivative: JAX's tangent type of an integer."""
    return np.zeros(status.shape, jax.dtypes.float0)


def _jittered_tangent(dK: Array, jitter: Array, mean_diagonal: Array) -> tuple[Array, Array]:
    """Return ``dA`` and ``djitter`` for ``A = K + c mean(diag K) I``."""
    dK = 0.5 * (dK + dK.T)
    djitter = relative_jitter(jitter, mean_diagonal) * _mean_diagonal(dK)
    return add_to_diagonal(dK, djitter), djitter


def relative_jitter(jitter: Scalar, mean_diagonal: Scalar) -> Scalar:
    """Return the multiple of the mean diagonal in a jitter: a constant of the ladder, so it has no derivative."""
    return jnp.where(jitter == 0, 0.0, lax.stop_gradient(jitter / mean_diagonal))


def _cholesky_tangent(L: Array, dA: Array) -> Array:
    """``dL = L Φ(L⁻¹ dA L⁻ᵀ)``, Φ = lower triangle with half the diagonal (Murray 2016, equation 8)."""
    inner = triangular_solve(L, triangular_solve(L, dA).T)
    half_diagonal = jnp.tril(inner) - 0.5 * jnp.diag(jnp.diagonal(inner))
    return L @ half_diagonal


def _inverse_by_solve(L: Array) -> Array:
    W = triangular_solve(L, jnp.eye(L.shape[0], dtype=L.dtype))
    product = W.T @ W
    return 0.5 * (product + product.T)  # a product's blocks round its two triangles differently


def _inverse_by_bordering(L: Array) -> Array:
    """Fill the inverse from its last block to its first, in terms of the upper factor ``U = Lᵀ`` (rows in memory).

    With ``E = U_JJ⁻¹``, ``P = E U_JR`` and R all rows after block J: ``Z_JR = −P Z_RR``, ``Z_JJ = E Eᵀ − P Z_JRᵀ``.
    """
    U = L.T
    n = U.shape[0]
    block = max(48, -(-n // 4))  # more blocks save few operations and cost compilation
    Z = jnp.zeros_like(U)
    for start in reversed(range(0, n, block)):
        end = min(start + block, n)
        E = _inverse_of_upper(U[start:end, start:end])
        corner = E @ E.T
        if end < n:
            P = E @ U[start:end, end:]
            beside = -(P @ Z[end:, end:])
            corner = corner - P @ beside.T
            Z = Z.at[start:end, end:].set(beside).at[end:, start:end].set(beside.T)
        Z = Z.at[start:end, start:end].set(0.5 * (corner + corner.T))
    return Z


def _inverse_of_upper(U: Array) -> Array:
    return lax.linalg.triangular_solve(U, jnp.eye(U.shape[0], dtype=U.dtype), left_side=True, lower=False)
