"""Mixtures of normals against scipy, point by point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, stats

from probinfer.gp.prediction import NormalMixture

MEANS = np.array([[0.0, -3.0, 1e3], [4.0, -3.0, 1e3 + 1], [0.5, 2.0, 1e3 - 2]])
VARIANCES = np.array([[1.0, 1e-6, 4.0], [0.01, 1e-6, 4.0], [9.0, 1.0, 0.25]])


def mixture(dtype):
    return NormalMixture(jnp.asarray(MEANS, dtype), jnp.asarray(VARIANCES, dtype))


def components(m):
    return [stats.norm(mean, np.sqrt(variance)) for mean, variance in zip(MEANS[:, m], VARIANCES[:, m])]


@pytest.mark.f32
def test_log_prob_is_the_log_of_the_mean(dtype):
    y = np.array([1.0, -3.0005, 1e3 + 0.5])
    wanted = [np.log(np.mean([c.pdf(y[m]) for c in components(m)])) for m in range(3)]
    got = mixture(dtype).log_prob(jnp.asarray(y, dtype))
    np.testing.assert_allclose(got, wanted, rtol=1e-12 if dtype == jnp.float64 else 1e-2)
    assert np.all(np.isfinite(mixture(dtype).log_prob(jnp.full(3, 300.0, dtype))))  # far tail: no underflow


def test_moments_by_integration(dtype):
    density = lambda y: np.mean([c.pdf(y) for c in components(0)])  # noqa: E731
    points = [0.0, 0.5, 4.0]
    mean = integrate.quad(lambda y: y * density(y), -40, 40, points=points, limit=400)[0]
    variance = integrate.quad(lambda y: (y - mean) ** 2 * density(y), -40, 40, points=points, limit=400)[0]
    np.testing.assert_allclose(mixture(dtype).mean[0], mean, rtol=1e-7)
    np.testing.assert_allclose(mixture(dtype).variance[0], variance, rtol=1e-7)


@pytest.mark.f32
@pytest.mark.parametrize("q", [1e-4, 0.05, 0.5, 0.999])
def test_quantiles_invert_the_distribution_function(q, dtype):
    got = mixture(dtype).quantile(q)
    for m in range(3):
        cdf = lambda y, m=m: np.mean([c.cdf(y) for c in components(m)]) - q  # noqa: E731
        ends = [c.ppf(q) for c in components(m)]
        wanted = optimize.brentq(cdf, min(ends) - 1e-9, max(ends) + 1e-9, xtol=1e-13)
        np.testing.assert_allclose(got[m], wanted, rtol=1e-9 if dtype == jnp.float64 else 2e-4, atol=1e-6)


def test_quantiles_of_one_component_are_exact(dtype):
    one = NormalMixture(jnp.asarray(MEANS[:1]), jnp.asarray(VARIANCES[:1]))
    levels = jnp.asarray([0.025, 0.975])
    np.testing.assert_allclose(
        one.quantile(levels),
        stats.norm(MEANS[0], np.sqrt(VARIANCES[0])).ppf(np.asarray(levels)[:, None]),
        rtol=1e-12,
    )


def test_cdf_and_samples_agree(key):
    """Kolmogorov-Smirnov of 4000 draws per point; three tests at 1e-4 each: false-fail rate 3e-4 (the key is fixed)."""
    draws = np.asarray(mixture(jnp.float64).sample(key, 4000))
    for m in range(3):
        cdf = lambda y, m=m: np.mean([c.cdf(y) for c in components(m)], axis=0)  # noqa: E731
        assert stats.kstest(draws[:, m], cdf).pvalue > 1e-4


def test_affine_changes_units(dtype):
    y = jnp.asarray([1.0, -3.0, 1e3])
    moved = mixture(dtype).affine(2.0, 3.0)
    np.testing.assert_allclose(moved.log_prob(2 + 3 * y), mixture(dtype).log_prob(y) - np.log(3), rtol=1e-9)


def test_jit_and_bad_levels(dtype):
    np.testing.assert_allclose(
        jax.jit(lambda m, q: m.quantile(q))(mixture(dtype), 0.3), mixture(dtype).quantile(0.3), rtol=1e-12
    )
    for q in (0.0, 1.0, -0.1, [0.5, 1.5], np.nan):
        with pytest.raises(ValueError, match="0 < q < 1"):
            mixture(dtype).quantile(q)
