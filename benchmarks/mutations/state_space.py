"""A random walk observed with noise, whose evidence is exact: what faults of particle methods are planted in.

theta is the whole path x (T,), data are y (T,): x_0 ~ N(0, START), x_t ~ N(SLOPE x_{t-1}, PROCESS), y_t = x_t + noise,
the noise normal (``WALK``) or normal within ``CUT`` standard deviations (``WINDOW``, where most particles may be dead).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from scipy.special import ndtr

from probinfer import smc

from .models import JointModel

__all__ = ["STEPS", "WALK", "WINDOW", "feynman_kac", "log_evidence"]

STEPS = 4
START, SLOPE, PROCESS, NOISE = 1.0, 0.9, 0.5, 1.0
CUT = 1.5
_NODES = 64
_TRIES = 500
_FAR = 7.0  # standard deviations beyond which normal noise is nothing


def prior_sample(key):
    normal = jax.random.normal(key, (STEPS,))

    def walk(before, z):
        x = SLOPE * before + np.sqrt(PROCESS) * z
        return x, x

    first = np.sqrt(START) * normal[0]
    return jnp.concatenate([first[None], jax.lax.scan(walk, first, normal[1:])[1]])


def simulate(cut, key, theta):
    if cut is None:
        return theta + np.sqrt(NOISE) * jax.random.normal(key, theta.shape)
    return theta + np.sqrt(NOISE) * jax.random.truncated_normal(key, -cut, cut, theta.shape)


def log_prior(theta):
    first = norm.logpdf(theta[0], 0, np.sqrt(START))
    return first + jnp.sum(norm.logpdf(theta[1:], SLOPE * theta[:-1], np.sqrt(PROCESS)))


def log_noise(cut, y, x):
    """Log density of one observation, normalized; minus infinity beyond the cut."""
    value = norm.logpdf(y, x, np.sqrt(NOISE))
    if cut is None:
        return value
    inside = jnp.abs(y - x) <= cut * np.sqrt(NOISE)
    return jnp.where(inside, value - np.log(1 - 2 * ndtr(-cut)), -jnp.inf)


def log_likelihood(cut, theta, y):
    return jnp.sum(log_noise(cut, y, theta))


def exact(cut, key, y, num):
    """Paths (num, T) of the posterior: normal; with a cut, the first of many normal ones that is inside the window.

    Where none is inside, which ``_TRIES`` makes rare, a path outside: its likelihood, zero, says so.
    """
    lag = np.eye(STEPS) - SLOPE * np.eye(STEPS, k=-1)
    precision = lag.T @ np.diag([1 / START, *[1 / PROCESS] * (STEPS - 1)]) @ lag + np.eye(STEPS) / NOISE
    covariance = np.linalg.inv(precision)
    normal = jax.random.normal(key, (num, 1 if cut is None else _TRIES, STEPS))
    paths = covariance @ y / NOISE + normal @ np.linalg.cholesky(covariance).T
    if cut is None:
        return paths[:, 0]
    inside = jnp.all(jnp.abs(paths - y) <= cut * np.sqrt(NOISE), axis=-1)
    return jnp.take_along_axis(paths, jnp.argmax(inside, axis=1)[:, None, None], axis=1)[:, 0]


def any_reference(key, x):
    return prior_sample(key)


def _model(name: str, cut: float | None) -> JointModel:
    return JointModel(
        name=name,
        prior_sample=prior_sample,
        simulate=partial(simulate, cut),
        log_prior=log_prior,
        log_likelihood=partial(log_likelihood, cut),
        exact=partial(exact, cut),
        observed=(0.0,) * STEPS,
        any_reference=any_reference,
    )


WALK, WINDOW = _model("walk", None), _model("window", CUT)


def feynman_kac(cut, y) -> smc.FeynmanKac:
    """The walk as a Feynman-Kac model of the library, its data bound."""
    bind = jax.tree_util.Partial
    return smc.FeynmanKac(start, move, bind(partial(weigh, cut), y), transition)


def start(key):
    return np.sqrt(START) * jax.random.normal(key)


def move(key, x, t):
    return SLOPE * x + np.sqrt(PROCESS) * jax.random.normal(key)


def weigh(cut, y, before, x, t):
    return log_noise(cut, y[t], x)


def transition(before, x, t):
    return norm.logpdf(x, SLOPE * before, np.sqrt(PROCESS))


def log_evidence(cut, y):
    """Log p(y) by Gauss-Legendre quadrature over the window of each step; right to 1e-9."""
    nodes, node_weights = np.polynomial.legendre.leggauss(_NODES)
    half = (_FAR if cut is None else cut) * np.sqrt(NOISE)
    x = y[:, None] + half * nodes * (1 - 1e-12)  # inside the window
    log_cells = np.log(half * node_weights) + jax.vmap(partial(log_noise, cut))(y, x)

    def step(log_mass, row):
        before, now, log_cell = row
        kernel = norm.logpdf(now[None], SLOPE * before[:, None], np.sqrt(PROCESS))
        return jax.nn.logsumexp(log_mass[:, None] + kernel, axis=0) + log_cell, None

    first = norm.logpdf(x[0], 0, np.sqrt(START)) + log_cells[0]
    return jax.nn.logsumexp(jax.lax.scan(step, first, (x[:-1], x[1:], log_cells[1:]))[0])
