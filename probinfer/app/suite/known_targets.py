r"""Targets whose exact draws and evidence are known, and models with simulators, to test engines on.

All targets belong to one family of densities on :math:`R^3`,

.. math:: \log p(u) = -\tfrac12 u^\top P u + b^\top u - \textstyle\sum_j r_j e^{u_j} + \text{const},

correlated normals (:math:`r = 0`) and logarithms of gamma variables (:math:`P = 0`), so that an engine is compiled
only once for all of them. The posterior of the linear regression belongs to the family too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import gammaln

from probinfer.core.binding import LogDensity
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey, Scalar
from probinfer.targets import Target, from_logdensity

__all__ = [
    "CORRELATED",
    "NOT_NORMAL",
    "KnownTarget",
    "SimulationModel",
    "correlated_normal",
    "eight_schools",
    "linear_regression",
    "location_and_scale",
    "skewed",
]

CORRELATED, NOT_NORMAL = "correlated", "not normal"

_DIMENSION = 3
_SCALES = np.array([0.1, 1.0, 30.0])
_CORRELATION = 0.8
_SHAPES, _RATES = np.array([1.0, 2.0, 5.0]), np.array([50.0, 1.0, 0.01])
_DESIGN = np.array([[2.0, 2.0, 0.0], [2.0, 1.5, 0.5], [1.5, 2.0, 1.0], [2.0, 2.5, -1.0], [2.0, 2.0, 0.5]])
_NOISE = 1.0
_SCHOOL_ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
_SCHOOL_SCALE = 5.0
_NUM_OBSERVATIONS = 5
_LOG_SCALE_SD = 0.5


class KnownTarget(NamedTuple):
    """A target with exact draws and a known normalizing constant.

    Attributes:
        name: name of the target.
        target: log density of the unconstrained position u ``(3,)``.
        exact: ``(key, num)`` -> ``(num, 3)`` independent draws.
        features: properties that an engine may be unable to represent: ``CORRELATED``, ``NOT_NORMAL``.
        log_evidence: log of the integral of the density.
    """

    name: str
    target: Target
    exact: Callable[[PRNGKey, int], Array]
    features: tuple[str, ...]
    log_evidence: float


class SimulationModel(NamedTuple):
    """A prior and a simulator, for checks on simulated data.

    Attributes:
        name: name of the model.
        prior_sample: ``key`` -> unconstrained parameters.
        simulate: ``(key, parameters)`` -> x.
        log_prior_fn: parameters -> log prior.
        log_likelihood_fn: ``(parameters, x)`` -> log likelihood.
        features: features of its posteriors, as in ``KnownTarget``.
        target_fn: x -> the posterior as a target of the family; None for models outside the family.
    """

    name: str
    prior_sample: Callable
    simulate: Callable
    log_prior_fn: Callable
    log_likelihood_fn: Callable
    features: tuple[str, ...]
    target_fn: Callable[[ArrayTree], Target] | None = None

    def log_joint(self, parameters: ArrayTree, x: ArrayTree) -> Scalar:
        """Return log p(parameters) + log p(x | parameters)."""
        return self.log_prior_fn(parameters) + self.log_likelihood_fn(parameters, x)


# Targets


def correlated_normal() -> KnownTarget:
    """Return a normal with pairwise correlations of 0.8 and standard deviations 0.1, 1 and 30."""
    correlation = _CORRELATION + (1 - _CORRELATION) * np.eye(_DIMENSION)
    covariance = correlation * np.outer(_SCALES, _SCALES)
    chol = np.linalg.cholesky(covariance)

    def exact(key: PRNGKey, num: int) -> Float[Array, "num 3"]:
        return jax.random.normal(key, (num, _DIMENSION)) @ jnp.asarray(chol.T, jnp.result_type(float))

    # log sqrt(det(2 pi covariance))
    log_evidence = 0.5 * _DIMENSION * np.log(2 * np.pi) + np.sum(np.log(np.diag(chol)))
    return KnownTarget(
        name="correlated normal",
        target=_target(np.linalg.inv(covariance), linear=np.zeros(_DIMENSION), rates=np.zeros(_DIMENSION)),
        exact=exact,
        features=(CORRELATED,),
        log_evidence=float(log_evidence),
    )


def skewed() -> KnownTarget:
    """Return logarithms of gamma variables with shapes 1, 2 and 5 and means 0.02, 2 and 500."""

    def exact(key: PRNGKey, num: int) -> Float[Array, "num 3"]:
        draws = jax.random.loggamma(key, jnp.asarray(_SHAPES, jnp.result_type(float)), (num, _DIMENSION))
        return draws - jnp.log(jnp.asarray(_RATES, draws.dtype))

    # The integral of exp(a u - r exp(u)) is Gamma(a) / r^a.
    log_evidence = np.sum(gammaln(_SHAPES) - _SHAPES * np.log(_RATES))
    return KnownTarget(
        name="skewed, badly scaled",
        target=_target(np.zeros((_DIMENSION, _DIMENSION)), _SHAPES, _RATES),
        exact=exact,
        features=(NOT_NORMAL,),
        log_evidence=float(log_evidence),
    )


def _target(precision, linear, rates) -> Target:
    dtype = jnp.result_type(float)
    data = [jnp.asarray(value, dtype) for value in (precision, linear, rates)]
    return from_logdensity(LogDensity(_log_density, *data), jnp.zeros(_DIMENSION, dtype))


def _log_density(precision: Array, linear: Array, rates: Array, u: Array) -> Scalar:
    # Where a rate is zero, exp is replaced by 1: the gradient of 0 * exp(u) would be NaN if exp(u) overflows.
    growth = jnp.exp(jnp.where(rates > 0, u, 0.0))
    return -0.5 * u @ precision @ u + linear @ u - rates @ growth


# Models


def linear_regression() -> SimulationModel:
    """Return a regression with three coefficients, two almost collinear, and a normal posterior."""
    precision = np.eye(_DIMENSION) + _DESIGN.T @ _DESIGN / _NOISE**2

    def target_fn(x: ArrayTree) -> Target:
        return _target(precision, _DESIGN.T @ np.asarray(x) / _NOISE**2, np.zeros(_DIMENSION))

    return SimulationModel(
        name="linear regression",
        prior_sample=_standard_normal,
        simulate=_regression_data,
        log_prior_fn=_log_standard_normal,
        log_likelihood_fn=_regression_likelihood,
        features=(CORRELATED,),
        target_fn=target_fn,
    )


def _standard_normal(key: PRNGKey) -> Array:
    return jax.random.normal(key, (_DIMENSION,))


def _log_standard_normal(parameters: Array) -> Scalar:
    return -0.5 * jnp.sum(parameters**2) - 0.5 * parameters.size * float(np.log(2 * np.pi))


def _regression_data(key: PRNGKey, parameters: Array) -> Array:
    mean = jnp.asarray(_DESIGN, parameters.dtype) @ parameters
    return mean + _NOISE * jax.random.normal(key, mean.shape, parameters.dtype)


def _regression_likelihood(parameters: Array, x: Array) -> Scalar:
    residual = (x - jnp.asarray(_DESIGN, parameters.dtype) @ parameters) / _NOISE
    return -0.5 * jnp.sum(residual**2)


def eight_schools() -> SimulationModel:
    """Return the non-centered eight-schools model, with tau ~ half-Cauchy(5) on the log scale.

    References:
        Rubin (1981), "Estimation in parallel randomized experiments".
    """
    return SimulationModel(
        name="eight schools",
        prior_sample=_school_prior,
        simulate=_school_data,
        log_prior_fn=_log_school_prior,
        log_likelihood_fn=_school_likelihood,
        features=(NOT_NORMAL,),
    )


def _school_prior(key: PRNGKey) -> dict[str, Array]:
    key_mu, key_tau, key_z = jax.random.split(key, 3)
    tau = jnp.abs(_SCHOOL_SCALE * jax.random.cauchy(key_tau))
    mu = _SCHOOL_SCALE * jax.random.normal(key_mu)
    return {"log_tau": jnp.log(tau), "mu": mu, "z": jax.random.normal(key_z, (8,))}


def _log_school_prior(parameters: dict[str, Array]) -> Scalar:
    log_ratio = parameters["log_tau"] - float(np.log(_SCHOOL_SCALE))
    half_cauchy = log_ratio - jnp.logaddexp(
        0.0, 2 * log_ratio
    )  # with the Jacobian of log tau, up to a constant
    return half_cauchy - 0.5 * (parameters["mu"] / _SCHOOL_SCALE) ** 2 - 0.5 * jnp.sum(parameters["z"] ** 2)


def _school_effects(parameters: dict[str, Array]) -> Array:
    return parameters["mu"] + jnp.exp(parameters["log_tau"]) * parameters["z"]


def _school_data(key: PRNGKey, parameters: dict[str, Array]) -> Array:
    effects = _school_effects(parameters)
    errors = jnp.asarray(_SCHOOL_ERRORS, effects.dtype)
    return effects + errors * jax.random.normal(key, (8,), effects.dtype)


def _school_likelihood(parameters: dict[str, Array], x: Array) -> Scalar:
    errors = jnp.asarray(_SCHOOL_ERRORS, x.dtype)
    return -0.5 * jnp.sum(((x - _school_effects(parameters)) / errors) ** 2)


def location_and_scale() -> SimulationModel:
    """Return five observations of N(mu, sigma^2), both parameters unknown: a skewed posterior of (mu, log sigma)."""
    return SimulationModel(
        name="location and scale",
        prior_sample=_location_prior,
        simulate=_location_data,
        log_prior_fn=_log_location_prior,
        log_likelihood_fn=_location_likelihood,
        features=(NOT_NORMAL,),
    )


def _location_prior(key: PRNGKey) -> Array:
    return jax.random.normal(key, (2,)) * jnp.asarray([1.0, _LOG_SCALE_SD])


def _log_location_prior(parameters: Array) -> Scalar:
    return -0.5 * parameters[0] ** 2 - 0.5 * (parameters[1] / _LOG_SCALE_SD) ** 2


def _location_data(key: PRNGKey, parameters: Array) -> Array:
    return parameters[0] + jnp.exp(parameters[1]) * jax.random.normal(
        key, (_NUM_OBSERVATIONS,), parameters.dtype
    )


def _location_likelihood(parameters: Array, x: Array) -> Scalar:
    return (
        -0.5 * jnp.sum(((x - parameters[0]) / jnp.exp(parameters[1])) ** 2)
        - _NUM_OBSERVATIONS * parameters[1]
    )
