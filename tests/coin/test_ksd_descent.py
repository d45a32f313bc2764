"""The descent direction of the kernel Stein discrepancy: double loops, automatic differentiation, tiles, bad input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import kernels, stein
from probinfer.coin.ksd_descent import hessian_products, ksd_direction
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


def found(kernel, x, tile=256):
    fn = target(x.dtype)
    scores = jax.vmap(jax.grad(fn))(x)
    return ksd_direction(kernel, x, scores, lambda x, v: hessian_products(fn, x, v)[1], tile=tile)


@pytest.mark.f32
@pytest.mark.parametrize("tile", [3, 256])
def test_direction_equals_differences_of_the_double_loop(dtype, tile):
    """Central differences are right to 1e-8 of values near 1; float32 to rounding."""
    x = cloud(dtype)
    direction = found(imq(dtype), x, tile)
    assert direction.dtype == x.dtype
    expected = oracle.direction(np.float64(x), skewed_score, SCALE, POWER)
    tolerance = 1e-7 if dtype == jnp.float64 else 1e-4
    np.testing.assert_allclose(direction, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_direction_is_minus_the_gradient_of_the_discrepancy():
    """By automatic differentiation of the whole matrix, for a kernel that has no profile."""
    x, kernel = cloud(jnp.float64, 5), 1.0 * kernels.RBF(1.3, 0.9)

    def discrepancy(x):
        scores = jax.vmap(jax.grad(target(x.dtype)))(x)
        return jnp.mean(stein.stein_gram(kernel, x, scores))

    np.testing.assert_allclose(found(kernel, x, 2), -jax.grad(discrepancy)(x), rtol=1e-9, atol=1e-12)


def test_one_particle_goes_to_the_mode():
    """k_pi(x, x) = |s|² + constant, so the direction is −2 ∇² log p s: Newton's system, whatever the kernel."""
    x = cloud(jnp.float64, 1)
    fn = target(jnp.float64)
    expected = -2 * jax.hessian(fn)(x[0]) @ jax.grad(fn)(x[0])
    np.testing.assert_allclose(found(imq(jnp.float64), x)[0], expected, rtol=1e-10)


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
    with pytest.raises(ValueError, match="one Hessian product a particle"):
        ksd_direction(imq(jnp.float64), x, x, lambda x, v: v[:2])
    with pytest.raises(TypeError, match="floating point"):
        ksd_direction(imq(jnp.float64), x, jnp.ones(x.shape, int), _times)
