"""KSD descent and LAWGD as engines: their posteriors, and what they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest

import probinfer as pi
from probinfer import coin, targets
from probinfer.core.binding import LogDensity
from probinfer.core.status import Status

MEAN, SD = 300.0, 0.02


def log_mixture(mean, sd, position):
    """Three quarters of the mass left, one quarter six standard deviations to the right."""
    z = (position["x"] - mean) / sd
    return jnp.logaddexp(jnp.log(3.0) - 0.5 * z**2, -0.5 * (z - 6.0) ** 2)


def log_normal(scale, position):
    return -0.5 * jnp.sum((position["x"] / scale) ** 2)


def mixture(dtype=float):
    fn = LogDensity(log_mixture, jnp.asarray(MEAN, dtype), jnp.asarray(SD, dtype))
    return targets.from_logdensity(fn, {"x": jnp.zeros((), dtype)})


def normal(scale):
    return targets.from_logdensity(LogDensity(log_normal, jnp.asarray(scale)), {"x": jnp.zeros(len(scale))})


@pytest.mark.slow
@pytest.mark.f32
def test_lawgd_divides_the_particles_among_the_modes_in_proportion(key, dtype):
    """From a start of U(-2, 2), 15 000 standard deviations away; a quarter of 40 particles, to one."""
    posterior = pi.infer(key, mixture(dtype), coin.LAWGD(num_particles=40), progress=False)
    assert int(posterior.info.status) == Status.OK
    assert posterior.draws["x"].shape == (1, 40)
    assert posterior.draws["x"].dtype == dtype
    z = (np.asarray(posterior.draws["x"], float) - MEAN) / SD
    assert abs(np.sum(z > 3) - 10) <= 1
    np.testing.assert_allclose(np.std(z[z < 3]), 1, atol=0.1)


@pytest.mark.slow
def test_ksd_descent_finds_the_moments_of_a_normal(key):
    scale = np.array([0.1, 10.0])
    posterior = pi.infer(key, normal(scale), coin.KSDDescent(num_particles=30), progress=False)
    assert int(posterior.info.status) == Status.OK
    np.testing.assert_allclose(np.std(posterior.draws["x"][0], axis=0) / scale, 1, atol=0.08)
    np.testing.assert_allclose(np.mean(posterior.draws["x"][0], axis=0) / scale, 0, atol=0.05)


def test_what_the_engines_cannot_do_is_refused(key):
    with pytest.raises(ValueError, match=r"one or two coordinates; got 3: use coin\.svgd"):
        pi.infer(key, normal(np.ones(3)), coin.LAWGD(num_particles=10), progress=False)
    with pytest.raises(ValueError, match="enough for 150 particles; got 151"):
        pi.infer(key, normal(np.ones(2)), coin.LAWGD(num_particles=151), progress=False)
    with pytest.raises(ValueError, match="num_particles"):
        coin.LAWGD(num_particles=1)
    with pytest.raises(TypeError, match="num_particles"):
        coin.KSDDescent(num_particles=2.5)
    rows = jnp.ones(10)
    noisy = targets.minibatch(lambda x: -(x**2), lambda x, y: -((x - y) ** 2), rows, 5, example=jnp.zeros(()))
    with pytest.raises(TypeError, match="minibatches"):
        pi.infer(key, noisy, coin.LAWGD(), progress=False)
