"""Three models whose exact posteriors can be drawn from, so that a fault is a fault and its absence is exact.

* gaussian: five parameters, linear observations of neighbors: the posterior is narrow and correlated.
* counts: two positive rates with Poisson counts, handled on the log scale.
* probit: ten latent values of a Gaussian process under a probit likelihood, its posterior by expectation propagation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from probinfer import gp

__all__ = [
    "COUNTS",
    "GAUSSIAN",
    "MODELS",
    "PROBIT",
    "JointModel",
    "codes",
    "gaussian_moments",
    "gaussian_posterior",
]


class JointModel(NamedTuple):
    """A joint distribution of parameters and data, both flat vectors."""

    name: str
    prior_sample: Callable
    """key -> theta (d,)."""
    simulate: Callable
    """(key, theta) -> x."""
    log_prior: Callable
    """theta -> scalar, unnormalized, on an unbounded scale."""
    log_likelihood: Callable
    """(theta, x) -> scalar, unnormalized."""
    exact: Callable
    """(key, x, num) -> num independent posterior draws (num, d)."""
    observed: tuple[float, ...]
    """The one data set of the discrepancies."""
    any_reference: Callable
    """(key, x) -> a point for TARP that ignores x."""

    def log_joint(self, x, theta):
        """Log density of theta at given data, unnormalized."""
        return self.log_prior(theta) + self.log_likelihood(theta, x)


# Gaussian: theta ~ N(0, I), x = A theta + NOISE * standard normal.
DIMS, NOISE = 5, 0.5
A = np.eye(DIMS) + 0.5 * np.eye(DIMS, k=1) + 0.5 * np.eye(DIMS, k=-1)
PRECISION = np.eye(DIMS) + A.T @ A / NOISE**2


def gaussian_prior(key):
    return jax.random.normal(key, (DIMS,))


def gaussian_simulate(key, theta):
    return A @ theta + NOISE * jax.random.normal(key, (DIMS,))


def gaussian_log_prior(theta):
    return -0.5 * jnp.sum(theta**2)


def gaussian_log_likelihood(theta, x):
    return -0.5 * jnp.sum((x - A @ theta) ** 2) / NOISE**2


def gaussian_moments(x, power: float = 1.0):
    """Mean and covariance of the posterior with the likelihood raised to a power."""
    covariance = np.linalg.inv(np.eye(DIMS) + power * A.T @ A / NOISE**2)
    return power * covariance @ A.T @ x / NOISE**2, covariance


def gaussian_posterior(key, x, num):
    mean, covariance = gaussian_moments(x)
    return mean + jax.random.normal(key, (num, DIMS)) @ np.linalg.cholesky(covariance).T


def gaussian_any(key, x):
    return gaussian_prior(key)


GAUSSIAN = JointModel(
    name="gaussian",
    prior_sample=gaussian_prior,
    simulate=gaussian_simulate,
    log_prior=gaussian_log_prior,
    log_likelihood=gaussian_log_likelihood,
    exact=gaussian_posterior,
    observed=(1.2, -0.6, 0.4, 1.9, -0.8),
    any_reference=gaussian_any,
)

# Counts: rate ~ Gamma(SHAPE, 1), count ~ Poisson(EXPOSURE * rate); theta is the logarithm of the rate.
SHAPE, EXPOSURE, RATES = 2.0, 2.0, 2


def counts_prior(key):
    return jnp.log(jax.random.gamma(key, SHAPE, (RATES,)))


def counts_simulate(key, theta):
    return jax.random.poisson(key, EXPOSURE * jnp.exp(theta)).astype(theta.dtype)


def counts_log_prior(theta):
    return jnp.sum(SHAPE * theta - jnp.exp(theta))


def counts_log_likelihood(theta, x):
    return jnp.sum(x * theta - EXPOSURE * jnp.exp(theta))


def counts_posterior(key, x, num, missing: float = 0.0):
    """Draws of Gamma(SHAPE + x, 1 + EXPOSURE), in logarithms; ``missing`` is taken from the shape."""
    gamma = jax.random.gamma(key, SHAPE + x - missing, (num, RATES))
    return jnp.log(gamma / (1 + EXPOSURE))


def counts_any(key, x):
    return counts_prior(key)


COUNTS = JointModel(
    name="counts",
    prior_sample=counts_prior,
    simulate=counts_simulate,
    log_prior=counts_log_prior,
    log_likelihood=counts_log_likelihood,
    exact=counts_posterior,
    observed=(4.0, 3.0),
    any_reference=counts_any,
)

# Probit: f ~ N(0, K) at ten inputs, label 1 with probability Phi(f).
POINTS = np.linspace(0, 3, 10)[:, None]
KERNEL = gp.kernels.Matern52(9.0, 1.0)
GRAM = np.asarray(KERNEL.gram(jnp.asarray(POINTS)))
_PRIOR_ROOT = np.linalg.cholesky(GRAM)
_TRIES = 100_000  # prior draws of which those whose labels are the observed ones are kept


def probit_prior(key):
    return _PRIOR_ROOT @ jax.random.normal(key, (len(POINTS),))


def probit_simulate(key, theta):
    return (theta + jax.random.normal(key, theta.shape) > 0).astype(theta.dtype)


def probit_log_prior(theta):
    return -0.5 * jnp.sum(jax.scipy.linalg.solve_triangular(_PRIOR_ROOT, theta, lower=True) ** 2)


def probit_log_likelihood(theta, x):
    return jnp.sum(norm.logcdf((2 * x - 1) * theta))


def probit_rejection(key, x, num):
    """Draws of the posterior at ``x``, exact where enough of the tries have its labels: the others are NaN."""
    keys = jax.random.split(key, (_TRIES, 2))
    theta = jax.vmap(probit_prior)(keys[:, 0])
    labels = jax.vmap(probit_simulate)(keys[:, 1], theta)
    accepted = jnp.nonzero(jnp.all(labels == x, axis=1), size=num, fill_value=_TRIES)[0]
    return jnp.take(theta, accepted, axis=0, mode="fill", fill_value=jnp.nan)


def probit_any(key, x):
    return probit_prior(key)


def codes(x):
    """Return the index of a vector of labels among all 2^10."""
    return x.astype(int) @ 2 ** np.arange(len(POINTS))


PROBIT = JointModel(
    name="probit",
    prior_sample=probit_prior,
    simulate=probit_simulate,
    log_prior=probit_log_prior,
    log_likelihood=probit_log_likelihood,
    exact=probit_rejection,
    observed=(1.0,) * 5 + (0.0,) * 5,
    any_reference=probit_any,
)

MODELS = (GAUSSIAN, COUNTS, PROBIT)
