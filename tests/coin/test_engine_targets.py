"""Coin SVGD on a NumPyro model and on the hyperparameters of a Gaussian process, both against quadrature."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.special import logsumexp
from scipy.stats import halfnorm, norm

import probinfer as pi
from probinfer import coin, gp, targets
from probinfer.core.status import Status

DATA = np.random.default_rng(7).normal(2.0, 0.7, size=12)


def moments(grid, log_weights):
    """Means and standard deviations over a two-dimensional grid, per axis."""
    weights = np.exp(log_weights - logsumexp(log_weights))
    posterior = []
    for axis, points in enumerate(grid):
        marginal = weights.sum(axis=1 - axis)
        mean = marginal @ points
        posterior.append((mean, np.sqrt(marginal @ (points - mean) ** 2)))
    return posterior


def check(draws, exact):
    """A deterministic cloud of 60 from a random start: mean within a tenth, width within 15 %."""
    mean, sd = exact
    assert abs(np.mean(draws) - mean) < 0.1 * sd
    assert 0.85 < np.std(draws) / sd < 1.15


def location_and_scale(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(5.0))
    numpyro.sample("y", dist.Normal(mu, sigma), obs=y)


@pytest.mark.parametrize("polish", [None, pytest.param("nuts", marks=pytest.mark.slow)])
def test_a_numpyro_model(key, polish):
    grid = np.linspace(0, 4, 301), np.linspace(-2, 2, 301)
    mu, log_sigma = np.meshgrid(*grid, indexing="ij")
    sigma = np.exp(log_sigma)
    likelihood = norm.logpdf(DATA[:, None, None], mu, sigma).sum(axis=0)
    exact = moments(grid, likelihood + norm.logpdf(mu, 0, 10) + halfnorm.logpdf(sigma, 0, 5) + log_sigma)
    target = targets.from_numpyro(location_and_scale, DATA)
    posterior = pi.infer(key, target, coin.SVGD(num_particles=60, polish=polish), progress=False)
    assert int(posterior.info.status) == Status.OK
    assert np.all(posterior.draws["sigma"] > 0)
    if polish is None:
        check(posterior.draws["mu"][0], exact[0])
        check(np.log(posterior.draws["sigma"][0]), exact[1])
    else:  # 60 independent draws: five standard errors of mean and sd, 6e-7 each
        assert abs(np.mean(posterior.draws["mu"]) - exact[0][0]) < 5 * exact[0][1] / 60**0.5
        assert abs(np.std(posterior.draws["mu"]) / exact[0][1] - 1) < 5 / 120**0.5
        assert 0.6 < float(posterior.info.acceptance) < 0.99


@pytest.mark.slow
def test_hyperparameters_of_a_gaussian_process(key):
    x = np.linspace(-2, 2, 20)[:, None]
    y = np.sin(2 * x[:, 0]) + 0.3 * np.random.default_rng(3).normal(size=20)
    grid = np.linspace(-3, 2, 61), np.linspace(-6, 1, 61)
    values = np.empty((61, 61))
    for i, log_length in enumerate(grid[0]):
        K = np.exp(-0.5 * ((x - x.T) / np.exp(log_length)) ** 2)
        for j, log_noise in enumerate(grid[1]):
            chol = np.linalg.cholesky(K + np.exp(log_noise) * np.eye(20))
            whitened = np.linalg.solve(chol, y)
            prior = norm.logpdf(log_length) + norm.logpdf(log_noise, -1)
            values[i, j] = -0.5 * whitened @ whitened - np.log(np.diag(chol)).sum() + prior
    exact = moments(grid, values)
    model = gp.Model(gp.kernels.RBF(1.0, 1.0), gp.likelihoods.Gaussian(0.5))
    prior_overrides = {
        "kernel.variance": gp.fixed,
        "kernel.lengthscale": dist.LogNormal(0.0, 1.0),
        "likelihood.variance": dist.LogNormal(-1.0, 1.0),
    }
    prior = gp.replace(gp.default_prior(model, x), prior_overrides)
    engine = coin.SVGD(num_particles=60)
    fit = gp.fit(key, model, x, y, prior=prior, learn=engine, standardize=False, progress=False)
    draws = fit.posterior.draws
    check(np.log(draws["kernel.lengthscale"][0]), exact[0])
    check(np.log(draws["likelihood.variance"][0]), exact[1])
    mean, variance = fit.predict(x[:2])
    assert np.all(np.isfinite(mean))
    assert np.all(np.asarray(variance) > 0)
