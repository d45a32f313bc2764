"""Kernels of a Gaussian process ranked by tempered SMC on real data, against the trapezoidal rule."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

from probinfer import data, gp, smc
from probinfer.core.errors import ConvergenceWarning

YEARS = 24


def gram(name, x, lengthscale):
    distance = np.abs(x - x.T) / lengthscale
    return np.exp(-0.5 * distance**2) if name == "RBF" else np.exp(-distance)


def quadrature(name, x, y):
    """Log evidence over log lengthscale and log noise variance, the kernel's variance one."""
    logs = np.linspace(-5, 5, 41), np.linspace(-6, 4, 41)
    values = np.empty((41, 41))
    for i, log_length in enumerate(logs[0]):
        K = gram(name, x, np.exp(log_length))
        for j, log_noise in enumerate(logs[1]):
            chol = np.linalg.cholesky(K + np.exp(log_noise) * np.eye(len(y)))
            whitened = np.linalg.solve(chol, y)
            likelihood = -0.5 * whitened @ whitened - np.log(np.diag(chol)).sum()
            prior = norm.logpdf(log_length) + norm.logpdf(log_noise, -1)
            values[i, j] = likelihood - 0.5 * len(y) * np.log(2 * np.pi) + prior
    return logsumexp(values) + 2 * np.log(0.25)


@pytest.mark.slow
def test_kernels_are_ranked_as_by_quadrature():
    table = data.sunspots()
    X, y = table.X[:YEARS], table.y[:YEARS]  # two cycles
    x, z = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    exact, estimates, errors = [], [], []
    for name, kernel in (("RBF", gp.kernels.RBF(1.0, 1.0)), ("Matern12", gp.kernels.Matern12(1.0, 1.0))):
        model = gp.Model(kernel, gp.likelihoods.Gaussian(0.5))
        priors = {
            "kernel.variance": gp.fixed,
            "kernel.lengthscale": dist.LogNormal(0.0, 1.0),
            "likelihood.variance": dist.LogNormal(-1.0, 1.0),
        }
        prior = gp.replace(gp.default_prior(model, x), priors)
        engine = smc.Tempered(num_particles=128, num_islands=4)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # of draws; here it is the evidence that counts
            key = jax.random.key(1)
            fit = gp.fit(key, model, X, y, prior=prior, learn=engine, standardize=True, progress=False)
        exact.append(quadrature(name, x, z) - YEARS * np.log(y.std()))
        estimates.append(float(fit.log_evidence))
        errors.append(float(fit.info.log_evidence_error))
        assert 0.005 < errors[-1] < 0.3
        assert abs(estimates[-1] - exact[-1]) < 10 * errors[-1]  # t of 3 degrees of freedom: .002
        assert jnp.isfinite(fit.predict(X[:2])[0]).all()
    assert abs(exact[0] - exact[1]) > 4 * np.hypot(*errors)
    assert np.argmax(estimates) == np.argmax(exact)
