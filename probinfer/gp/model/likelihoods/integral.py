"""Log ∫ p(y | f) N(f; m, v) df for any log density, for prediction: accurate for narrow likelihoods and far outputs.

With f = m + √v (z* + w sinh u) the integral over u is computed by the trapezoid rule. If log p is concave, z* is the
maximum of the integrand, found by bisection, and w its width there; the integrand then decays at least as fast as the
prior, exp(−½(z − z*)²), so nine standard deviations on each side contain the integral. Otherwise z* = 0 and w = 1.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from probinfer.core.types import Array, Float
from probinfer.gp.prediction.bisection import bisect

__all__ = ["log_integral"]

_NUM_POINTS = 129
_HALF_WIDTH = 9.0  # standard deviations of the prior: exp(-9²/2) = 3e-18
_MAX_DISTANCE = 60.0  # standard deviations from the mean within which the maximum is searched
_NUM_HALVINGS = 40


def log_integral(
    likelihood: Any,
    y: Float[Array, "..."],
    mean: Float[Array, "..."],
    variance: Float[Array, "..."],
) -> Float[Array, "..."]:
    """Log ∫ p(y | f) N(f; mean, variance) df, elementwise.

    Args:
        likelihood: an object with ``log_density(y, f)`` and ``log_concave``.
        y: outputs.
        mean: means of the latent function.
        variance: its variances, positive.

    Returns:
        The log predictive densities. A log density that is not concave in f must vary on a scale of at least
        0.2 √variance.
    """
    y, mean, variance = jnp.broadcast_arrays(y, mean, variance)
    stddev = jnp.sqrt(variance)
    if likelihood.log_concave:
        center, width = _maximum(jax.lax.stop_gradient((likelihood, y, mean, stddev)))
    else:
        center, width = jnp.zeros_like(mean), jnp.ones_like(mean)
    shape = (_NUM_POINTS, *(1,) * mean.ndim)
    grid = jnp.asarray(np.linspace(-1.0, 1.0, _NUM_POINTS).reshape(shape), mean.dtype)
    end = jnp.arcsinh((_HALF_WIDTH if likelihood.log_concave else 1.5 * _HALF_WIDTH) / width)
    u = grid * end
    z = center + width * jnp.sinh(u)
    log_step = jnp.log(end * width) + math.log(2.0 / (_NUM_POINTS - 1)) - 0.5 * math.log(2.0 * math.pi)
    terms = likelihood.log_density(y, mean + stddev * z) - 0.5 * z**2 + jnp.log(jnp.cosh(u))
    return logsumexp(terms, axis=0) + log_step


def _maximum(arguments):
    """The maximum of log p(y | m + √v z) − ½z² in z, and 1/√(−second derivative) there."""
    likelihood, y, mean, stddev = arguments

    def slope(z):
        unit = jnp.ones_like(z)
        return jax.jvp(lambda z: likelihood.log_density(y, mean + stddev * z), (z,), (unit,))[1] - z

    low, high = jnp.full_like(mean, -_MAX_DISTANCE), jnp.full_like(mean, _MAX_DISTANCE)
    center = bisect(lambda z: slope(z) > 0, low, high, num_steps=_NUM_HALVINGS)
    curvature = -jax.jvp(slope, (center,), (jnp.ones_like(center),))[1]
    return center, jax.lax.rsqrt(jnp.maximum(curvature, 1.0))
