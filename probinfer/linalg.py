"""Symmetric positive-definite matrices: a Cholesky factor that reports, an inverse that is fast, rules of every order.

A covariance matrix is factorised as it is; only if that fails is its diagonal raised, by a multiple of its own mean
that grows by powers of ten (the jitter ladder). The multiple is a constant of the ladder and the mean is not, so every
derivative here is the derivative of the matrix *with* its jitter. Each rule calls functions that have a rule
themselves: derivatives of any order, forward or reverse, follow.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from probinfer.base import Status
from probinfer.types import Array, Float, Int, Scalar

__all__ = [
    "LogdetQuad",
    "SpdInverse",
    "cholesky_solve",
    "inverse_from_cholesky",
    "log_det_from_cholesky",
    "logdet_quad",
    "safe_cholesky",
    "spd_inverse",
    "triangular_solve",
]

# First and last multiple of the mean diagonal that is tried, by dtype.
_LADDER = {jnp.dtype("float64"): (-12, -6), jnp.dtype("float32"): (-6, -3)}


class SpdInverse(NamedTuple):
    """What ``spd_inverse`` knows of ``A = K + jitter I`` and a vector y."""

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


@jax.custom_jvp
def safe_cholesky(K: Float[Array, "N N"]) -> tuple[Float[Array, "N N"], Scalar, Int[Array, ""]]:
    """``L Lᵀ = K + jitter I`` with the smallest jitter of a ladder that works.

    Zero is tried first and costs one factorisation. The next rungs are ``c · mean(diag K)`` with c = 1e-12 ... 1e-6
    (float64) or 1e-6 ... 1e-3 (float32). Nothing raises: look at ``status``.

    Args:
        K: symmetric, positive definite up to rounding; only the lower triangle is read.

    Returns:
        The lower factor, the jitter, the status: ``OK``; ``NOT_POSITIVE_DEFINITE`` (even the last rung failed) or
        ``NON_FINITE`` (K holds NaN or infinities), both with a factor full of NaN. The factor and the jitter may be
        differentiated any number of times.
    """
    L, relative, status = _climb(K)
    return L, relative * _mean_diagonal(K), status


@safe_cholesky.defjvp
def _safe_cholesky_jvp(primals, tangents):
    (K,), (dK,) = primals, tangents
    L, jitter, status = safe_cholesky(K)
    dK, djitter = _jittered_tangent(K, dK, jitter)
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
        K: symmetric; only the lower triangle is read.
        y: right-hand side.

    Returns:
        The factor, inverse, solution, log determinant, jitter and status; NaN where the factorisation failed.
    """
    L, jitter, status = safe_cholesky(K)
    inverse = inverse_from_cholesky(L)
    return SpdInverse(L, inverse, cholesky_solve(L, y), log_det_from_cholesky(L), jitter, status)


@spd_inverse.defjvp
def _spd_inverse_jvp(primals, tangents):
    (K, y), (dK, dy) = primals, tangents
    out = spd_inverse(K, y)
    dA, djitter = _jittered_tangent(K, dK, out.jitter)
    return out, SpdInverse(
        chol=_cholesky_tangent(out.chol, dA),
        inverse=-(out.inverse @ dA @ out.inverse),
        solution=out.inverse @ (dy - dA @ out.solution),
        log_det=jnp.sum(out.inverse * dA),
        jitter=djitter,
        status=_no_tangent(out.status),
    )


@jax.custom_jvp
def logdet_quad(K: Float[Array, "N N"], y: Float[Array, " N"]) -> LogdetQuad:
    """``log det A`` and ``yᵀ A⁻¹ y`` for ``A = K + jitter I``.

    The value costs a factorisation and one triangular solve, the first derivative one inverse, however many
    parameters stand behind K. With ``α = A⁻¹ y``: ``d log det A = Σ A⁻¹ ∘ dA``, ``d quad = 2 αᵀ dy − αᵀ dA α``.

    Args:
        K: symmetric; only the lower triangle is read.
        y: the vector.

    Returns:
        The two terms, the jitter and the status; NaN where the factorisation failed.
    """
    L, jitter, status = safe_cholesky(K)
    return LogdetQuad(log_det_from_cholesky(L), jnp.sum(triangular_solve(L, y) ** 2), jitter, status)


@logdet_quad.defjvp
def _logdet_quad_jvp(primals, tangents):
    (K, y), (dK, dy) = primals, tangents
    known = spd_inverse(K, y)
    dA, djitter = _jittered_tangent(K, dK, known.jitter)
    alpha = known.solution
    value = LogdetQuad(known.log_det, jnp.dot(y, alpha), known.jitter, known.status)
    dquad = 2.0 * jnp.dot(alpha, dy) - jnp.dot(alpha, dA @ alpha)
    return value, LogdetQuad(jnp.sum(known.inverse * dA), dquad, djitter, _no_tangent(known.status))


