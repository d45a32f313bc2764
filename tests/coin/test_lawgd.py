"""LAWGD's direction: exact spectra of normal densities, dense matrices, places off the grid, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.coin import lawgd_spectrum
from probinfer.coin.lawgd import evaluate_spectrum, lawgd_direction
from probinfer.coin.lawgd_spectrum import decompose, find_spectrum
from probinfer.errors import NumericalError
from tests.reference import lawgd as oracle

MEAN, SD = 3.0, 0.02


def normal(x):
    return -0.5 * jnp.sum(((x - MEAN) / SD) ** 2)


def unequal(x):
    return -0.5 * ((x[0] - MEAN) / SD) ** 2 - 0.5 * (x[1] - MEAN) ** 2


def banana(x):
    return -0.5 * (x[0] ** 2 + ((x[1] - x[0] ** 2) / 0.3) ** 2)


def cloud(dtype, n=9, d=1):
    return jnp.asarray(MEAN + SD * (0.5 + 0.8 * np.random.default_rng(0).normal(size=(n, d))), dtype)


def test_functions_of_a_normal_density_are_hermite_polynomials():
    """Second order in the spacing, 0.012 sd: the fifth function to 1e-3 where 99 % of the mass is."""
    x = cloud(jnp.float64)
    spectrum = find_spectrum(normal, x, 5)
    np.testing.assert_allclose([spectrum.centre[0], spectrum.scale[0]], [MEAN, SD], rtol=1e-6)
    np.testing.assert_allclose(spectrum.rates, np.arange(1, 6), rtol=1e-3)
    values, slopes, known = evaluate_spectrum(spectrum, x)
    exact, derivatives = oracle.hermite(5, (np.asarray(x)[:, 0] - MEAN) / SD)
    signs = np.sign(np.sum(np.asarray(values).T * exact, axis=1))[:, None]
    assert known.all()
    np.testing.assert_allclose(values.T, signs * exact, atol=2e-3)
    np.testing.assert_allclose(slopes[:, :, 0].T, signs * derivatives, atol=1e-2)


@pytest.mark.f32
def test_direction_equals_the_double_loop(dtype):
    """With the exact functions; found from a start 1e5 standard deviations away and a thousand times as wide."""
    x = cloud(dtype)
    away = jnp.asarray(np.linspace(-2000, -1000, 5)[:, None], dtype)
    spectrum = find_spectrum(normal, away, 4)
    found = lawgd_direction(spectrum, x, jax.vmap(jax.grad(normal))(x))
    assert found.dtype == x.dtype
    values, slopes = oracle.hermite(4, (np.float64(x)[:, 0] - MEAN) / SD)
    expected = SD * oracle.direction(values, slopes, np.arange(1, 5))
    np.testing.assert_allclose(found[:, 0], expected, atol=3e-3 * SD)


@pytest.mark.parametrize("shape", [(40,), (7, 6)])
def test_spectrum_equals_that_of_the_dense_matrix(shape):
    """L phi = rate phi node by node, mean zero and unit variance, for a lopsided density in one and two dimensions."""
    grid = np.stack(np.meshgrid(*[np.linspace(-2, 2, n) for n in shape], indexing="ij"))
    log_density = -0.5 * np.sum(grid**2, axis=0) * (1 + 0.3 * grid[0]) + 0.5 * grid[-1]
    spacing = np.array([4 / (n - 1) for n in shape])
    rows, rates, functions = decompose(log_density, spacing, 3)
    np.testing.assert_array_equal(rows.ravel(), np.arange(log_density.size))
    L = oracle.generator(log_density, spacing)
    np.testing.assert_allclose(L @ functions, functions * rates, atol=1e-9)
    np.testing.assert_allclose(rates, np.sort(np.linalg.eigvals(L).real)[1:4], rtol=1e-9)
    p = np.exp(log_density.ravel()) / np.exp(log_density).sum()
    np.testing.assert_allclose(p @ functions, 0, atol=1e-10)
    np.testing.assert_allclose((functions * p[:, None]).T @ functions, np.eye(3), atol=1e-9)


def test_direction_in_two_dimensions_equals_the_double_loop(monkeypatch):
    """Unequal scales; the five products of Hermite polynomials up to degree two, whose rates are 1, 1, 2, 2, 2.

    The spacing is 0.25 sd: second order, 1 % of values near one.
    """
    monkeypatch.setitem(lawgd_spectrum.POINTS, 2, 48)
    scale = np.array([SD, 1.0])
    w = np.random.default_rng(1).normal(size=(7, 2)) + np.array([0.5, 0])
    x = jnp.asarray(MEAN + scale * w)
    spectrum = find_spectrum(unequal, x, 5)
    np.testing.assert_allclose(spectrum.rates, [1, 1, 2, 2, 2], rtol=0.03)
    (one, two), (first, second) = (oracle.hermite(2, w[:, d])[0] for d in (0, 1))
    slopes = [oracle.hermite(2, w[:, d])[1] for d in (0, 1)]
    values, zero, rates = np.array([one, first, two, second, one * first]), 0 * one, [1, 1, 2, 2, 2]
    along = [slopes[0][0], zero, slopes[0][1], zero, slopes[0][0] * first]
    across = [zero, slopes[1][0], zero, slopes[1][1], one * slopes[1][0]]
    expected = np.stack([oracle.direction(values, np.array(d), rates) for d in (along, across)], axis=1)
    np.testing.assert_allclose(lawgd_direction(spectrum, x, x) / scale, expected, atol=0.03)


def test_a_thin_curved_density_gets_a_grid_as_fine_as_it_needs(monkeypatch):
    """The share of the box that the mass fills is small; the moments are those of the construction, y - x^2 and x."""
    monkeypatch.setitem(lawgd_spectrum.POINTS, 2, 48)
    spectrum = find_spectrum(banana, jnp.asarray(np.random.default_rng(0).normal(size=(9, 2))), 4)
    size = spectrum.values.shape[0] - 1
    assert int(spectrum.rows.max()) == size
    assert size > 0.8 * 48**2
    np.testing.assert_allclose(spectrum.centre, [0, 1], atol=1e-4)
    np.testing.assert_allclose(spectrum.scale, [1, np.sqrt(2 + 0.3**2)], rtol=1e-3)
    assert spectrum.rates[0] < 0.3  # along the arms, slower than any direction of a normal density


def test_particles_off_the_grid_follow_the_score():
    x = cloud(jnp.float64, 5).at[0].set(MEAN - 50 * SD)
    spectrum = find_spectrum(normal, cloud(jnp.float64), 4)
    scores = jax.vmap(jax.grad(normal))(x)
    found = lawgd_direction(spectrum, x, scores)
    np.testing.assert_allclose(
        found[0, 0], SD, rtol=1e-6
    )  # one standard deviation in a unit of time, to the right
    values, slopes = oracle.hermite(4, (np.asarray(x)[1:, 0] - MEAN) / SD)
    expected = SD * oracle.direction(values, slopes, np.arange(1, 5))
    np.testing.assert_allclose(found[1:, 0], expected, atol=3e-3 * SD)


def test_new_particles_trace_nothing(count_compiles):
    spectrum, direction = find_spectrum(normal, cloud(jnp.float64), 4), jax.jit(lawgd_direction)
    x = cloud(jnp.float64)
    other = jax.block_until_ready((x + SD, direction(spectrum, x, x)))[0]
    with count_compiles() as counter:
        jax.block_until_ready(direction(spectrum, other, x))
    assert counter.count == 0


def flat(x):
    return 0.0 * x[0]


def undefined(x):
    return jnp.log(x[0] - MEAN)


def cauchy(x):
    return -jnp.log1p(((x[0] - MEAN) / SD) ** 2)


@pytest.mark.parametrize(
    ("fn", "words"), [(flat, "normalisable"), (undefined, "NaN"), (cauchy, "tails are too heavy")]
)
def test_densities_that_no_grid_can_hold_are_refused(fn, words):
    with pytest.raises(NumericalError, match=words):
        find_spectrum(fn, cloud(jnp.float64), 4)
