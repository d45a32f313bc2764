"""Predictive variances that are smaller than the rounding of the prior variance.

A predictive variance is the difference k** − |L⁻¹Sk*|² of numbers of the size of the prior variance. Its rounding error
is about ε(k** + Σ w_i² K_ii), with w = R k* the weights of the observations in the predictive mean. Where the variance
is not much larger, it is bounded from below by a form without cancellation, the noise that the predictor carries,
Σ w_i² / λ2_i (the second term of the covariance update in the form of Joseph). The weights for it are those under a
ridge of the size of the rounding: for any ridge the form is a lower bound, and without one the weights would be
rounding themselves.

Where the matrix could only be factored with a jitter, the variance is that under so much noise. A variance is concave
in the noise, so it owes to the jitter at least what another jitter adds to it: one that this adds much to is that of
the jitter, and not of the model.

References:
    Bucy and Joseph (1968), Filtering for Stochastic Processes with Applications to Guidance, chapter 16.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float
from probinfer.numerics.linalg import add_to_diagonal, cholesky_solve, triangular_solve

__all__ = ["Factored", "lower_covariance", "resolve"]

_ERROR = 8.0  # ε(k** + Σ w² K) is the size of the rounding error of a variance: this multiple bounds it
_SENSITIVE = 10.0  # variances below this multiple of what another jitter adds are lost
_RIDGE = 64.0  # ε times the prior variance: small against any noise that can be told from zero


class Factored(NamedTuple):
    """``L Lᵀ = S K S + diag(noise)``, and the prior variances at the training points."""

    chol: Array
    """L (N, N)."""
    scale: Array
    """Diagonal of S (N,)."""
    noise: Array
    """(N,)."""
    prior: Array
    """diag K (N,)."""
    jitter: Array
    """What was added to the diagonal of the factored matrix, which is no noise of the model."""


def resolve(
    factored: Factored, right: Float[Array, "N M"], prior: Float[Array, " M"], variance: Float[Array, " M"]
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """A variance that is a difference, with what was lost of it.

    Args:
        factored: the training points.
        right: ``S k*``, a column for each new point.
        prior: k** at the new points.
        variance: ``k** − |L⁻¹ S k*|²`` as it was computed.

    Returns:
        The variance, where it is at the level of rounding not less than its lower bound and ε k**, with the derivative
        of the one given; and its rounding error, or what a jitter brought in.
    """
    factored, right, prior, given = jax.lax.stop_gradient((factored, right, prior, variance))
    eps = float(jnp.finfo(prior.dtype).eps)
    size = factored.scale**2 * factored.prior
    doubtful = jnp.any(given < 4 * _ERROR * eps * prior)
    doubtful |= jnp.any(factored.noise < _RIDGE * eps * jnp.max(size))
    least, weight = jax.lax.cond(doubtful, _bound, _no_bound, factored, right, given)
    raised = jax.lax.cond(
        factored.jitter > 0,
        _raised,
        lambda factored, right, prior, given: given,
        factored,
        right,
        prior,
        given,
    )
    resolved = jnp.maximum(jnp.maximum(given, least), eps * prior)
    resolved = jnp.where(doubtful, resolved, given)
    error = jnp.maximum(_ERROR * eps * (prior + weight), _SENSITIVE * (raised - given))
    return variance + (resolved - given), error


def lower_covariance(factored: Factored, right: Float[Array, "N M"]) -> Float[Array, "M M"]:
    """What the noise of the observations alone contributes to the covariance: a lower bound without cancellation."""
    weights = _weights(factored, right)
    return weights.T @ (factored.noise[:, None] * weights)


def _bound(factored, right, given):
    weights = _weights(factored, right)
    least = jnp.sum(factored.noise[:, None] * weights**2, 0)
    return least, (factored.scale**2 * factored.prior) @ weights**2


def _no_bound(factored, right, given):
    # The variance is at least Σ noise u², w = S u: so Σ w² K is not more than this, and their ratio is below 1 / ε.
    size = factored.scale**2 * factored.prior
    return jnp.zeros_like(given), jnp.max(size) / jnp.min(factored.noise) * given


def _raised(factored, right, prior, given):
    """The variances under twice the jitter."""
    chol = jnp.tril(factored.chol)
    twice = jax.lax.linalg.cholesky(add_to_diagonal(chol @ chol.T, factored.jitter), symmetrize_input=False)
    return prior - jnp.sum(triangular_solve(twice, right) ** 2, 0)


def _weights(factored, right):
    """(S K S + diag(noise) + ridge)⁻¹ S k*."""
    chol = jnp.tril(factored.chol)
    eps = float(jnp.finfo(chol.dtype).eps)
    ridge = _RIDGE * eps * jnp.max(factored.scale**2 * factored.prior)
    ridged = jax.lax.linalg.cholesky(add_to_diagonal(chol @ chol.T, ridge), symmetrize_input=False)
    return cholesky_solve(ridged, right)
