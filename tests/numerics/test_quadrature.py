"""Quadrature against moments, closed forms and SciPy's adaptive integrals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from probinfer.numerics.quadrature import expectation, gauss_hermite, log_expectation, resolving_nodes


def test_moments_of_the_standard_normal_are_exact_up_to_twice_the_order():
    nodes, log_weights = gauss_hermite(7)
    for power in range(14):
        exact = 0.0 if power % 2 else float(np.prod(np.arange(1, power, 2)))
        np.testing.assert_allclose(np.sum(np.exp(log_weights) * nodes**power), exact, rtol=1e-12, atol=1e-9)


@pytest.mark.f32
def test_expectation_of_an_exponential_over_a_batch_shape(dtype):
    mean = jnp.asarray([[0.3, -1.0], [2.0, 0.0]], dtype)
    variance = jnp.asarray([[0.1, 1.0], [0.5, 2.0]], dtype)
    value = expectation(jnp.exp, mean, variance, order=40)
    assert value.dtype == dtype
    assert value.shape == mean.shape
    rtol = 1e-12 if dtype == jnp.float64 else 1e-5
    np.testing.assert_allclose(value, np.exp(mean + variance / 2), rtol=rtol)


def test_expectation_matches_adaptive_integration_and_so_do_its_derivatives():
    def fn(x):
        return jnp.tanh(x) ** 2 + jnp.sin(x)

    mean, variance = jnp.asarray(0.7), jnp.asarray(0.4)
    density = stats.norm(0.7, np.sqrt(0.4)).pdf
    exact = integrate.quad(lambda x: (np.tanh(x) ** 2 + np.sin(x)) * density(x), -10, 10)[0]
    np.testing.assert_allclose(expectation(fn, mean, variance), exact, rtol=1e-9)
    # Bonnet and Price: d/dm E f = E f', d/dv E f = E f'' / 2
    by_mean, by_variance = jax.grad(lambda m, v: expectation(fn, m, v), (0, 1))(mean, variance)
    slope, curvature = jax.vmap(jax.grad(fn)), jax.vmap(jax.grad(jax.grad(fn)))
    np.testing.assert_allclose(by_mean, expectation(slope, mean, variance), rtol=1e-8)
    np.testing.assert_allclose(by_variance, 0.5 * expectation(curvature, mean, variance), rtol=1e-6)


@pytest.mark.f32
def test_log_expectation_survives_where_the_expectation_underflows(dtype):
    mean, variance = jnp.asarray([-1.0, 2.0], dtype), jnp.asarray([0.5, 1.5], dtype)
    value = log_expectation(lambda x: 3.0 * x - 5000.0, mean, variance, order=64)
    assert value.dtype == dtype
    np.testing.assert_allclose(
        value, 3 * mean + 4.5 * variance - 5000, rtol=1e-12 if dtype == jnp.float64 else 1e-6
    )


def test_log_expectation_accepts_minus_infinity():
    value = log_expectation(lambda x: jnp.where(x > 0, 0.0, -jnp.inf), jnp.zeros(()), jnp.ones(()), order=32)
    np.testing.assert_allclose(value, np.log(0.5), rtol=1e-12)


@pytest.mark.parametrize("order", [0, -3, 1000])
def test_bad_orders_are_refused(order):
    with pytest.raises(ValueError, match="order must be"):
        expectation(jnp.exp, jnp.zeros(()), jnp.ones(()), order=order)


@pytest.mark.f32
def test_resolving_nodes_keep_a_kink_of_unit_width_in_a_wide_normal(dtype):
    """log(1 + exp f): six digits where Gauss-Hermite of the same order has two; f = 1e4 +- 1e-3 as well."""
    mean = jnp.asarray([0.0, 30.0, -60.0, 5.0, 1e4], dtype)
    stddev = jnp.asarray([30.0, 10.0, 20.0, 0.1, 1e-3], dtype)
    z, log_weights = jax.jit(resolving_nodes, static_argnums=4)(
        mean, stddev, jnp.full_like(mean, 1.0), jnp.full_like(mean, 7.0), 64
    )
    assert z.dtype == log_weights.dtype == dtype
    np.testing.assert_allclose(np.exp(log_weights).sum(0), 1.0, rtol=1e-6)
    got = jnp.sum(jnp.exp(log_weights) * jnp.logaddexp(mean + stddev * z - 1.0, 0.0), 0)
    hermite = expectation(lambda f: jnp.logaddexp(f - 1.0, 0.0), mean, stddev**2, order=64)
    for i, (m, s) in enumerate(zip(np.asarray(mean, float), np.asarray(stddev, float), strict=True)):
        grid = np.linspace(-12, 12, 400_001)
        wanted = np.trapezoid(np.logaddexp(m + s * grid - 1.0, 0.0) * stats.norm.pdf(grid), grid)
        np.testing.assert_allclose(got[i], wanted, rtol=1e-7 if dtype == jnp.float64 else 3e-6)
        if i == 0:
            assert abs(float(hermite[i]) / wanted - 1) > 1e-4


def test_resolving_nodes_are_even_where_nothing_bends():
    z, _ = resolving_nodes(jnp.zeros(1), jnp.full(1, 0.01), jnp.zeros(1), jnp.ones(1), 9, 6.0)
    np.testing.assert_allclose(z[:, 0], np.linspace(-6, 6, 9), atol=1e-2)
