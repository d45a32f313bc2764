"""Verdicts on point estimates, in both directions: a right fit has none, a collapsed one does."""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import gp
from probinfer.core.errors import ConvergenceWarning
from probinfer.core.status import Status
from probinfer.gp.hyperparameters.verdicts import add_verdicts

SEEDS = range(6)
LEARNED = {
    "kernel.variance": np.ones(1),
    "kernel.lengthscale": np.ones((1, 2)),
    "likelihood.variance": np.ones(1),
}


class Info(NamedTuple):
    status: int = 0


def data(seed, num=40):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(num, 2))
    y = np.sin(2 * X[:, 0]) + 0.3 * rng.normal(size=num)
    return X, (y - y.mean()) / y.std()


def verdict(kernel, X, y, likelihood=None, sites=None, log_evidence=None):
    model = gp.Model(kernel, gp.likelihoods.Gaussian(0.1) if likelihood is None else likelihood)
    model, sites = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (model, sites))
    names = [name for name in LEARNED if sites is None or name.startswith("kernel")]
    draws = {name: LEARNED[name] for name in names}
    return add_verdicts(Info(), model, jnp.asarray(X), jnp.asarray(y), sites, draws, log_evidence).status


def rbf(variance=1.0, lengthscale=1.0):
    return gp.kernels.RBF(variance, jnp.full(2, lengthscale))


def model():
    return gp.Model(rbf(), gp.likelihoods.Gaussian(0.1))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_fit_has_no_verdict(seed):
    """Warnings are errors here; the smallest gain over these seeds is 5 nats, ten times the threshold."""
    X, y = data(seed)
    fit = gp.fit(jax.random.key(seed), model(), X, y, learn=gp.ML2(num_restarts=1))
    assert fit.info.status == Status.OK


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (rbf(variance=1e-7), "variance of the kernel went to zero"),
        (rbf(lengthscale=1e5), "lengthscales went to infinity"),
        (rbf(lengthscale=1e-3), "below the spacing"),
        (gp.kernels.White(0.5) + rbf(variance=1e-7), "nothing was learned"),
    ],
)
def test_a_fit_that_learned_nothing_says_why(kernel, message):
    X, y = data(0)
    with pytest.warns(ConvergenceWarning, match=message):
        assert verdict(kernel, X, y, gp.likelihoods.Gaussian(0.5)) == Status.NOTHING_LEARNED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("likelihood", "inference"),
    [
        (gp.likelihoods.Poisson(), gp.EP()),
        pytest.param(gp.likelihoods.Bernoulli(), gp.Laplace(), marks=pytest.mark.slow),
        pytest.param(gp.likelihoods.StudentT(0.5), gp.VI(), marks=pytest.mark.slow),
    ],
)
def test_approximations_are_judged_by_their_evidence(likelihood, inference):
    """One kernel that depends on the inputs, three that do not, for several seeds."""
    kernels = {
        Status.OK: [rbf(1.0, 1.0)],
        Status.NOTHING_LEARNED: [rbf(1e-4), rbf(1.0, 1e5), rbf(0.3, 1e-3)],
    }
    for seed in SEEDS:
        X, y = data(seed)
        if isinstance(likelihood, gp.likelihoods.Bernoulli):
            y = (y > 0.5) * 1.0
        elif isinstance(likelihood, gp.likelihoods.Poisson):
            y = np.random.default_rng(seed).poisson(np.exp(1 + 1.5 * np.sin(2 * X[:, 0]))) * 1.0
        for wanted, candidates in kernels.items():
            for kernel in candidates:
                conditioned = gp.condition(gp.Model(kernel, likelihood), X, y, inference)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    got = verdict(kernel, X, y, likelihood, conditioned.sites, conditioned.log_evidence)
                assert got == wanted


def test_a_linear_mean_that_explains_everything_is_no_collapse():
    X, _ = data(0)
    y = X[:, 0] - X[:, 1] + 0.3 * np.random.default_rng(1).normal(size=40)
    fitted_model = gp.Model(rbf(1e-7), gp.likelihoods.Gaussian(0.09), gp.means.Linear([1.0, -1.0]))
    stacked = jax.tree.map(lambda leaf: leaf[None], fitted_model)
    assert (
        add_verdicts(Info(), stacked, jnp.asarray(X), jnp.asarray(y), None, LEARNED, None).status == Status.OK
    )


def test_noise_that_went_to_zero_is_a_verdict():
    X, _ = data(0)
    y = np.sin(X[:, 0])
    draws = {**LEARNED, "kernel.lengthscale": np.ones((1, 200))}
    stacked = jax.tree.map(lambda leaf: leaf[None], gp.Model(rbf(), gp.likelihoods.Gaussian(1e-90)))
    with pytest.warns(
        ConvergenceWarning, match="202 hyperparameters are too many to be learned from 40 points"
    ):
        report = add_verdicts(Info(1), stacked, jnp.asarray(X), jnp.asarray(y), None, draws, None)
    assert report.status == Status.AT_LIMIT
    fixed = {name: value for name, value in LEARNED.items() if name != "likelihood.variance"}
    assert add_verdicts(Info(1), stacked, jnp.asarray(X), jnp.asarray(y), None, fixed, None).status == 1


def test_a_smooth_function_without_noise_is_learned_said_and_drawn():
    """Where the best end has a large kernel the search stalls in rounding, before the noise is at its limit."""
    X = np.linspace(0, 3, 40)[:, None] * np.ones(2)
    with pytest.warns(ConvergenceWarning, match=r"noise went to zero|a parameter that runs to a limit"):
        fit = gp.fit(jax.random.key(0), model(), X, np.sin(X[:, 0]))
    assert fit.info.status in (Status.AT_LIMIT, Status.LINE_SEARCH_STALLED)
    grid = np.linspace(0, 3, 150)[:, None] * np.ones(2)
    with pytest.warns(ConvergenceWarning, match="predictive standard deviations are below"):
        mean, variance = fit.predict(grid)
    assert fit.sample(jax.random.key(1), grid, 3).shape == (3, 150)
    np.testing.assert_allclose(mean, np.sin(grid[:, 0]), atol=1e-5)
    assert float(variance.max()) < 1e-10


def test_noise_alone_teaches_nothing():
    """The kernel's variance at zero: independent outputs, judged where the search for the maximum ends."""
    X, _ = data(0)
    y = np.random.default_rng(3).normal(size=40)
    with pytest.warns(ConvergenceWarning, match="nothing was learned"):
        assert verdict(rbf(1e-6), X, y, gp.likelihoods.Gaussian(1.0)) == Status.NOTHING_LEARNED
