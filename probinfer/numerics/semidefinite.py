"""Symmetric positive semi-definite matrices of any rank: what is left of a difference, and a factor to draw with.

A covariance that is the difference of two larger matrices is positive semi-definite only up to *their* rounding, which
may exceed its own size. Where Cholesky factorisation says so, its negative eigenvalues, which are rounding, are set to
zero, and with them the positive ones that are no larger, which cannot be told from rounding. Nothing is added to the
diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float

__all__ = ["cleared_of_rounding", "semidefinite_factor"]


def cleared_of_rounding(
    C: Float[Array, "M M"], at_least: Callable[..., Array], *operands: Any
) -> Float[Array, "M M"]:
    """``C`` as a positive semi-definite matrix that exceeds ``at_least(*operands)``, changed by rounding errors only.

    Where ``C`` is positive definite already it is returned as it is. The derivative is that of ``C``: what is changed
    is rounding.

    Args:
        C: symmetric.
        at_least: makes a lower bound, positive semi-definite, from a form without cancellation; it is called only
            where ``C`` is not positive definite.
        *operands: its arguments.
    """
    C = 0.5 * (C + C.T)
    given, operands = jax.lax.stop_gradient((C, operands))

    def repair(given, operands):
        least = at_least(*operands)
        values, vectors = jnp.linalg.eigh(given - least)
        kept = jnp.where(values > jnp.maximum(-values[0], 0), values, 0)
        return least + (vectors * kept) @ vectors.T - given

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
