r"""Log densities of the observed part of a value: coordinates that are NaN are integrated out if possible.

A distribution with batch dimensions, or made from them by ``to_event``, is a product: its missing factors are left out.
The marginals of a multivariate normal or Student t are again normal or Student t. Under other distributions an event
can only be missing as a whole.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro.distributions import Distribution, Independent, MultivariateNormal, MultivariateStudentT

from probinfer.core.types import Array

__all__ = ["can_marginalize", "observed_log_prob", "partly_missing"]

_ELLIPTICAL = (MultivariateNormal, MultivariateStudentT)


def can_marginalize(distribution: Distribution) -> bool:
    """Return whether some coordinates of an event may be missing."""
    if isinstance(distribution, Independent):
        return can_marginalize(distribution.base_dist)
    return not distribution.event_shape or isinstance(distribution, _ELLIPTICAL)


def partly_missing(values: np.ndarray, num_event_dims: int) -> np.ndarray:
    """Return which rows (T,) hold an event with some, but not all, coordinates NaN."""
    is_nan = np.isnan(values).reshape(*values.shape[: values.ndim - num_event_dims], -1)
    return (is_nan.any(-1) & ~is_nan.all(-1)).reshape(len(values), -1).any(-1)


def observed_log_prob(distribution: Distribution, value: Array, observed: Any = None) -> Array:
    """Return the log density of the observed part of a value, summed over the batch dimensions.

    Args:
        distribution: of the shape of the value.
        value: NaN where missing; if a part of an event is missing and not ``can_marginalize``, the result is NaN.
        observed: a boolean for the whole value; None: everything that is not NaN.

    Raises:
        ValueError: the shapes differ.
    """
    if distribution.shape() != value.shape:
        raise ValueError(
            f"the distribution of an observation has shape {distribution.shape()}, the observation {value.shape}; "
            f"they must agree"
        )
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    if observed is None and not floating:
        return jnp.sum(distribution.log_prob(value))
    if isinstance(distribution, Independent):  # a product over the events of the base distribution
        return observed_log_prob(distribution.base_dist, value, observed)
    missing = jnp.isnan(value) if floating else jnp.zeros(value.shape, bool)
    missing = missing if observed is None else missing | ~jnp.asarray(observed)
    if isinstance(distribution, _ELLIPTICAL):
        return jnp.sum(_log_marginal(distribution, value, ~missing))
    event_axes = tuple(range(len(distribution.batch_shape), value.ndim))
    all_missing, any_missing = jnp.all(missing, axis=event_axes), jnp.any(missing, axis=event_axes)
    # a value in the support replaces NaN, so that the derivative of what is left out is zero and not NaN
    replaced = (all_missing | any_missing).reshape(any_missing.shape + (1,) * len(distribution.event_shape))
    log_prob = distribution.log_prob(jnp.where(replaced, distribution.support.feasible_like(value), value))
    log_prob = jnp.where(all_missing, jnp.zeros_like(log_prob), log_prob)
    return jnp.sum(jnp.where(any_missing & ~all_missing, jnp.nan, log_prob))


def _log_marginal(distribution: Any, value: Array, observed: Array) -> Array:
    r"""Return the log density of the observed coordinates, (*batch,).

    With :math:`\tilde\Sigma` the scale matrix whose missing rows and columns are those of the identity, and residuals
    that are zero there, the quadratic form and the determinant are those of the observed block.
    """
    scale_tril = distribution.scale_tril
    scale = scale_tril @ jnp.swapaxes(scale_tril, -1, -2)
    both_observed = observed[..., :, None] & observed[..., None, :]
    chol = jnp.linalg.cholesky(jnp.where(both_observed, scale, jnp.eye(scale.shape[-1], dtype=scale.dtype)))
    residual = jnp.where(observed, jnp.where(observed, value, 0) - distribution.loc, 0)
    chol = jnp.broadcast_to(chol, residual.shape[:-1] + chol.shape[-2:])
    whitened = lax.linalg.triangular_solve(chol, residual[..., None], left_side=True, lower=True)[..., 0]
    quad, count = jnp.sum(whitened**2, axis=-1), jnp.sum(observed, axis=-1).astype(value.dtype)
    half_log_det = jnp.sum(jnp.log(jnp.diagonal(chol, axis1=-2, axis2=-1)), axis=-1)
    if isinstance(distribution, MultivariateNormal):
        return -0.5 * quad - half_log_det - 0.5 * count * np.log(2 * np.pi)
    df = distribution.df
    normalizer = lax.lgamma(0.5 * (df + count)) - lax.lgamma(0.5 * df) - 0.5 * count * jnp.log(np.pi * df)
    return normalizer - half_log_det - 0.5 * (df + count) * jnp.log1p(quad / df)
