r"""A state-space model whose parameter posterior is known exactly, to test engines for such models.

An autoregression observed with noise,

.. math:: x_0 \sim N(0, 1), \quad x_t \sim N(a x_{t-1}, s^2), \quad y_t \sim N(x_t, 1), \quad a \sim N(0.5, 0.5^2),
    \quad \log s \sim N(-0.5, 0.7^2),

with 25 fixed observations. The Kalman filter gives the exact likelihood of the parameters; exact draws come from
rejection sampling with the prior as proposal, the evidence from quadrature.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from scipy.optimize import minimize

from probinfer.app.suite.known_targets import CORRELATED, NOT_NORMAL, KnownTarget
from probinfer.core.binding import LogDensity
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey, Scalar
from probinfer.targets import from_logdensity

__all__ = ["StateSpace", "noisy_autoregression"]

_NUM_STEPS = 25
_SLOPE, _LOG_SCALE = (0.5, 0.5), (-0.5, 0.7)
_BATCH = 4096
_WIDTH, _NODES = 8.0, 161  # of the quadrature: half-width in prior standard deviations, nodes per axis


class StateSpace(NamedTuple):
    """A state-space model with the exact posterior of its parameters.

    Attributes:
        known: the posterior of the parameters, at positions ``(log s, a)``.
        priors: prior distributions of the parameters, ``{"scale", "slope"}``; a position has them in this order.
        initial: distribution of the first state.
        transition: ``(parameters, x, t)`` -> distribution of the next state.
        observation: ``(x, t)`` -> distribution of the observation.
        y: the observations.
    """

    known: KnownTarget
    priors: dict[str, Any]
    initial: Any
    transition: Callable
    observation: Callable
    y: Float[Array, " 25"]


@functools.cache
def noisy_autoregression() -> StateSpace:
    """Return the model, its data and its posterior.

    References:
        Kalman (1960), "A new approach to linear filtering and prediction problems".
    """
    priors = {"scale": dist.LogNormal(*_LOG_SCALE), "slope": dist.Normal(*_SLOPE)}
    y = jnp.asarray(_data(), jnp.result_type(float))
    target = from_logdensity(LogDensity(_log_density, y), jnp.zeros(2, y.dtype))
    known = KnownTarget(
        name="noisy autoregression",
        target=target,
        exact=functools.partial(_exact_draws, y),
        features=(CORRELATED, NOT_NORMAL),
        log_evidence=_log_evidence(y),
    )
    return StateSpace(
        known=known,
        priors=priors,
        initial=dist.Normal(0.0, 1.0),
        transition=_transition,
        observation=_observation,
        y=y,
    )


def _transition(parameters: ArrayTree, x: Array, t: Any) -> Any:
    del t
    return dist.Normal(parameters["slope"] * x, parameters["scale"])


def _observation(x: Array, t: Any) -> Any:
    del t
    return dist.Normal(x, 1.0)


def _data() -> Float[np.ndarray, " T"]:
    rng = np.random.default_rng(2024)
    x, y = rng.normal(), []
    for _ in range(_NUM_STEPS):
        y.append(x + rng.normal())
        x = 0.8 * x + rng.normal()
    return np.array(y)


def _log_likelihood(y: Float[Array, " T"], position: Float[Array, " 2"]) -> Scalar:
    """Run the Kalman filter: sum log p(y_t | y_1, ..., y_{t-1})."""
    process_variance, slope = jnp.exp(2 * position[0]), position[1]

    def step(predicted, value):
        mean, variance = predicted
        predictive_variance = variance + 1.0
        log_density = -0.5 * (
            jnp.log(2 * jnp.pi * predictive_variance) + (value - mean) ** 2 / predictive_variance
        )
        # Update
        mean, variance = (
            mean + variance / predictive_variance * (value - mean),
            variance / predictive_variance,
        )
        # Predict
        return (slope * mean, slope**2 * variance + process_variance), log_density

    initial = (jnp.zeros((), y.dtype), jnp.ones((), y.dtype))
    return jnp.sum(lax.scan(step, initial, y)[1])


def _log_density(y: Float[Array, " T"], position: Float[Array, " 2"]) -> Scalar:
    loc, scale = _prior(position.dtype)
    standard = (position - loc) / scale
    log_prior = -0.5 * standard @ standard - jnp.sum(jnp.log(scale)) - float(np.log(2 * np.pi))
    return log_prior + _log_likelihood(y, position)


def _prior(dtype: Any) -> tuple[Array, Array]:
    """Return the prior means and standard deviations of a position."""
    return jnp.asarray([_LOG_SCALE[0], _SLOPE[0]], dtype), jnp.asarray([_LOG_SCALE[1], _SLOPE[1]], dtype)


@jax.jit
def _log_likelihoods(y: Float[Array, " T"], standard: Float[Array, "num 2"]) -> Float[Array, " num"]:
    """Return log likelihoods at positions in standardized units of the prior."""
    loc, scale = _prior(y.dtype)
    return jax.vmap(lambda z: _log_likelihood(y, loc + scale * z))(standard)


@functools.cache
def _log_bound() -> float:
    """Return an upper bound of the log likelihood for rejection sampling: the best grid point, then optimized."""
    y = jnp.asarray(_data(), jnp.result_type(float))
    grid = np.stack(np.meshgrid(*[np.linspace(-4, 4, 33)] * 2), axis=-1).reshape(-1, 2)
    values = np.asarray(_log_likelihoods(y, jnp.asarray(grid, y.dtype)))

    def negative(z):
        return -float(_log_likelihoods(y, jnp.asarray(z, y.dtype)[None])[0])

    optimum = minimize(negative, grid[np.argmax(values)], method="Nelder-Mead")
    return float(max(-optimum.fun, values.max())) + 1e-3  # a margin for the error of the optimizer


def _exact_draws(y: Float[Array, " T"], key: PRNGKey, num: int) -> Float[Array, "num 2"]:
    """Draw from the posterior by rejection: accept a draw of the prior with probability likelihood / bound."""
    accepted: list[np.ndarray] = []
    while sum(map(len, accepted)) < num:
        key, key_draw, key_accept = jax.random.split(key, 3)
        standard = jax.random.normal(key_draw, (_BATCH, 2), y.dtype)
        log_ratio = _log_likelihoods(y, standard) - _log_bound()
        is_accepted = jnp.log(jax.random.uniform(key_accept, (_BATCH,), y.dtype)) < log_ratio
        accepted.append(np.asarray(standard)[np.asarray(is_accepted)])
    loc, scale = _prior(y.dtype)
    return loc + scale * jnp.asarray(np.concatenate(accepted)[:num])


def _log_evidence(y: Float[Array, " T"]) -> float:
    """Integrate by the trapezoidal rule, whose error is below rounding for a density this smooth."""
    axis = np.linspace(-_WIDTH, _WIDTH, _NODES)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    log_prior = -0.5 * np.sum(grid**2, axis=1) - np.log(2 * np.pi)
    log_joint = np.asarray(_log_likelihoods(y, jnp.asarray(grid, y.dtype)), float) + log_prior
    return float(np.logaddexp.reduce(log_joint) + 2 * np.log(axis[1] - axis[0]))
