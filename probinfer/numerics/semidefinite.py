"""Symmetric positive semi-definite matrices of any rank: what is left of a difference, and a factor to draw with.

A covariance that is the difference of two larger matrices is positive semi-definite only up to *their* rounding, which
may exceed its own size. Where Cholesky factorization says so, its negative eigenvalues, which are rounding, are set to
zero, and with them the positive ones that are no larger, which cannot be told from rounding. Nothing is added to the
diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float

__all__ = ["clear_rounding", "semidefinite_factor"]


def clear_rounding(
    C: Float[Array, "M M"], lower_bound_fn: Callable[..., Array], *operands: Any
) -> Float[Array, "M M"]:
    """Return ``C`` made positive semi-definite and at least ``lower_bound_fn(*operands)``, up to rounding.

    A ``C`` that is positive definite is returned unchanged. The derivative is that of ``C``, as the change is rounding.

    Args:
        C: symmetric.
        lower_bound_fn: makes a lower bound, positive semi-definite, from a form without cancellation; it is called only
            where ``C`` is not positive definite.
        *operands: its arguments.
    """
    C = 0.5 * (C + C.T)
    given, operands = jax.lax.stop_gradient((C, operands))

    def repair(given, operands):
        bound = lower_bound_fn(*operands)
        values, vectors = jnp.linalg.eigh(given - bound)
        positive = jnp.where(values > jnp.maximum(-values[0], 0), values, 0)
        return bound + (vectors * positive) @ vectors.T - given

    chol = jax.lax.linalg.cholesky(given, symmetrize_input=False)
    return C + jax.lax.cond(_is_finite(chol), lambda C, _: jnp.zeros_like(C), repair, given, operands)


def semidefinite_factor(C: Float[Array, "M M"]) -> Float[Array, "M M"]:
    """F with ``F Fᵀ = C`` for a positive semi-definite matrix, up to rounding of the size of its largest entry.

    The Cholesky factor where there is one, otherwise eigenvectors times roots of the eigenvalues, those below zero
    taken for zero; NaN where C holds NaN or infinities.
    """
    chol = jax.lax.linalg.cholesky(C, symmetrize_input=False)
    return jax.lax.cond(_is_finite(chol), lambda C, chol: jnp.tril(chol), _spectral_factor, C, chol)


def _spectral_factor(C, _):
    values, vectors = jnp.linalg.eigh(C)
    return vectors * jnp.sqrt(jnp.maximum(values, 0))


def _is_finite(chol):
    return jnp.all(jnp.isfinite(jnp.diagonal(chol)))
