"""Fits beyond Gaussian noise: learned hyperparameters, class probabilities, leave-one-out, files, and bad data."""

import dataclasses
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from probinfer import gp, mcmc
from probinfer.core.errors import ConvergenceWarning, NumericalError
from probinfer.core.status import Status
from probinfer.gp.approximation.conditioning import _condition_many, condition_many, reference_sites
from probinfer.gp.hyperparameters.posterior import hyper_posterior
from probinfer.gp.hyperparameters.verification import held_warnings, release_warnings
from tests.gp.approximate_cases import jit
from tests.reference import gp_sites as oracle
from tests.reference.likelihoods import LOG_DENSITIES

X = np.repeat(np.linspace(-3, 3, 8), 2)[:, None]
# Pairs of labels at one input that contradict each other keep the kernel variance finite.
Y = np.array([0.0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 1])
X_NEW = np.array([[-2.0], [0.3], [1.7]])


def model():
    return gp.Model(gp.kernels.RBF(1.5, 0.8), gp.likelihoods.Bernoulli("logit"))


def prior():
    return gp.Model(
        gp.kernels.RBF(dist.LogNormal(0.0, 0.7), dist.LogNormal(0.0, 0.5)), gp.likelihoods.Bernoulli("logit")
    )


def problem(at, x=X):
    variance, lengthscale = float(at.kernel.variance), float(at.kernel.lengthscale)
    gram = variance * np.exp(-0.5 * ((x - x.T) / lengthscale) ** 2)
    return gram, np.zeros(len(x)), [lambda f, y=y: LOG_DENSITIES["logit"](y, f) for y in Y]


@pytest.fixture(scope="module")
def ml2():
    learn = gp.ML2(num_restarts=1)
    return gp.fit(jax.random.key(0), model(), X, Y, prior=prior(), learn=learn, standardize=False)


@pytest.fixture(scope="module")
def nuts():
    engine = mcmc.NUTS(num_warmup=30, num_draws=20, num_chains=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 20 draws are too few for the convergence rule, and the engine warns
        return gp.fit(jax.random.key(1), model(), X, Y, prior=prior(), learn=engine, standardize=False)


@pytest.mark.slow
def test_default_inference_is_ep_and_its_evidence_is_maximal(ml2):
    """The slow oracle at the learned hyperparameters and around them."""
    assert isinstance(ml2.inference, gp.EP)

    def value(log_variance, log_lengthscale):
        kernel = gp.kernels.RBF(np.exp(log_variance), np.exp(log_lengthscale))
        slow = problem(gp.Model(kernel, model().likelihood))
        slow = slow[0] + 1e-7 * np.eye(16), *slow[1:]  # the oracle inverts K
        return oracle.energy(slow, *oracle.ep(slow, tolerance=1e-6), 1.0)

    best = np.log([ml2.model.kernel.variance, ml2.model.kernel.lengthscale])
    best_value = value(*best)
    np.testing.assert_allclose(ml2.log_evidence, best_value, atol=1e-4)  # the oracle adds 1e-7 and inverts
    for step in ([0.2, 0], [-0.2, 0], [0, 0.2], [0, -0.2]):
        assert value(*(best + step)) < best_value


def test_the_start_and_the_verification_of_restarts_share_a_program(ml2):
    before = _condition_many._cache_size()
    warm, sites = ml2.models, ml2.sites
    models = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf, 1.5 * leaf]), warm)
    start = jax.tree.map(lambda leaf: leaf[0], sites)
    solutions = condition_many(ml2.inference, models, ml2.X, ml2.y, start, jnp.arange(3) < 1)
    assert _condition_many._cache_size() == before
    np.testing.assert_allclose(solutions.log_evidence[1], solutions.log_evidence[0], rtol=1e-9)
    assert solutions.sites.lam1.shape == (3, 16)
    assert solutions.log_evidence[2] < solutions.log_evidence[1]  # the maximum was learned


