"""Kernels of few coordinates against loops, the width they keep, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import coin, kernels
from probinfer.coin.cloud import graphical
from tests.reference.coin import direction, quantile_of_pairs

RNG = np.random.default_rng(0)


def test_direction_is_that_of_the_loops_on_each_neighborhood():
    z, s = RNG.normal(size=(2, 9, 3))
    blankets = [(1,), (0, 2), ()]
    expected = np.zeros_like(z)
    for k, others in enumerate(blankets):
        table = z[:, [k, *others]]
        score = np.zeros_like(table)
        score[:, 0] = s[:, k]
        expected[:, k] = direction(table, score, quantile_of_pairs(table, 0.5))[:, 0]
    parts = graphical.neighborhoods(blankets)
    kernel = kernels.RBF(lengthscale=0.5**0.5)
    actual = graphical.graphical_direction(
        *parts, kernel, jnp.asarray(z), jnp.asarray(s), jnp.ones(9, bool), None
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


def log_standard(x):
    return -0.5 * jnp.sum(x**2)


def test_a_cloud_keeps_its_width_in_more_dimensions_than_particles():
    """30 dimensions, 20 particles: one kernel of all coordinates keeps about 0.6."""
    start = jnp.asarray(1 + 0.3 * RNG.normal(size=(20, 30)))
    ratios = []
    for neighbors in ([()] * 30, None):
        algorithm = coin.svgd(log_standard, neighbors=neighbors)
        run = jax.jit(
            lambda state, a=algorithm: jax.lax.fori_loop(0, 200, lambda _, s: a.step(KEY, s)[0], state)
        )
        ratios.append(float(np.mean(np.std(run(algorithm.init(start)).positions, axis=0))))
    assert 0.9 < ratios[0] < 1.1
    assert ratios[1] < 0.8


KEY = jax.random.key(0)


def test_what_cannot_work_is_refused():
    with pytest.raises(TypeError, match="sequence of coordinate numbers"):
        coin.svgd(log_standard, neighbors=3)
    with pytest.raises(ValueError, match="from 0 to 1"):
        coin.svgd(log_standard, neighbors=[(1,), (2,)])
    with pytest.raises(ValueError, match="not mixed"):
        coin.svgd(log_standard, geometry=coin.Full(), neighbors=[(), ()])
    with pytest.raises(TypeError, match="has none"):
        coin.svgd(log_standard, kernels.Linear(), neighbors=[(), ()])
    algorithm = coin.svgd(log_standard, neighbors=[(), ()])
    with pytest.raises(ValueError, match="each of the 3 coordinates"):
        algorithm.step(KEY, algorithm.init(jnp.asarray(RNG.normal(size=(4, 3)))))
