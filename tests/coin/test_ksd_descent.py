"""The descent direction of the kernel Stein discrepancy: double loops, automatic differentiation, tiles, bad input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from probinfer import coin, kernels
from probinfer.coin.discrepancy_descent import hessian_products, ksd_direction
from probinfer.core.binding import LogDensity
from probinfer.numerics import stein
from probinfer.running.driver import record_nothing, run
from tests.reference import ksd_descent as oracle

SCALE, POWER = np.array([0.7, 2.0]), 0.5
MEAN, PRECISION = np.array([1.0, -2.0]), np.array([[2.0, 0.3], [0.3, 0.2]])


def skewed(mean, precision, x):
    """Not Gaussian, and of two scales: the Hessian changes from place to place."""
    c = x - mean
    return -0.5 * c @ precision @ c - 0.1 * c[0] ** 4 + 0.2 * jnp.sin(c[1])


def skewed_score(x):
    c = x - MEAN
    return -PRECISION @ c + np.array([-0.4 * c[0] ** 3, 0.2 * np.cos(c[1])])


def target(dtype):
    return partial(skewed, jnp.asarray(MEAN, dtype), jnp.asarray(PRECISION, dtype))


def imq(dtype):
    return kernels.InverseMultiquadric(1.0, jnp.asarray(SCALE, dtype), jnp.asarray(POWER, dtype))


def cloud(dtype, n=7):
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, 2)) * [1, 3] + 0.5, dtype)


def direction(kernel, x):
    fn = target(x.dtype)
    scores = jax.vmap(jax.grad(fn))(x)
    return ksd_direction(kernel, x, scores, partial(_curvature, fn))


@pytest.mark.f32
def test_direction_equals_differences_of_the_double_loop(dtype):
    """Central differences are right to 1e-8 of values near 1; float32 to rounding."""
    x = cloud(dtype)
    actual = direction(imq(dtype), x)
    assert actual.dtype == x.dtype
    expected = oracle.direction(np.float64(x), skewed_score, SCALE, POWER)
    tolerance = 1e-7 if dtype == jnp.float64 else 1e-4
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_direction_is_minus_the_gradient_of_the_discrepancy():
    """By automatic differentiation of the mean of the whole matrix."""
    x, kernel = cloud(jnp.float64), imq(jnp.float64)

    def discrepancy(x):
        scores = jax.vmap(jax.grad(target(x.dtype)))(x)
        return jnp.mean(stein.stein_gram(kernel, x, scores))

    np.testing.assert_allclose(
        direction(kernel, x), -jax.jit(jax.grad(discrepancy))(x), rtol=1e-9, atol=1e-12
    )


def test_one_particle_goes_to_the_mode():
    """k_pi(x, x) = |s|² + constant, so the direction is −2 ∇² log p s: Newton's system, whatever the kernel."""
    x, fn = cloud(jnp.float64), target(jnp.float64)
    scores = jax.vmap(jax.grad(fn))(x)
    alone = jnp.arange(7) == 3
    expected = -2 * hessian_products(fn, x, scores)[1][3]
    actual = ksd_direction(imq(jnp.float64), x, scores, partial(_curvature, fn), alone)
    np.testing.assert_allclose(actual[3], expected, rtol=1e-10)


def test_particles_that_are_not_kept_are_as_if_they_were_not_there():
    """Visited in tiles of three, the last with two particles that pad it."""
    x, fn = cloud(jnp.float64), target(jnp.float64)
    scores = jax.vmap(jax.grad(fn))(x).at[2].set(jnp.nan)
    mask = jnp.arange(7) != 2
    actual = ksd_direction(imq(jnp.float64), x, scores, partial(_curvature, fn), mask, tile=3)
    assert np.isnan(actual[2]).all()
    expected = oracle.direction(np.asarray(x[mask]), skewed_score, SCALE, POWER)
    np.testing.assert_allclose(actual[mask], expected, rtol=1e-7, atol=1e-7)


def _curvature(fn, x, v):
    return hessian_products(fn, x, v)[1]


WHOLE = optax.sgd(1.0)


def test_a_step_of_the_algorithm_is_the_direction_in_the_coordinates_of_the_cloud():
    """With a bet of the whole direction, and the scores and Hessian products of the density of z."""
    x, fn, kernel = cloud(jnp.float64), target(jnp.float64), imq(jnp.float64)
    scaled = coin.ksd_descent(fn, kernel, coin.Diagonal(), WHOLE, bandwidth="fixed")
    moved, _ = jax.jit(scaled.step)(jax.random.key(0), scaled.init(x))
    mean, sd = jnp.mean(x, axis=0), jnp.std(x, axis=0)

    def score_in_z(z):
        return sd * skewed_score(np.asarray(mean + sd * z))

    expected = oracle.direction(np.asarray((x - mean) / sd), score_in_z, SCALE, POWER)
    np.testing.assert_allclose((moved.positions - x) / sd, expected, rtol=1e-6, atol=1e-6)


def test_the_discrepancy_falls_without_a_rate(count_compiles):
    """Three hundredths are left after 100 steps from a start of the wrong scales, and other data trace nothing."""
    x, fn = cloud(jnp.float64, 16), LogDensity(skewed, jnp.asarray(MEAN), jnp.asarray(PRECISION))
    algorithm = coin.ksd_descent(fn)
    state, history = run(jax.random.key(0), algorithm, algorithm.init(x), 100, collect=record_nothing)
    history.check()
    left, before = (_discrepancy(fn, y) for y in (state.positions, x))
    assert left < 0.03 * before
    other = coin.ksd_descent(LogDensity(skewed, 2 + jnp.asarray(MEAN), jnp.asarray(PRECISION)))
    begun = jax.block_until_ready(other.init(x))
    with count_compiles() as counter:
        jax.block_until_ready(run(jax.random.key(1), other, begun, 100, collect=record_nothing))
    assert counter.count == 0


def _discrepancy(fn, x):
    return float(jnp.mean(stein.stein_gram(imq(jnp.float64), x, jax.vmap(jax.grad(fn))(x))))


def test_new_data_traces_nothing(count_compiles):
    x, fn, kernel = cloud(jnp.float64), target(jnp.float64), imq(jnp.float64)
    scores = jax.vmap(jax.grad(fn))(x)
    ahead = jax.block_until_ready((x + 1.0, ksd_direction(kernel, x, scores, _times)))[0]
    with count_compiles() as counter:
        jax.block_until_ready(ksd_direction(kernel, ahead, scores, _times))
    assert counter.count == 0


def _times(x, v):
    return v


def test_bad_inputs_are_refused():
    x = cloud(jnp.float64)
    with pytest.raises(ValueError, match="shape of the particles"):
        ksd_direction(imq(jnp.float64), x, x[:3], _times)
    with pytest.raises(ValueError, match="one Hessian product per particle"):
        ksd_direction(imq(jnp.float64), x, x, lambda x, v: v[:2])
    with pytest.raises(TypeError, match="floating point"):
        ksd_direction(imq(jnp.float64), x, jnp.ones(x.shape, int), _times)
    with pytest.raises(TypeError, match="function of one position"):
        coin.ksd_descent(3.0)
    with pytest.raises(ValueError, match="bandwidth must be one of"):
        coin.ksd_descent(target(jnp.float64), bandwidth="mean")
    with pytest.raises(TypeError, match="has none"):
        coin.ksd_descent(target(jnp.float64), 1.0 * kernels.RBF())
    with pytest.raises(ValueError, match="identical"):
        coin.ksd_descent(target(jnp.float64)).init(jnp.ones((4, 2)))
