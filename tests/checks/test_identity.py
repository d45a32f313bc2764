"""Stein identities: exact moments of a Gaussian, size, collapse and location."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from probinfer.checks import stein_identity
from probinfer.checks.discrepancy.stein_identities import skewed_pvalue
from probinfer.core.binding import LogDensity

MEAN, SD = np.array([1.0, -3.0, 20.0]), np.array([0.5, 2.0, 9.0])


def log_normal(mean, sd, x):
    return -0.5 * jnp.sum(((x - mean) / sd) ** 2)


TARGET = LogDensity(log_normal, jnp.asarray(MEAN), jnp.asarray(SD))


def normal(seed, n=400):
    return np.random.default_rng(seed).normal(size=(n, 3))


def test_numbers_are_the_moments():
    x = MEAN + SD * normal(3)
    report = stein_identity(jnp.asarray(x), TARGET)
    np.testing.assert_allclose(report.location, -(x - MEAN).mean(0) / SD**2 * x.std(0), rtol=1e-9)
    np.testing.assert_allclose(report.spread, x.var(0) / SD**2, rtol=1e-9)
    products = -(x - x.mean(0)) * -(x - MEAN) / SD**2
    np.testing.assert_allclose(report.spread_error, products.std(0, ddof=1) / 20, rtol=1e-9)
    assert report.verdict.startswith("no fault seen")  # at rate .95
    assert report.plot().get_xlabel() == "coordinate"


def test_size():
    """Bonferroni over 6: of 100 true sets more than 15 are rejected at rate 3e-5."""
    pvalues = [stein_identity(jnp.asarray(MEAN + SD * normal(s)), TARGET).pvalue for s in range(100)]
    assert np.mean(np.asarray(pvalues) <= 0.05) <= 0.15


@pytest.mark.parametrize(
    ("scale", "shift", "text"),
    [
        (0.7, 0.0, "coordinate 1 is collapsed"),
        (1.5, 0.0, "coordinate 1 is too wide"),
        (1.0, 0.5, "coordinate 1 is in the"),
    ],
)
def test_faults_of_one_coordinate_are_named(scale, shift, text):
    """z is about 8 or more, so a miss has a rate below 1e-5."""
    x = normal(1) * [1, scale, 1] + [0, shift, 0]
    report = stein_identity(jnp.asarray(MEAN + SD * x), TARGET)
    assert text in report.verdict
    assert report.pvalue < 1e-3


def test_chains_have_wider_errors():
    """Each draw four times in a row: errors twice as wide, to the noise of the ESS."""
    x = jnp.asarray(MEAN + SD * normal(2))
    once = stein_identity(x, TARGET)
    repeated = stein_identity(jnp.repeat(x, 4, axis=0).reshape(4, 400, 3), TARGET)
    ratio = repeated.location_error / (once.location_error / 2)
    assert np.all((ratio > 1.5) & (ratio < 2.6))


@pytest.mark.f32
def test_float32(dtype):
    x = jnp.asarray(MEAN + SD * normal(0), dtype)
    report = stein_identity(x, LogDensity(log_normal, jnp.asarray(MEAN, dtype), jnp.asarray(SD, dtype)))
    assert report.location.dtype == dtype
    np.testing.assert_allclose(report.spread, np.asarray(x).var(0) / SD**2, rtol=1e-3)


def test_bad_inputs_are_refused():
    x = jnp.asarray(MEAN + SD * normal(0))
    with pytest.raises(ValueError, match="zero at every draw"):
        stein_identity(x, lambda u: jnp.zeros(()))
    with pytest.raises(ValueError, match="a verdict needs"):
        stein_identity(x[:10], TARGET)


def test_pvalues_of_skewed_quantities_keep_their_level():
    """Means of 60 squares of normals at the level .01; the share of 40 000 has an error of .0005 to .0009."""
    values = np.random.default_rng(3).normal(size=(40_000, 60)) ** 2
    z = (values.mean(1) - 1) / values.std(1, ddof=1) * np.sqrt(60)
    skewness = stats.skew(values, axis=1)
    sizes = np.full(len(z), 60.0)
    plain = np.mean(2 * stats.t.sf(np.abs(z), 59) <= 0.01)
    corrected = np.mean(skewed_pvalue(z, skewness, sizes) <= 0.01)
    assert plain > 0.025
    assert corrected < 0.0135
    no_skewness = skewed_pvalue(z, np.zeros_like(z), sizes)
    np.testing.assert_allclose(no_skewness, 2 * stats.t.sf(np.abs(z), 59), rtol=1e-12)
