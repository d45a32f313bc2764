"""Models that the tests of smc share: a finite one, a linear-Gaussian one; data bound as arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from probinfer import resampling, smc

Z_LIMIT = 6.5  # two-sided 8e-11 a comparison: fewer than 10^4 in the tests of smc, so 1e-6 in all


def finite(model, dtype):
    """The one-particle form of a ``tests.reference.hmm.FiniteModel``; states are integers."""
    with np.errstate(divide="ignore"):
        tables = [jnp.asarray(table, dtype) for table in (np.log(model.initial), np.log(model.transition))]
    log_initial, log_transition = tables
    log_potential = jnp.asarray(model.log_potential, dtype)
    return smc.FeynmanKac(
        Partial(_start, log_initial),
        Partial(_move, log_transition),
        Partial(_look_up, log_potential),
        Partial(_look_up, log_transition),
    )


def _start(log_initial, key):
    return jax.random.categorical(key, log_initial).astype(jnp.int32)


def _move(log_transition, key, x, t):
    return jax.random.categorical(key, log_transition[t, x]).astype(jnp.int32)


def _look_up(table, before, x, t):
    return table[t, before, x]


LINEAR = {"slope": 0.9, "process": 0.5, "noise": 0.8, "start": 2.0}


def linear(y):
    """The one-particle form of the model of ``tests.reference.kalman`` with the parameters ``LINEAR``."""
    parameters = {name: jnp.asarray(value, y.dtype) for name, value in LINEAR.items()}
    return smc.FeynmanKac(
        Partial(_linear_start, parameters),
        Partial(_linear_move, parameters),
        Partial(_linear_potential, parameters, y),
        Partial(_linear_transition, parameters),
    )


def _linear_start(p, key):
    return jnp.sqrt(p["start"]) * jax.random.normal(key, (), p["start"].dtype)


def _linear_move(p, key, x, t):
    return p["slope"] * x + jnp.sqrt(p["process"]) * jax.random.normal(key, (), x.dtype)


def log_normal(x, variance):
    return -0.5 * (jnp.log(2 * jnp.pi * variance) + jnp.square(x) / variance)


def _linear_potential(p, y, before, x, t):
    return log_normal(y[t] - x, p["noise"])


def _linear_transition(p, before, x, t):
    return log_normal(x - p["slope"] * before, p["process"])


def _switch(which, log_weights, t):
    rules = [
        resampling.ess_below(0.6),
        resampling.entropic_below(0.7),
        resampling.always(),
        resampling.every(2),
    ]
    return jax.lax.switch(which, [lambda rule=rule: rule(log_weights, t) for rule in rules])


TRIGGERS = ("ess", "entropic", "always", "every")


def trigger(name):
    """A trigger whose kind is data: one program serves all of them."""
    return Partial(_switch, jnp.int32(TRIGGERS.index(name)))


def z_scores(samples, expected):
    """(mean - expected) / standard error over axis 0; where nothing varies, 0 if equal to rounding, else infinite."""
    samples = np.asarray(samples, float)
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    difference = samples.mean(axis=0) - expected
    flat = error <= 1e-12 * np.abs(expected)
    same = np.abs(difference) <= 1e-6 * np.abs(expected) + 1e-12
    return np.where(flat, np.where(same, 0.0, np.inf), difference / np.where(flat, 1.0, error))
