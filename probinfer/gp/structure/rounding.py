"""Predictive variances that are smaller than the rounding of the prior variance.

A predictive variance is the difference k** − |L⁻¹Sk*|² of numbers of the size of the prior variance. Its rounding error
is about ε(k** + Σ w_i² K_ii), where w = R k* are the weights of the observations in the predictive mean. A variance
that is not much larger is bounded from below by a form without cancellation, the contribution of the noise of the
observations, Σ w_i² / λ2_i (the second term of the covariance update in the form of Joseph). Its weights are computed
under a ridge of the size of the rounding: for any ridge the form is a lower bound, and without one the weights
themselves would be rounding errors.

If the matrix could only be factored with a jitter, the variance is that under this additional noise. A variance is
concave in the noise, so the jitter contributes at least as much as a second jitter would add: if that is much, the
variance is a property of the jitter and not of the model.

References:
    Bucy and Joseph (1968), Filtering for Stochastic Processes with Applications to Guidance, chapter 16.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float
from probinfer.numerics.linalg import add_to_diagonal, cholesky_solve, triangular_solve

__all__ = ["Factorization", "lower_covariance", "resolve"]

_ERROR_FACTOR = (
    8.0  # ε(k** + Σ w² K) is the size of the rounding error of a variance: this multiple bounds it
)
_JITTER_FACTOR = 10.0  # variances below this multiple of what a second jitter adds are lost
_RIDGE_FACTOR = 64.0  # ε times the prior variance: small against any noise that can be told from zero


class Factorization(NamedTuple):
    """``L Lᵀ = S K S + diag(noise)``, and the prior variances at the training points."""

    chol: Float[Array, "N N"]
    """L."""
    scale: Float[Array, " N"]
    """Diagonal of S."""
    noise: Float[Array, " N"]
    """Noise variances of the scaled observations."""
    prior_variance: Float[Array, " N"]
    """diag K."""
    jitter: Float[Array, ""]
    """Added to the diagonal of the factored matrix; it is no noise of the model."""


def resolve(
    factorization: Factorization,
    scaled_cross: Float[Array, "N M"],
    prior_variance: Float[Array, " M"],
    variance: Float[Array, " M"],
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """Replace variances that are lost in rounding by a lower bound, and bound the error of all.

    Args:
        factorization: that of the training points.
        scaled_cross: ``S k*``, a column for each new point.
        prior_variance: k** at the new points.
        variance: ``k** − |L⁻¹ S k*|²`` as it was computed.

    Returns:
        The variance, which at the level of rounding is not less than its lower bound and ε k**, with the derivative of
        the argument; and its rounding error, or the contribution of a jitter if that is larger.
    """
    factorization, scaled_cross, prior_variance, computed = jax.lax.stop_gradient(
        (factorization, scaled_cross, prior_variance, variance)
    )
    eps = float(jnp.finfo(prior_variance.dtype).eps)
    scaled_variance = factorization.scale**2 * factorization.prior_variance
    # The bound costs a factorization: only if a variance or the noise is near the level of rounding
    is_doubtful = jnp.any(computed < 4 * _ERROR_FACTOR * eps * prior_variance)
    is_doubtful |= jnp.any(factorization.noise < _RIDGE_FACTOR * eps * jnp.max(scaled_variance))
    lower, weight = jax.lax.cond(is_doubtful, _bound, _no_bound, factorization, scaled_cross, computed)
    with_second_jitter = jax.lax.cond(
        factorization.jitter > 0,
        _add_second_jitter,
        lambda factorization, scaled_cross, prior_variance, computed: computed,
        factorization,
        scaled_cross,
        prior_variance,
        computed,
    )
    resolved = jnp.maximum(jnp.maximum(computed, lower), eps * prior_variance)
    resolved = jnp.where(is_doubtful, resolved, computed)
    error = jnp.maximum(
        _ERROR_FACTOR * eps * (prior_variance + weight), _JITTER_FACTOR * (with_second_jitter - computed)
    )
    return variance + (resolved - computed), error


def lower_covariance(factorization: Factorization, scaled_cross: Float[Array, "N M"]) -> Float[Array, "M M"]:
    """The contribution of the noise of the observations to the covariance: a lower bound without cancellation."""
    weights = _weights(factorization, scaled_cross)
    return weights.T @ (factorization.noise[:, None] * weights)


def _bound(factorization, scaled_cross, computed):
    """Lower bounds of the variances, and Σ w² K."""
    weights = _weights(factorization, scaled_cross)
    lower = jnp.sum(factorization.noise[:, None] * weights**2, 0)
    return lower, (factorization.scale**2 * factorization.prior_variance) @ weights**2


def _no_bound(factorization, scaled_cross, computed):
    # The variance is at least Σ noise u², w = S u: so Σ w² K is at most this, and their ratio is below 1 / ε.
    scaled_variance = factorization.scale**2 * factorization.prior_variance
    return jnp.zeros_like(computed), jnp.max(scaled_variance) / jnp.min(factorization.noise) * computed


def _add_second_jitter(factorization, scaled_cross, prior_variance, computed):
    """The variances under twice the jitter."""
    chol = jnp.tril(factorization.chol)
    chol = jax.lax.linalg.cholesky(
        add_to_diagonal(chol @ chol.T, factorization.jitter), symmetrize_input=False
    )
    return prior_variance - jnp.sum(triangular_solve(chol, scaled_cross) ** 2, 0)


def _weights(factorization, scaled_cross):
    """(S K S + diag(noise) + ridge)⁻¹ S k*."""
    chol = jnp.tril(factorization.chol)
    eps = float(jnp.finfo(chol.dtype).eps)
    ridge = _RIDGE_FACTOR * eps * jnp.max(factorization.scale**2 * factorization.prior_variance)
    chol = jax.lax.linalg.cholesky(add_to_diagonal(chol @ chol.T, ridge), symmetrize_input=False)
    return cholesky_solve(chol, scaled_cross)
