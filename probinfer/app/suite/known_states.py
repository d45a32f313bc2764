r"""A state-space model of which the posterior of the parameters is known: what engines for such models are judged on.

An autoregression seen through noise,

.. math:: x_0 \sim N(0, 1), \quad x_t \sim N(a x_{t-1}, s^2), \quad y_t \sim N(x_t, 1), \quad a \sim N(0.5, 0.5^2),
    \quad \log s \sim N(-0.5, 0.7^2),

with 25 observations that do not change. The Kalman filter gives the likelihood of the parameters without error, so
exact draws are made by rejection from the prior and the evidence by quadrature.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from scipy.optimize import minimize

from probinfer.app.suite.known_targets import CORRELATED, NOT_NORMAL, Known
from probinfer.core.binding import LogDensity
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey, Scalar
from probinfer.targets import from_logdensity

__all__ = ["StateSpace", "noisy_autoregression"]

_NUM_STEPS = 25
_SLOPE, _LOG_SCALE = (0.5, 0.5), (-0.5, 0.7)
_BATCH = 4096
_WIDTH, _NODES = 8.0, 161  # of the quadrature: prior standard deviations, nodes an axis


class StateSpace(NamedTuple):
    """A model with states, and what is known of its parameters.

    Attributes:
        known: the posterior of the parameters, at positions ``(log s, a)``.
        priors: distributions of the parameters, ``{"scale", "slope"}``: their tree in this order is a position.
        initial: law of the first state.
        transition: ``(theta, x, t)`` -> law of the next state.
        observation: ``(x, t)`` -> law of what is seen.
        y: the data ``(25,)``.
    """

    known: Known
    priors: Any
    initial: Any
    transition: Any
    observation: Any
    y: Array


@functools.cache
def noisy_autoregression() -> StateSpace:
    """Return the model, its data and its posterior.

    References:
        Kalman (1960), "A new approach to linear filtering and prediction problems".
    """
    priors = {"scale": dist.LogNormal(*_LOG_SCALE), "slope": dist.Normal(*_SLOPE)}
    y = jnp.asarray(_data(), jnp.result_type(float))
    target = from_logdensity(LogDensity(_log_density, y), jnp.zeros(2, y.dtype))
    known = Known(
        "noisy autoregression",
        target,
        functools.partial(_exact, y),
        (CORRELATED, NOT_NORMAL),
        _log_evidence(y),
    )
    return StateSpace(known, priors, dist.Normal(0.0, 1.0), _transition, _observation, y)


def _transition(theta: ArrayTree, x: Array, t: Any) -> Any:
    del t
    return dist.Normal(theta["slope"] * x, theta["scale"])


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
    """Kalman's filter: the density of every observation given those before."""
    process, slope = jnp.exp(2 * position[0]), position[1]

    def step(predicted, value):
        mean, variance = predicted
        total = variance + 1.0
        seen = -0.5 * (jnp.log(2 * jnp.pi * total) + (value - mean) ** 2 / total)
        mean, variance = mean + variance / total * (value - mean), variance / total
        return (slope * mean, slope**2 * variance + process), seen

    start = (jnp.zeros((), y.dtype), jnp.ones((), y.dtype))
    return jnp.sum(lax.scan(step, start, y)[1])


def _log_density(y: Float[Array, " T"], position: Float[Array, " 2"]) -> Scalar:
    centre, spread = _prior(position.dtype)
    standard = (position - centre) / spread
    log_prior = -0.5 * standard @ standard - jnp.sum(jnp.log(spread)) - float(np.log(2 * np.pi))
    return log_prior + _log_likelihood(y, position)


def _prior(dtype: Any) -> tuple[Array, Array]:
    """Means and standard deviations of a position."""
    return jnp.asarray([_LOG_SCALE[0], _SLOPE[0]], dtype), jnp.asarray([_LOG_SCALE[1], _SLOPE[1]], dtype)


@jax.jit
def _log_likelihoods(y: Float[Array, " T"], standard: Float[Array, "num 2"]) -> Float[Array, " num"]:
    """At positions in standard deviations of the prior from its mean."""
    centre, spread = _prior(y.dtype)
    return jax.vmap(lambda z: _log_likelihood(y, centre + spread * z))(standard)


@functools.cache
def _log_bound() -> float:
    """The largest log likelihood, which rejection needs: the best of a grid, climbed to the top."""
    y = jnp.asarray(_data(), jnp.result_type(float))
    grid = np.stack(np.meshgrid(*[np.linspace(-4, 4, 33)] * 2), axis=-1).reshape(-1, 2)
    values = np.asarray(_log_likelihoods(y, jnp.asarray(grid, y.dtype)))

    def negative(z):
        return -float(_log_likelihoods(y, jnp.asarray(z, y.dtype)[None])[0])

    top = minimize(negative, grid[np.argmax(values)], method="Nelder-Mead")
    return float(max(-top.fun, values.max())) + 1e-3


def _exact(y: Float[Array, " T"], key: PRNGKey, num: int) -> Float[Array, "num 2"]:
    """Draws of the prior, kept with the ratio of their likelihood to the largest one."""
    found: list[np.ndarray] = []
    while sum(map(len, found)) < num:
        key, key_draw, key_keep = jax.random.split(key, 3)
        standard = jax.random.normal(key_draw, (_BATCH, 2), y.dtype)
        log_ratio = _log_likelihoods(y, standard) - _log_bound()
        kept = jnp.log(jax.random.uniform(key_keep, (_BATCH,), y.dtype)) < log_ratio
        found.append(np.asarray(standard)[np.asarray(kept)])
    centre, spread = _prior(y.dtype)
    return centre + spread * jnp.asarray(np.concatenate(found)[:num])


def _log_evidence(y: Float[Array, " T"]) -> float:
    """By the trapezoidal rule, whose error is far below rounding for so smooth a density."""
    axis = np.linspace(-_WIDTH, _WIDTH, _NODES)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    log_prior = -0.5 * np.sum(grid**2, axis=1) - np.log(2 * np.pi)
    total = np.asarray(_log_likelihoods(y, jnp.asarray(grid, y.dtype)), float) + log_prior
    return float(np.logaddexp.reduce(total) + 2 * np.log(axis[1] - axis[0]))