def test_class_probabilities(ml2):
    predictive = ml2.predict_y(X_NEW)
    probability = np.exp(predictive.log_prob(jnp.ones(3)))
    np.testing.assert_allclose(probability + np.exp(predictive.log_prob(jnp.zeros(3))), 1.0, rtol=1e-10)
    mean, variance = ml2.predict(X_NEW)
    z, weights = np.polynomial.hermite_e.hermegauss(80)
    f = np.asarray(mean)[:, None] + np.sqrt(np.asarray(variance))[:, None] * z
    np.testing.assert_allclose(probability, (1 / (1 + np.exp(-f))) @ weights / np.sqrt(2 * np.pi), rtol=1e-6)
    assert 0.05 < probability.min() < probability.max() < 0.95
    np.testing.assert_allclose(ml2.log_prob(X_NEW, np.ones(3)), np.log(probability), rtol=1e-10)


def test_loo_is_that_of_the_oracles_cavities(ml2):
    slow = problem(ml2.model)
    slow = slow[0] + 1e-7 * np.eye(16), *slow[1:]
    np.testing.assert_allclose(ml2.loo(), oracle.cavities(slow, *oracle.ep(slow, tolerance=1e-7)), atol=1e-5)


@pytest.mark.slow
def test_nuts_mixes_probabilities_over_draws(nuts):
    assert set(nuts.posterior.draws) == {"kernel.variance", "kernel.lengthscale"}
    assert nuts.posterior.draws["kernel.variance"].shape == (2, 20)
    together = np.exp(nuts.log_prob(X_NEW, np.ones(3)))
    singles = []
    for i in range(40):
        models, sites = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], (nuts.models, nuts.sites))
        one = dataclasses.replace(nuts, models=models, sites=sites)
        singles.append(np.exp(one.log_prob(X_NEW, np.ones(3))))
    np.testing.assert_allclose(together, np.mean(singles, 0), rtol=1e-8)
    assert np.ptp(singles, 0).max() > 0.01
    assert np.isfinite(nuts.loo()).all()


@pytest.mark.parametrize("which", ["ml2", pytest.param("nuts", marks=pytest.mark.slow)])
def test_files(which, request, tmp_path):
    fit = request.getfixturevalue(which)
    fit.save(tmp_path / "fit.npz")
    back = gp.load(tmp_path / "fit.npz")
    assert jax.tree.structure(back) == jax.tree.structure(
        fit
    )  # the structure includes the settings of inference
    np.testing.assert_array_equal(back.log_prob(X_NEW, np.ones(3)), fit.log_prob(X_NEW, np.ones(3)))
    np.testing.assert_array_equal(back.loo(), fit.loo())


@pytest.mark.slow
def test_the_density_is_a_function_of_the_position_alone():
    """The value does not depend on earlier evaluations: every search starts at the stored sites."""
    arrays = jnp.asarray(X), jnp.asarray(Y)
    _, target = hyper_posterior(model(), prior(), *arrays, gp.EP())
    density = jit(lambda target, position: jax.value_and_grad(target.logdensity_fn)(position))
    positions = target.init(jax.random.key(3), 4)
    position = jax.tree.map(lambda leaf: leaf[1], positions)
    first = density(target, position)
    for i in (3, 0, 2):
        density(target, jax.tree.map(lambda leaf, i=i: leaf[i], positions))
    jax.tree.map(np.testing.assert_array_equal, density(target, position), first)
    rebuilt = hyper_posterior(model(), prior(), *arrays, gp.EP())[1]
    jax.tree.map(np.testing.assert_array_equal, density(rebuilt, position), first)
    # They are the sites at the model's own values, where one more update changes nothing.
    sites = reference_sites(model(), *arrays, gp.EP())
    again = gp.condition(model(), *arrays, gp.EP(), sites=sites)
    assert again.num_iterations == 1
    np.testing.assert_allclose(again.sites.lam2, sites.lam2, rtol=1e-7)
    assert reference_sites(model(), *arrays, gp.Exact()) is None


