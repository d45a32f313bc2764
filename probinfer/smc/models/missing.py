r"""Log densities of what was seen of a value: coordinates that are NaN are integrated out where the law allows it.

A law with batch dimensions, and one made of them by ``to_event``, is a product: its missing factors are left out.
A multivariate normal or Student t has marginals of its own kind. Of other laws an event can be missing only as a whole.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro.distributions import Distribution, Independent, MultivariateNormal, MultivariateStudentT

from probinfer.core.types import Array

__all__ = ["can_marginalize", "log_seen", "partly_missing"]

_ELLIPTIC = (MultivariateNormal, MultivariateStudentT)


def can_marginalize(law: Distribution) -> bool:
    """Whether some coordinates of an event may be missing."""
    if isinstance(law, Independent):
        return can_marginalize(law.base_dist)
    return not law.event_shape or isinstance(law, _ELLIPTIC)


def partly_missing(values: np.ndarray, num_event_dims: int) -> np.ndarray:
    """Which rows (T,) hold an event of which some coordinates, and not all, are NaN."""
    gaps = np.isnan(values).reshape(*values.shape[: values.ndim - num_event_dims], -1)
    return (gaps.any(-1) & ~gaps.all(-1)).reshape(len(values), -1).any(-1)


def log_seen(law: Distribution, value: Array, seen: Any = None) -> Array:
    """Return the log density of what was seen of a value, summed over the batch dimensions of the law.

    Args:
        law: a distribution of the shape of the value.
        value: NaN where missing; a part of an event only if the law ``can_marginalize``, otherwise the result is NaN.
        seen: a boolean, or None: everything that is not NaN.

    Raises:
        ValueError: the shapes differ.
    """
    if law.shape() != value.shape:
        raise ValueError(
            f"the law of an observation has shape {law.shape()}, the observation {value.shape}; they must agree"
        )
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    if seen is None and not floating:
        return jnp.sum(law.log_prob(value))
    if isinstance(law, Independent):  # a product: event by event of the law inside
        return log_seen(law.base_dist, value, seen)
    gaps = jnp.isnan(value) if floating else jnp.zeros(value.shape, bool)
    gaps = gaps if seen is None else gaps | ~jnp.asarray(seen)
    if isinstance(law, _ELLIPTIC):
        return jnp.sum(_log_marginal(law, value, ~gaps))
    events = tuple(range(len(law.batch_shape), value.ndim))
    missing, partly = jnp.all(gaps, axis=events), jnp.any(gaps, axis=events)
    # a value in the support in place of NaN: the derivative of what is left out is zero
    wide = (missing | partly).reshape(missing.shape + (1,) * len(law.event_shape))
    log_prob = law.log_prob(jnp.where(wide, law.support.feasible_like(value), value))
    log_prob = jnp.where(missing, jnp.zeros_like(log_prob), log_prob)
    return jnp.sum(jnp.where(partly & ~missing, jnp.nan, log_prob))


def _log_marginal(law: Any, value: Array, seen: Array) -> Array:
    r"""Log density of the coordinates that were seen, (*batch,).

    With :math:`\tilde\Sigma` the scale matrix whose missing rows and columns are those of the identity, and residuals
    that are zero there, the quadratic form and the determinant are those of the seen block.
    """
    factor = law.scale_tril
    scale = factor @ jnp.swapaxes(factor, -1, -2)
    both = seen[..., :, None] & seen[..., None, :]
    chol = jnp.linalg.cholesky(jnp.where(both, scale, jnp.eye(scale.shape[-1], dtype=scale.dtype)))
    residual = jnp.where(seen, jnp.where(seen, value, 0) - law.loc, 0)
    chol = jnp.broadcast_to(chol, residual.shape[:-1] + chol.shape[-2:])
    white = lax.linalg.triangular_solve(chol, residual[..., None], left_side=True, lower=True)[..., 0]
    quad, count = jnp.sum(white**2, axis=-1), jnp.sum(seen, axis=-1).astype(value.dtype)
    half_log_det = jnp.sum(jnp.log(jnp.diagonal(chol, axis1=-2, axis2=-1)), axis=-1)
    if isinstance(law, MultivariateNormal):
        return -0.5 * quad - half_log_det - 0.5 * count * np.log(2 * np.pi)
    df = law.df
    normalizer = lax.lgamma(0.5 * (df + count)) - lax.lgamma(0.5 * df) - 0.5 * count * jnp.log(np.pi * df)
    return normalizer - half_log_det - 0.5 * (df + count) * jnp.log1p(quad / df)
