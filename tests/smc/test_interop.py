"""Stand-ins with the shape of the models of cuthbert and dynamax."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from probinfer import smc
from probinfer.smc.filtering.forward_pass import forward
from tests.smc import models

P = models.LINEAR
STEPS = 6


def _start(key):
    return jnp.sqrt(P["start"]) * jax.random.normal(key)


def _propagate(key, x, inputs):
    return P["slope"] * x + jnp.sqrt(P["process"]) * jax.random.normal(key)


def _potential(x_previous, x, inputs):
    return models.log_normal(inputs["y"] - x, P["noise"])


def _density(x_previous, x, inputs):
    return models.log_normal(x - P["slope"] * x_previous, P["process"])


@partial(jax.jit, static_argnums=2)
def filter_of_cuthbert(key, model, num):
    """A slow filter by cuthbert's conventions, resampling at every step: log evidence."""
    keys = jax.random.split(key, num)
    x = jax.vmap(model.init_sample)(keys)
    log_evidence, log_weights = 0.0, jnp.zeros(num)
    for t in range(len(model.model_inputs)):
        key, key_choose, key_move = jax.random.split(key, 3)
        parents = x[jax.random.categorical(key_choose, log_weights, shape=(num,))]
        inputs = model.model_inputs[t]
        move = jax.vmap(model.propagate_sample, (0, 0, None))
        x = move(jax.random.split(key_move, num), parents, inputs)
        log_weights = jax.vmap(model.log_potential, (0, 0, None))(parents, x, inputs)
        log_evidence += jax.nn.logsumexp(log_weights) - jnp.log(num)
    return log_evidence


def test_a_model_of_cuthbert_runs(key, dtype):
    y = jnp.asarray(np.random.default_rng(5).normal(size=STEPS), dtype)
    fk = smc.from_cuthbert(_start, _propagate, _potential, {"y": y}, log_transition=_density)
    x, z = jnp.asarray(0.3, dtype), jnp.asarray(-0.2, dtype)
    assert fk.log_potential(x, x, 0) == 0
    assert np.isclose(fk.log_potential(x, z, 3), models.log_normal(y[2] - z, P["noise"]))
    assert np.isclose(fk.log_transition(x, z, 3), models.log_normal(z - P["slope"] * x, P["process"]))
    result = smc.particle_filter(key, fk, STEPS + 1, 64)
    assert result.status == 0
    assert result.log_evidences[0] == 0
    assert np.isnan(fk.log_potential(x, x, STEPS + 1))


@pytest.mark.slow
def test_a_model_runs_in_cuthbert(key, dtype):
    """Two filters of one model. Standard error of each log evidence below sqrt(10 T / N) = 0.12."""
    y = jnp.asarray(np.random.default_rng(5).normal(size=STEPS), dtype)
    x = jnp.asarray(0.3, dtype)
    plain = models.linear(y)
    out = smc.to_cuthbert(plain, STEPS)
    actual = filter_of_cuthbert(key, out, 4000)
    expected = smc.particle_filter(key, plain, STEPS, 4000, store="none").log_evidence
    assert abs(actual - expected) < 6.5 * 0.12 * np.sqrt(2)
    assert out.propagate_sample(key, x, jnp.int32(0)) == x
    assert out.propagate_sample(key, x, jnp.int32(2)) == plain.propagate(key, x, jnp.int32(2))


class Foreign(NamedTuple):
    """A distribution with the method ``sample(seed=key)``."""

    distribution: object

    def sample(self, seed):
        return self.distribution.sample(seed)

    def log_prob(self, value):
        return self.distribution.log_prob(value)


class Params(NamedTuple):
    initial_scale: object
    dynamics_function: object
    noise: object


class Gaussian:
    """As ``dynamax.nonlinear_gaussian_ssm.NonlinearGaussianSSM``."""

    def initial_distribution(self, params, inputs=None):
        return Foreign(dist.MultivariateNormal(jnp.zeros(2), scale_tril=params.initial_scale))

    def transition_distribution(self, params, state, inputs=None):
        mean = params.dynamics_function(state) + (0.0 if inputs is None else inputs)
        return Foreign(dist.MultivariateNormal(mean, jnp.eye(2)))

    def emission_distribution(self, params, state, inputs=None):
        return Foreign(dist.MultivariateNormal(state[:1], params.noise * jnp.eye(1)))


def _dynamics(x):
    return 0.9 * jnp.sin(x)


def _walk(x, t):
    return dist.MultivariateNormal(_dynamics(x), jnp.eye(2))


def _observe(x, t):
    return dist.MultivariateNormal(x[:1], 0.7 * jnp.eye(1))


@pytest.mark.slow
def test_dynamax_objects_are_state_space_models(key):
    y = jnp.asarray(np.random.default_rng(5).normal(size=(STEPS, 1))).at[2].set(jnp.nan)
    ssm, params = Gaussian(), Params(jnp.eye(2), _dynamics, jnp.asarray(0.7))
    fk = smc.from_dynamax(ssm, params, y)
    plain = smc.state_space(dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)), _walk, _observe, y)
    actual, expected = (smc.particle_filter(key, model, STEPS, 32) for model in (fk, plain))
    np.testing.assert_allclose(actual.paths, expected.paths, rtol=1e-10)
    np.testing.assert_allclose(actual.log_evidences, expected.log_evidences, rtol=1e-10)
    compiled = forward._cache_size()
    smc.particle_filter(key, smc.from_dynamax(ssm, params._replace(noise=jnp.asarray(0.3)), y + 1), STEPS, 32)
    assert forward._cache_size() == compiled
    x, z = jnp.array([0.3, 0.1]), jnp.array([-0.2, 0.4])
    assert np.isclose(fk.log_transition(x, z, 1), plain.log_transition(x, z, 1))
    inputs = jnp.arange(2.0 * STEPS).reshape(STEPS, 2)
    with_inputs = smc.from_dynamax(ssm, params, y, inputs=inputs, observed=np.arange(STEPS) != 1)
    assert np.isclose(with_inputs.log_transition(x, z + inputs[1], 1), fk.log_transition(x, z, 1))
    assert with_inputs.log_potential(x, x, 1) == fk.log_potential(x, x, 2) == 0
    assert with_inputs.log_potential(x, x, 0) == fk.log_potential(x, x, 0) != 0
    assert np.isnan(fk.log_potential(x, x, STEPS))


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="propagate_sample must be a function, got int"):
        smc.from_cuthbert(_start, 3, _potential, jnp.zeros(2))
    with pytest.raises(ValueError, match="one row per step"):
        smc.from_cuthbert(_start, _propagate, _potential, {"y": jnp.zeros(2), "z": jnp.zeros(3)})
    with pytest.raises(TypeError, match=r"expected a smc.FeynmanKac, got function"):
        smc.to_cuthbert(_start, 3)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        smc.to_cuthbert(models.linear(jnp.zeros(2)), 0)
    with pytest.raises(
        TypeError, match=r"float is not a state-space model of dynamax: it has no initial_distribution"
    ):
        smc.from_dynamax(3.0, None, jnp.zeros(2))
    with pytest.raises(ValueError, match="a row for each of the 3 emissions"):
        smc.from_dynamax(Gaussian(), None, jnp.zeros((3, 1)), inputs=jnp.zeros((2, 1)))
    with pytest.raises(TypeError, match="observed must be booleans"):
        smc.from_dynamax(Gaussian(), None, jnp.zeros((3, 1)), observed=jnp.ones(3))