@pytest.mark.slow
def test_a_method_that_did_not_converge_is_said():
    """A tolerance below rounding: the evidence is good, but the status is not OK."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = gp.fit(
            jax.random.key(0),
            model(),
            X,
            Y,
            prior=prior(),
            inference=gp.EP(max_updates=9, tolerance=1e-30),
            learn=gp.ML2(num_restarts=1),
            standardize=False,
        )
    messages = [str(w.message) for w in caught if issubclass(w.category, ConvergenceWarning)]
    assert any("EP did not converge" in text and "max_updates" in text for text in messages)
    assert np.isfinite(fit.log_evidence)
    assert fit.info.status == Status.MAX_ITERATIONS


def test_what_a_search_says_of_its_end_is_held_against_the_verification():
    """There is no warning about a search that stopped early if a converged end was chosen."""

    def search():
        with held_warnings() as caught:
            warnings.warn("the best did not converge", ConvergenceWarning, stacklevel=1)
            warnings.warn("in float32", UserWarning, stacklevel=1)
        return caught

    for status, expected in ((Status.OK, {"in float32"}), (Status.MAX_ITERATIONS, None)):
        with warnings.catch_warnings(record=True) as issued:
            warnings.simplefilter("always")
            release_warnings(search(), status)
        messages = {str(warning.message) for warning in issued}
        assert messages == (expected or {"in float32", "the best did not converge"})
        assert {warning.filename for warning in issued} == {__file__}

    def broken():
        with held_warnings():
            warnings.warn("before", ConvergenceWarning, stacklevel=1)
            raise RuntimeError

    with pytest.warns(ConvergenceWarning, match="before"), pytest.raises(RuntimeError):
        broken()


@pytest.mark.slow
def test_an_energy_far_from_its_fixed_point_is_not_learned_from():
    """On heavy-tailed noise it may be larger than any evidence, and would attract the search."""
    inference = gp.EP(max_updates=1)
    arrays = jnp.asarray(X), jnp.asarray(Y)
    assert np.isnan(gp.log_evidence(model(), *arrays, inference))
    _, target = hyper_posterior(model(), prior(), *arrays, inference)
    assert np.isnan(target.logdensity_fn(target.start))
    try:
        with pytest.warns(ConvergenceWarning, match="EP did not converge at the learned hyperparameters"):
            fit = gp.fit(
                jax.random.key(0),
                model(),
                X,
                Y,
                prior=prior(),
                inference=inference,
                learn=gp.ML2(num_restarts=1, max_steps=3),
                standardize=False,
            )
        refused = f"max_updates=1 {fit.info.status}"
    except NumericalError as error:  # or there was no evidence anywhere
        refused = str(error)
    assert "max_updates=1" in refused
    assert "OK" not in refused


@pytest.mark.slow
def test_separable_labels_are_bounded_by_the_prior():
    """Maximum likelihood diverges with the variance and warns; the posterior mode stays where the prior has mass."""
    labels = (X[:, 0] > 0).astype(float)
    arguments = {"prior": prior(), "standardize": False}
    with pytest.warns(ConvergenceWarning) as caught:  # the search for a maximum at infinity may warn, too
        runaway = gp.fit(jax.random.key(0), model(), X, labels, learn=gp.ML2(num_restarts=1), **arguments)
    assert any("separable" in str(warning.message) for warning in caught)
    assert runaway.info.status == Status.AT_LIMIT
    bounded = gp.fit(jax.random.key(0), model(), X, labels, learn=gp.MAP(num_restarts=1), **arguments)
    assert runaway.model.kernel.variance > 1e3 * bounded.model.kernel.variance
    assert 0.5 < bounded.model.kernel.variance < 10
    assert bounded.info.status == Status.OK


@pytest.mark.parametrize(
    ("y", "message"),
    [(Y + 1, "labels 0 and 1"), (np.where(Y == 1, 0.5, Y), "labels 0 and 1"), (Y[:-1], "16 rows")],
)
def test_bad_outputs(y, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(gp.fit)(jax.random.key(0), model(), X, y)
