"""The joint sampler of latent values and hyperparameters against integrals over all of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.special import log_ndtr, ndtr

from probinfer import gp, infer, mcmc

X = np.array([[-1.0], [0.2], [0.9]])
Y = np.array([0.0, 1.0, 1.0])
X_NEW = np.array([[-0.4], [1.5]])
SD = 0.7  # of the log variance under its prior


def model():
    return gp.Model(gp.kernels.RBF(2.0, 0.9), gp.likelihoods.Bernoulli("probit"))


def prior():
    tree = gp.default_prior(model(), X)
    leaves = {"kernel.variance": dist.LogNormal(np.log(2.0), SD), "kernel.lengthscale": gp.fixed}
    return gp.replace(tree, leaves)


@pytest.fixture(scope="module")
def sampled():
    free, target = gp.joint_posterior(model(), prior(), X, Y)
    engine = mcmc.NUTS(num_chains=4, num_draws=1000, num_warmup=300)
    return free, target, infer(jax.random.key(0), target, engine, progress=False)


@pytest.fixture(scope="module")
def integrals():
    """E[f], E[log variance] and P(y = 1) at new points: Gauss-Hermite over whitened values and the log variance."""
    z, w = np.polynomial.hermite_e.hermegauss(24)
    w = w / w.sum()
    unit = np.exp(-0.5 * ((X - X.T) / 0.9) ** 2)
    cross = np.exp(-0.5 * ((X_NEW - X.T) / 0.9) ** 2)
    chol = np.linalg.cholesky(unit)
    grid = np.array(list(itertools.product(z, repeat=3))) @ chol.T
    weights = np.prod(list(itertools.product(w, repeat=3)), axis=1)
    regression = cross @ np.linalg.inv(unit)
    spread = 1 - np.sum(regression * cross, 1)
    total, moments = 0.0, 0.0
    for node, weight in zip(z, w, strict=True):
        variance = 2.0 * np.exp(SD * node)
        f = np.sqrt(variance) * grid
        likelihood = weight * weights * np.exp(log_ndtr((2 * Y - 1) * f).sum(1))
        new = ndtr(f @ regression.T / np.sqrt(1 + variance * spread))
        columns = np.column_stack([f, np.full(len(f), np.log(variance)), new])
        total, moments = total + likelihood.sum(), moments + likelihood @ columns
    return moments / total


@pytest.mark.slow
def test_moments_are_those_of_the_integrals(sampled, integrals):
    free, _, posterior = sampled
    draws = posterior.flat()
    f = np.asarray(gp.latent_values(free, model(), draws, jnp.asarray(X)))
    values = np.column_stack([f, np.log(draws["kernel.variance"])])
    # five standard errors from at least 1000 effective draws of 4000: false-fail rate below 1e-5
    assert float(min(np.min(leaf) for leaf in jax.tree.leaves(posterior.info.ess))) > 1000
    error = 5 * values.std(0) / np.sqrt(1000)
    assert np.all(np.abs(values.mean(0) - integrals[:4]) < error)


def test_class_probabilities_are_those_of_the_integrals(sampled, integrals):
    free, _, posterior = sampled
    predictive = gp.joint_predictive(free, model(), posterior.flat(), X, X_NEW)
    # the probabilities of single draws have a standard deviation below 0.3: five standard errors of 1000 draws
    np.testing.assert_allclose(predictive.probability, integrals[4:], atol=5 * 0.3 / np.sqrt(1000))


def test_the_log_density_is_likelihood_times_priors(sampled):
    _, target, _ = sampled
    values = {"kernel.variance": jnp.asarray(1.3), "latent": jnp.array([0.3, -0.2, 1.1])}
    chol = np.linalg.cholesky(1.3 * np.exp(-0.5 * ((X - X.T) / 0.9) ** 2))
    f = chol @ np.array([0.3, -0.2, 1.1])
    position = target.unconstrain(values)
    np.testing.assert_allclose(
        target.log_likelihood_fn(position), log_ndtr((2 * Y - 1) * f).sum(), rtol=1e-10
    )
    expected = (
        dist.LogNormal(np.log(2.0), SD).log_prob(1.3) + dist.Normal(0, 1).log_prob(values["latent"]).sum()
    )
    np.testing.assert_allclose(target.prior.logdensity_fn(position), expected + np.log(1.3), rtol=1e-10)


def test_bad_labels_are_refused():
    with pytest.raises(ValueError, match="labels 0 and 1"):
        gp.joint_posterior(model(), prior(), X, np.array([0.0, 2.0, 1.0]))


def test_new_inputs_of_another_width_are_refused(sampled):
    free, _, posterior = sampled
    with pytest.raises(ValueError, match="columns"):
        gp.joint_predictive(free, model(), posterior.flat(), X, np.ones((2, 3)))