def _climb(K: Array) -> tuple[Array, Array, Array]:
    """Return the factor, the multiple of the mean diagonal that was needed, and the status."""
    first, last = _LADDER[jnp.dtype(K.dtype)]
    scale = _mean_diagonal(K)
    eye = jnp.eye(K.shape[0], dtype=K.dtype)

    def failed(carry):
        rung, _, status = carry
        return (status == Status.NOT_POSITIVE_DEFINITE) & (first + rung <= last)

    def next_rung(carry):
        rung, _, _ = carry
        L = lax.linalg.cholesky(K + _multiple(rung) * scale * eye, symmetrize_input=False)
        status = jnp.where(jnp.all(jnp.isfinite(K)), _factor_status(L), int(Status.NON_FINITE))
        return rung + 1, L, status

    def _multiple(rung):
        return jnp.asarray(10.0 ** np.arange(first, last + 1), K.dtype)[rung]

    L = lax.linalg.cholesky(K, symmetrize_input=False)
    start = (jnp.zeros((), jnp.int32), L, _factor_status(L))
    rung, L, status = lax.while_loop(failed, next_rung, start)
    relative = jnp.where(rung == 0, 0.0, _multiple(jnp.maximum(rung - 1, 0)))
    return jnp.where(status == Status.OK, L, jnp.nan), relative.astype(K.dtype), status


def _factor_status(L: Array) -> Array:
    finite = jnp.all(jnp.isfinite(jnp.diagonal(L)))
    return jnp.where(finite, int(Status.OK), int(Status.NOT_POSITIVE_DEFINITE)).astype(jnp.int32)


def _mean_diagonal(K: Array) -> Array:
    return jnp.mean(jnp.diagonal(K))


def _no_tangent(status: Array) -> np.ndarray:
    """Integers have no derivative: JAX's tangent type of an integer."""
    return np.zeros(status.shape, jax.dtypes.float0)


def _jittered_tangent(K: Array, dK: Array, jitter: Array) -> tuple[Array, Array]:
    """Return ``dA`` and ``djitter`` for ``A = K + c mean(diag K) I`` with c held (the rung is locally constant)."""
    relative = lax.stop_gradient(jitter) / lax.stop_gradient(_mean_diagonal(K))
    dK = 0.5 * (dK + dK.T)
    djitter = jnp.where(jitter == 0, 0.0, relative) * _mean_diagonal(dK)
    return dK + djitter * jnp.eye(K.shape[0], dtype=K.dtype), djitter


def _cholesky_tangent(L: Array, dA: Array) -> Array:
    """``dL = L Φ(L⁻¹ dA L⁻ᵀ)``, Φ = lower triangle with half the diagonal (Murray 2016, equation 8)."""
    inner = triangular_solve(L, triangular_solve(L, dA).T)
    half_diagonal = jnp.tril(inner) - 0.5 * jnp.diag(jnp.diagonal(inner))
    return L @ half_diagonal


def _inverse_by_solve(L: Array) -> Array:
    W = triangular_solve(L, jnp.eye(L.shape[0], dtype=L.dtype))
    return W.T @ W


def _block_size(n: int) -> int:
    return max(64, -(-n // 10)) if n > 640 else max(48, -(-n // 8))


def _inverse_by_bordering(L: Array) -> Array:
    """Fill the inverse from its last block to its first.

    With ``D = L_JJ⁻¹``, ``P = L_RJ D`` and R all rows after block J: ``Z_RJ = −Z_RR P``, ``Z_JJ = Dᵀ D − Pᵀ Z_RJ``.
    """
    n = L.shape[0]
    block = _block_size(n)
    Z = jnp.zeros_like(L)
    for start in reversed(range(0, n, block)):
        end = min(start + block, n)
        D = _inverse_of_triangle(L[start:end, start:end])
        corner = D.T @ D
        if end < n:
            P = L[end:, start:end] @ D
            O = -(Z[end:, end:] @ P)
            corner = corner - P.T @ O
            Z = Z.at[end:, start:end].set(O).at[start:end, end:].set(O.T)
        Z = Z.at[start:end, start:end].set(0.5 * (corner + corner.T))
    return Z


def _inverse_of_triangle(L: Array) -> Array:
    return lax.linalg.triangular_solve(L, jnp.eye(L.shape[0], dtype=L.dtype), left_side=True, lower=True)
