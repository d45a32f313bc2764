"""Annealed importance sampling against closed forms, and the approximate evidences against it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from probinfer import gp
from tests.gp.approximate_cases import jit
from tests.reference import ais, gp_sites
from tests.reference.ep_correction import ep_correction

X = np.array([-1.5, -0.4, 0.3, 1.1, 2.0])[:, None]
GOLDEN = [  # variance, lengthscale, labels, exact log evidence, EP's
    (1.7, 0.9, [-1, -1, 1, -1, 1], -4.2311724145, -4.2304234483),
    (40.0, 1.0, [-1, -1, 1, 1, 1], -2.9902855561, -3.0013931506),
]
NOISE = 0.3
MEAN = np.array([0.3, -0.2, 0.0, 0.5, 0.1])
OUTPUTS = np.array([-1.2, 0.4, 0.5, 1.3, 0.9])
SITES = {"prior": None, "sites": (np.array([-1.0, 0.5, 0.4, 2.0, 0.8]), np.array([2.0, 1.0, 0.0, 3.0, 1.5]))}


def squared_exponential(X, variance, lengthscale):
    return variance * np.exp(-0.5 * np.sum((X[:, None] - X[None]) ** 2, -1) / lengthscale**2)


def probit(sign):
    return lambda f: special.log_ndtr(np.asarray(sign) * f)


@functools.cache
def gaussian_runs(base):
    """Log weights of 6400 runs with a Gaussian likelihood, minus the exact log evidence."""
    K = squared_exponential(X, 1.7, 0.9)
    exact = stats.multivariate_normal(MEAN, K + NOISE * np.eye(5)).logpdf(OUTPUTS)

    def log_density(f):
        return -0.5 * np.log(2 * np.pi * NOISE) - 0.5 * (OUTPUTS - f) ** 2 / NOISE

    rng = np.random.default_rng(20261121)
    ladder = ais.power_ladder(200)
    return ais.annealed(rng, K, MEAN, log_density, ladder, 6400, SITES[base])[0] - exact


@pytest.mark.parametrize("base", SITES)
def test_weights_are_unbiased(base):
    """The mean weight is the evidence; four standard errors: false-fail rate below 1e-4 in the normal limit."""
    ratio = np.exp(gaussian_runs(base))
    error = ratio.std(ddof=1) / np.sqrt(len(ratio))
    assert error < 0.02
    assert abs(ratio.mean() - 1) < 4 * error


@pytest.mark.parametrize("base", SITES)
def test_intervals_cover(base):
    """Of 200 estimates from 32 runs 95 % cover; the limits are four binomial standard errors away (rate 1e-4)."""
    summaries = [ais.summarize(part) for part in gaussian_runs(base).reshape(200, 32)]
    covered = np.mean([abs(e.log_evidence) <= e.half_width for e in summaries])
    assert 0.888 < covered < 1
    # E log(mean w) = -var(w) / 2R to leading order
    expected = -np.exp(gaussian_runs(base)).var() / 64
    errors = np.array([e.log_evidence for e in summaries])
    assert abs(errors.mean() - expected) < 4 * errors.std() / np.sqrt(200)


@pytest.mark.parametrize("variance", [1.7, 400.0])
def test_three_labels_are_an_orthant(variance):
    """With probit the evidence is P(s (f + noise) > 0), for three points a sum of arcsines; four standard errors."""
    sign, x = np.array([1, -1, 1]), X[:3]
    K = squared_exponential(x, variance, 0.9)
    C = (K + np.eye(3)) * np.outer(sign, sign)
    correlation = C / np.sqrt(np.outer(np.diag(C), np.diag(C)))
    exact = np.log(1 / 8 + np.arcsin(correlation[np.triu_indices(3, 1)]).sum() / (4 * np.pi))
    rng = np.random.default_rng(3)
    log_weights, path = ais.annealed(rng, K, np.zeros(3), probit(sign), ais.power_ladder(200), 1000)
    summary = ais.summarize(log_weights, level=1 - 6e-5)
    assert path.shape == (200, 1000)
    assert summary.half_width < 0.15
    assert abs(summary.log_evidence - exact) < summary.half_width


def test_too_few_temperatures_show():
    """Three steps from the prior to 40 sharp points: too low, as the effective number of runs shows."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(40, 2))
    K, sign = squared_exponential(x, 100.0, 1.0), np.sign(x[:, 0])
    few, many = (
        ais.summarize(ais.annealed(rng, K, np.zeros(40), probit(sign), ais.power_ladder(num), 32)[0])
        for num in (3, 1000)
    )
    assert few.ess < 3
    assert many.ess > 8
    assert few.log_evidence + few.half_width < many.log_evidence - many.half_width


@pytest.mark.parametrize("case", GOLDEN)
def test_cumulants_explain_the_error_of_ep(case):
    """Golden values: the leading correction removes nine tenths of EP's error."""
    variance, lengthscale, sign, exact, ep = case
    K = squared_exponential(X, variance, lengthscale)
    problem = K, np.zeros(5), [lambda f, s=s: special.log_ndtr(s * f) for s in sign]
    sites = gp_sites.ep(problem)
    third, fourth = ep_correction(K, np.zeros(5), lambda i, f: special.log_ndtr(sign[i] * f), *sites)
    assert abs(ep + third + fourth - exact) < 0.13 * abs(ep - exact)


@jit
def surface(X, y, points):
    """EP's log evidence, status and sites at (log lengthscale, log sigma)."""

    def one(point):
        kernel = gp.kernels.RBF(jnp.exp(2 * point[1]), jnp.exp(point[0]))
        conditioned = gp.EP().condition(gp.Model(kernel, gp.likelihoods.Bernoulli()), X, y)
        return (
            conditioned.log_evidence,
            conditioned.status,
            jnp.stack([conditioned.sites.lam1, conditioned.sites.lam2]),
        )

    return jax.lax.map(one, points)


@pytest.mark.slow
def test_ep_beside_the_evidence():
    """30 points, four settings: within 0.1 nats of the interval of four standard errors, with the correction 0.01."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(30, 2))
    sign = np.where(x[:, 0] + 0.5 * rng.normal(size=30) > 0, 1.0, -1.0)
    points = np.array([(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (1.0, 2.0)])
    data = jnp.asarray(x), jnp.asarray((sign + 1) / 2), jnp.asarray(points)
    ep, statuses, sites = (np.asarray(part) for part in surface(*data))
    assert not statuses.any()
    for index, (log_lengthscale, log_sigma) in enumerate(points):
        K = squared_exponential(x, np.exp(2 * log_sigma), np.exp(log_lengthscale))
        ladder = ais.power_ladder(300)
        weights, _ = ais.annealed(rng, K, np.zeros(30), probit(sign), ladder, 256, sites[index])
        summary = ais.summarize(weights, level=1 - 6e-5)
        missing = sum(
            ep_correction(K, np.zeros(30), lambda i, f: special.log_ndtr(sign[i] * f), *sites[index])
        )
        assert summary.half_width < 0.05
        assert abs(ep[index] - summary.log_evidence) < summary.half_width + 0.1
        assert abs(ep[index] + missing - summary.log_evidence) < summary.half_width + 0.01
