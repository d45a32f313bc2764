"""LAWGD's direction: exact spectra of normal densities, dense matrices, places off the grid, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from probinfer.coin.laplacian import spectrum as lawgd_spectrum
from probinfer.coin.laplacian.direction import evaluate_spectrum, lawgd, lawgd_direction
from probinfer.coin.laplacian.spectrum import decompose, find_spectrum
from probinfer.core.binding import StochasticLogDensity
from probinfer.core.errors import NumericalError
from probinfer.running.driver import record_nothing, run
from tests.reference import lawgd as oracle

MEAN, SD = 3.0, 0.02


@pytest.fixture
def deep(monkeypatch):
    """Grids to six standard deviations, coarse in two dimensions: Hermite polynomials live on the whole line."""
    monkeypatch.setattr(lawgd_spectrum, "DEPTH", 18.0)
    monkeypatch.setitem(lawgd_spectrum.POINTS, 2, 48)


def normal(x):
    return -0.5 * jnp.sum(((x - MEAN) / SD) ** 2)


def of_dict(position):
    return normal(position["x"])


def unequal(x):
    return -0.5 * ((x[0] - MEAN) / SD) ** 2 - 0.5 * (x[1] - MEAN) ** 2


def banana(x):
    return -0.5 * (x[0] ** 2 + ((x[1] - x[0] ** 2) / 0.3) ** 2)


def cloud(dtype, n=9, d=1):
    return jnp.asarray(MEAN + SD * (0.5 + 0.8 * np.random.default_rng(0).normal(size=(n, d))), dtype)


def test_functions_of_a_normal_density_are_hermite_polynomials(deep):
    """Second order in the spacing, 0.012 sd: the fifth function to 1e-3 where 99 % of the mass is."""
    x = cloud(jnp.float64)
    spectrum = find_spectrum(normal, x, 5)
    np.testing.assert_allclose([spectrum.center[0], spectrum.scale[0]], [MEAN, SD], rtol=1e-6)
    np.testing.assert_allclose(spectrum.rates, np.arange(1, 6), rtol=1e-3)
    values, slopes, known = evaluate_spectrum(spectrum, x)
    exact, derivatives = oracle.hermite(5, (np.asarray(x)[:, 0] - MEAN) / SD)
    signs = np.sign(np.sum(np.asarray(values).T * exact, axis=1))[:, None]
    assert known.all()
    np.testing.assert_allclose(values.T, signs * exact, atol=2e-3)
    np.testing.assert_allclose(slopes[:, :, 0].T, signs * derivatives, atol=1e-2)


@pytest.mark.f32
def test_direction_equals_the_double_loop(deep, dtype):
    """With the exact functions; found from a start 1e5 standard deviations away and a thousand times as wide."""
    x = cloud(dtype)
    away = jnp.asarray(np.linspace(-2000, -1000, 5)[:, None], dtype)
    spectrum = find_spectrum(normal, away, 4)
    direction = lawgd_direction(spectrum, x)
    assert direction.dtype == x.dtype
    values, slopes = oracle.hermite(4, (np.float64(x)[:, 0] - MEAN) / SD)
    expected = SD * oracle.direction(values, slopes, np.arange(1, 5))
    np.testing.assert_allclose(direction[:, 0], expected, atol=3e-3 * SD)


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


def test_direction_in_two_dimensions_equals_the_double_loop(deep):
    """Unequal scales; the five products of Hermite polynomials up to degree two, whose rates are 1, 1, 2, 2, 2.

    The spacing is 0.25 sd: second order, 1 % of values near one.
    """
    scale = np.array([SD, 1.0])
    w = np.random.default_rng(1).normal(size=(7, 2)) + np.array([0.5, 0])
    x = jnp.asarray(MEAN + scale * w)
    spectrum = find_spectrum(unequal, x, 5)
    np.testing.assert_allclose(spectrum.rates, [1, 1, 2, 2, 2], rtol=0.03)
    (one, two), (first, second) = (oracle.hermite(2, w[:, d])[0] for d in (0, 1))
    slopes = [oracle.hermite(2, w[:, d])[1] for d in (0, 1)]
    values, zeros, rates = np.array([one, first, two, second, one * first]), 0 * one, [1, 1, 2, 2, 2]
    along = [slopes[0][0], zeros, slopes[0][1], zeros, slopes[0][0] * first]
    across = [zeros, slopes[1][0], zeros, slopes[1][1], one * slopes[1][0]]
    expected = np.stack([oracle.direction(values, np.array(d), rates) for d in (along, across)], axis=1)
    np.testing.assert_allclose(lawgd_direction(spectrum, x) / scale, expected, atol=0.03)


def test_a_thin_curved_density_gets_a_grid_as_fine_as_it_needs(deep):
    """The share of the box that the mass fills is small; the moments are those of the construction, y - x^2 and x."""
    spectrum = find_spectrum(banana, jnp.asarray(np.random.default_rng(0).normal(size=(9, 2))), 4)
    size = spectrum.values.shape[0] - 1
    assert int(spectrum.rows.max()) == size
    assert size > 0.8 * 48**2
    np.testing.assert_allclose(spectrum.center, [0, 1], atol=1e-4)
    np.testing.assert_allclose(spectrum.scale, [1, np.sqrt(2 + 0.3**2)], rtol=1e-3)
    assert spectrum.rates[0] < 0.3  # along the arms, slower than any direction of a normal density


def test_particles_off_the_grid_go_straight_to_it_and_are_not_counted(deep):
    """The grid ends at six standard deviations, and the places to go to two points before."""
    x = cloud(jnp.float64, 5).at[0].set(MEAN - 50 * SD)
    spectrum = find_spectrum(normal, cloud(jnp.float64), 4)
    direction = lawgd_direction(spectrum, x, jnp.arange(5) < 4)
    np.testing.assert_allclose(direction[0, 0], (50 - 6) * SD, rtol=2e-3)
    values, slopes = oracle.hermite(4, (np.asarray(x)[1:4, 0] - MEAN) / SD)
    expected = SD * oracle.direction(values, slopes, np.arange(1, 5))
    np.testing.assert_allclose(direction[1:4, 0], expected, atol=3e-3 * SD)
    assert np.isnan(direction[4, 0])


def test_particles_end_at_the_quantiles_of_the_density(count_compiles):
    """In one dimension rest means F(x_(i)) = (i - 1/2) / N; 100 functions blur that to 0.1 standard deviations."""
    x = cloud(jnp.float64, 12)
    algorithm = lawgd(of_dict, {"x": x})
    start = algorithm.init({"x": x})
    state, history = run(jax.random.key(0), algorithm, start, 300, collect=record_nothing)
    history.check()
    quantiles = norm.ppf((np.arange(12) + 0.5) / 12)
    np.testing.assert_allclose(np.sort(state.positions["x"][:, 0]), MEAN + SD * quantiles, atol=0.1 * SD)
    restarted = jax.block_until_ready(algorithm.init({"x": x - 0.1 * SD}))
    with count_compiles() as counter:
        jax.block_until_ready(run(jax.random.key(1), algorithm, restarted, 300, collect=record_nothing))
    assert counter.count == 0


def flat(x):
    return 0.0 * x[0]


def undefined(x):
    return jnp.log(x[0] - MEAN)


def heavy(x):
    return -0.6 * jnp.log1p(((x[0] - MEAN) / SD) ** 2)


@pytest.mark.parametrize(
    ("fn", "message"), [(flat, "normalizable"), (undefined, "NaN"), (heavy, "tails are too heavy")]
)
def test_densities_that_no_grid_can_hold_are_refused(fn, message):
    with pytest.raises(NumericalError, match=message):
        find_spectrum(fn, cloud(jnp.float64), 4)


def test_what_the_algorithm_cannot_do_is_refused_with_advice():
    x = cloud(jnp.float64)
    with pytest.raises(ValueError, match=r"one or two coordinates; got 3: use coin\.svgd"):
        lawgd(normal, jnp.concatenate([x, x, x], axis=1))
    with pytest.raises(ValueError, match="enough for 450 particles; got 451"):
        lawgd(normal, jnp.linspace(0.0, 1.0, 451)[:, None])
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda x: lawgd(normal, x).init(x))(x)
    with pytest.raises(TypeError, match="minibatches"):
        lawgd(StochasticLogDensity(lambda key, x: normal(x)), x)
    with pytest.raises(TypeError, match="function of one position"):
        lawgd(3.0, x)
    with pytest.raises(TypeError, match="floating point"):
        lawgd(normal, jnp.ones((4, 1), int))
    with pytest.raises(TypeError, match="bet"):
        lawgd(normal, x, bet="coin")
    with pytest.raises(ValueError, match="0 of 9 particles start"):
        lawgd(normal, x).init(x + 100 * SD)
