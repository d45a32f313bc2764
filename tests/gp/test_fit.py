"""The facade: units, learners, predictions as mixtures, bad input."""

import dataclasses
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import optimize, stats

from probinfer import gp, mcmc, vi
from probinfer.core.errors import ConvergenceWarning
from probinfer.core.status import Status
from tests.reference import gp_predict as oracle

RNG = np.random.default_rng(7)
X = RNG.uniform(0, 10, size=(40, 2)) * np.array([1.0, 100.0]) + 5.0
Y = 300 + 40 * np.sin(X[:, 0]) + 0.02 * X[:, 1] + 4 * RNG.normal(size=40)
X_NEW = RNG.uniform(0, 10, size=(9, 2)) * np.array([1.0, 100.0]) + 5.0


def model():
    return gp.Model(gp.kernels.RBF(1.0, jnp.ones(2)), gp.likelihoods.Gaussian(0.1))


@pytest.fixture(scope="module")
def ml2():
    return gp.fit(jax.random.key(0), model(), X, Y)


@pytest.fixture(scope="module")
def nuts():
    engine = mcmc.NUTS(num_warmup=200, num_draws=100, num_chains=2)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # 100 draws are too few for the convergence rule, and the engine warns
        return gp.fit(jax.random.key(1), model(), X, Y, learn=engine)


def standardized():
    return (X - X.mean(0)) / X.std(0), (Y - Y.mean()) / Y.std()


def test_ml2_finds_the_maximum_that_scipy_finds(ml2):
    x, y = standardized()

    def negative(log_parameters):
        variance, l1, l2, noise = np.exp(log_parameters)
        return -oracle.condition(
            oracle.rbf(x, x, variance, np.array([l1, l2])), y, np.full(40, noise), np.zeros(40)
        )[2]

    start = np.log([ml2.model.kernel.variance, *ml2.model.kernel.lengthscale, ml2.model.likelihood.variance])
    best = optimize.minimize(
        negative, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9, "maxfev": 400}
    )
    assert -negative(start) >= -best.fun - 1e-6
    np.testing.assert_allclose(ml2.log_evidence, -negative(start) - 40 * np.log(Y.std()), rtol=1e-9)


def test_predictions_are_in_the_users_units(ml2):
    x, y = standardized()
    kernel = ml2.model.kernel
    x_new = (X_NEW - X.mean(0)) / X.std(0)
    grams = [
        oracle.rbf(a, b, kernel.variance, np.asarray(kernel.lengthscale))
        for a, b in ((x, x), (x, x_new), (x_new, x_new))
    ]
    noise = float(ml2.model.likelihood.variance)
    mean, cov = oracle.predict(*grams, y, np.full(40, noise), np.zeros(40), np.zeros(9))
    np.testing.assert_allclose(ml2.predict(X_NEW)[0], Y.mean() + Y.std() * mean, rtol=1e-7)
    np.testing.assert_allclose(ml2.predict(X_NEW)[1], Y.var() * np.diag(cov), rtol=1e-5)
    np.testing.assert_allclose(ml2.predict_joint(X_NEW)[1], Y.var() * cov, rtol=1e-5, atol=1e-6 * Y.var())
    y_new = np.linspace(250, 350, 9)
    wanted = stats.norm(Y.mean() + Y.std() * mean, Y.std() * np.sqrt(np.diag(cov) + noise))
    np.testing.assert_allclose(ml2.log_prob(X_NEW, y_new), wanted.logpdf(y_new), rtol=1e-6)
    np.testing.assert_allclose(ml2.predict_y(X_NEW).quantile(0.9), wanted.ppf(0.9), rtol=1e-7)
    loo = oracle.leave_one_out(grams[0], y, np.full(40, noise), np.zeros(40)) - np.log(Y.std())
    np.testing.assert_allclose(ml2.loo(), loo, rtol=1e-6)


def test_evidence_does_not_depend_on_standardization():
    """The same model in either unit has the same evidence of the same data."""
    fixed = {name: gp.fixed for name in gp.leaf_names(model()) if name != "likelihood.variance"}
    prior = gp.replace(gp.default_prior(model(), standardized()[0]), fixed)
    scaled = gp.fit(jax.random.key(0), model(), X, Y, prior=prior, standardize=True)
    kernel = gp.kernels.RBF(float(Y.var()), jnp.asarray(X.std(0)))
    raw = gp.Model(kernel, gp.likelihoods.Gaussian(float(0.1 * Y.var())))
    prior = gp.replace(gp.default_prior(raw, X), dict.fromkeys(fixed, gp.fixed))
    prior = gp.replace(prior, {"likelihood.variance": dist.LogNormal(np.log(0.1 * Y.var()), 1.0)})
    plain = gp.fit(jax.random.key(0), raw, X, Y - Y.mean(), prior=prior, standardize=False)
    np.testing.assert_allclose(scaled.log_evidence, plain.log_evidence, rtol=1e-8)
    np.testing.assert_allclose(
        scaled.predict(X_NEW)[0] - Y.mean(), plain.predict(X_NEW)[0], rtol=1e-5, atol=1e-3
    )


@pytest.mark.slow
def test_mixture_over_draws_is_the_mean_of_densities(nuts):
    """Pointwise: log of the mean over hyperparameter draws, computed from the stacked models."""
    y_new = np.linspace(250, 350, 9)
    x, y = standardized()
    x_new = (X_NEW - X.mean(0)) / X.std(0)
    densities = []
    for i in range(3, 200, 50):
        one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], nuts.models)
        single = dataclasses.replace(nuts, models=one)
        kernel, noise = jax.tree.map(lambda leaf: np.asarray(leaf[0]), (one.kernel, one.likelihood.variance))
        grams = [
            oracle.rbf(a, b, kernel.variance, kernel.lengthscale)
            for a, b in ((x, x), (x, x_new), (x_new, x_new))
        ]
        mean, cov = oracle.predict(*grams, y, np.full(40, noise), np.zeros(40), np.zeros(9))
        wanted = stats.norm(Y.mean() + Y.std() * mean, Y.std() * np.sqrt(np.diag(cov) + noise)).pdf(y_new)
        np.testing.assert_allclose(np.exp(single.log_prob(X_NEW, y_new)), wanted, rtol=1e-5)
        densities.append(wanted)
    some = jax.tree.map(lambda leaf: leaf[3:200:50], nuts.models)
    mixture = dataclasses.replace(nuts, models=some)
    np.testing.assert_allclose(mixture.log_prob(X_NEW, y_new), np.log(np.mean(densities, 0)), rtol=1e-5)


def test_mixture_loo_is_the_harmonic_mean_over_draws(nuts):
    singles = []
    for i in (0, 60, 130):
        singles.append(
            dataclasses.replace(
                nuts, models=jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], nuts.models)
            ).loo()
        )
    some = dataclasses.replace(
        nuts, models=jax.tree.map(lambda leaf: leaf[jnp.array([0, 60, 130])], nuts.models)
    )
    np.testing.assert_allclose(some.loo(), -np.log(np.mean(np.exp(-np.array(singles)), 0)), rtol=1e-8)


def test_joint_moments_of_a_mixture_have_the_marginals(nuts):
    mean, covariance = nuts.predict_joint(X_NEW)
    np.testing.assert_allclose(mean, nuts.predict(X_NEW)[0], rtol=1e-9)
    np.testing.assert_allclose(jnp.diagonal(covariance), nuts.predict(X_NEW)[1], rtol=1e-6)


def test_function_samples_have_the_predictive_moments(nuts):
    """Mean of 2000 draws: |z| < 4.5 at 9 points; false-fail rate below 1e-4 (the key is fixed)."""
    draws = nuts.sample(jax.random.key(3), X_NEW, 2000)
    mean, variance = nuts.predict(X_NEW)
    assert draws.shape == (2000, 9)
    z = (draws.mean(0) - mean) / jnp.sqrt(variance / 2000)
    assert float(jnp.abs(z).max()) < 4.5


def test_posterior_draws_are_named_and_stacked(nuts):
    assert set(nuts.posterior.draws) == {"kernel.variance", "kernel.lengthscale", "likelihood.variance"}
    assert nuts.posterior.draws["kernel.lengthscale"].shape == (2, 100, 2)
    assert nuts.log_evidence is None
    with pytest.raises(AttributeError, match="posterior"):
        _ = nuts.model


@pytest.mark.parametrize(
    "engine",
    [
        gp.MAP(),
        pytest.param(vi.MeanField(num_draws=100), marks=pytest.mark.slow),
        pytest.param(vi.FullRank(num_draws=100), marks=pytest.mark.slow),
        pytest.param(mcmc.HMC(num_warmup=100, num_draws=50, num_chains=2), marks=pytest.mark.slow),
    ],
)
def test_every_engine_learns_hyperparameters(engine, ml2):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = gp.fit(jax.random.key(2), model(), X, Y, learn=engine)
    ours, theirs = fit.predict_y(X_NEW), ml2.predict_y(X_NEW)
    # The posterior predictive is near the ML-II one on 40 points with 2 smooth inputs: within its own spread.
    assert float(jnp.abs((ours.mean - theirs.mean) / theirs.stddev).max()) < 1.0
    assert np.isfinite(fit.loo()).all()


def test_a_second_fit_of_the_same_shape_compiles_nothing(ml2, count_compiles):
    ml2.predict(X_NEW)
    with count_compiles() as counter:
        again = gp.fit(jax.random.key(5), model(), X[::-1].copy(), Y + X[:, 0])
        again.predict(X_NEW)
    assert counter.count == 0


def test_known_noise_in_the_users_units():
    noise = np.full(40, 16.0)
    with_noise = gp.Model(gp.kernels.RBF(1.0, jnp.ones(2)), gp.likelihoods.KnownNoise(noise))
    fit = gp.fit(jax.random.key(0), with_noise, X, Y)
    np.testing.assert_allclose(fit.model.likelihood.noise, 16.0 / Y.var())
    latent = fit.predict(X_NEW)[1]
    np.testing.assert_allclose(fit.predict_y(X_NEW, noise_variance=25.0).variance, latent + 25.0, rtol=1e-9)
    with pytest.raises(ValueError, match="noise_variance"):
        fit.predict_y(X_NEW)


@pytest.mark.slow
@pytest.mark.f32
def test_float32_data_give_a_float32_fit():
    x, y = X.astype(np.float32), Y.astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # the search may end at the rounding level, with a warning
        fit = gp.fit(jax.random.key(0), model(), x, y)
    mean, variance = fit.predict(X_NEW.astype(np.float32))
    assert mean.dtype == variance.dtype == jnp.float32
    assert np.isfinite(fit.log_evidence)
    assert float(jnp.sqrt(jnp.mean((mean - (300 + 40 * np.sin(X_NEW[:, 0]))) ** 2))) < 40


@pytest.mark.f32
def test_float64_data_without_64_bit_mode_are_said_to_be_narrowed(dtype):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gp.fit(jax.random.key(0), model(), X, Y, learn=gp.ML2(num_restarts=1))
    narrowed = any("7 digits" in str(warning.message) for warning in caught)
    assert narrowed == (dtype == jnp.float32)


def test_padding_does_not_show(ml2):
    together = ml2.predict(np.concatenate([X_NEW, X]))
    np.testing.assert_allclose(together[0][:9], ml2.predict(X_NEW)[0], rtol=1e-12)
    np.testing.assert_allclose(together[1][:1], ml2.predict(X_NEW[:1])[1], rtol=1e-9)


def test_predictions_under_jit_and_grad(ml2):
    """The fit as a closure and as an argument; slopes by central differences."""
    mean, variance = ml2.predict(X_NEW)
    for traced in (jax.jit(ml2.predict)(X_NEW), jax.jit(lambda fit, x: fit.predict(x))(ml2, X_NEW)):
        np.testing.assert_allclose(traced.mean, mean, rtol=1e-10)
        np.testing.assert_allclose(traced.variance, variance, rtol=1e-6)
        assert traced.status == Status.OK

    def height(x):
        moments = ml2.predict(x)
        return moments.mean[0] + moments.variance[2]

    slope, step = jax.jit(jax.grad(height))(jnp.asarray(X_NEW)), np.zeros_like(X_NEW)
    step[[0, 2], 0] = 1e-5
    rise = (height(X_NEW + step) - height(X_NEW - step)) / 2e-5
    np.testing.assert_allclose(slope[0, 0] + slope[2, 0], rise, rtol=1e-5)
    density = jax.jit(lambda x, y: ml2.log_prob(x, y))(X_NEW, np.full(9, 300.0))
    np.testing.assert_allclose(density, ml2.log_prob(X_NEW, np.full(9, 300.0)), rtol=1e-9)


def test_the_factor_is_cached(ml2):
    """The factor is computed once, is no part of the tree or of the file, and is not reused for changed models."""
    fresh = dataclasses.replace(ml2)
    assert "_cached" not in vars(fresh)
    wanted = fresh.predict(X_NEW)
    cached = vars(fresh)["_cached"]
    np.testing.assert_array_equal(fresh.predict(X_NEW).mean, wanted.mean)
    assert vars(fresh)["_cached"] is cached
    assert jax.tree.structure(fresh) == jax.tree.structure(ml2)
    other = dataclasses.replace(fresh, models=jax.tree.map(lambda leaf: 9 * leaf, fresh.models))
    assert not np.allclose(other.predict(X_NEW).variance, wanted.variance, rtol=1e-3)
    anew = jax.jit(lambda fit, x: fit.predict(x))(fresh, X_NEW)  # conditioned within the trace
    np.testing.assert_allclose(anew.variance, wanted.variance, rtol=1e-6)


@pytest.mark.parametrize("unit", [1e-140, 1e140])
def test_outputs_of_any_size(unit, ml2):
    fit = gp.fit(jax.random.key(0), model(), X * 1e-160, Y * unit)
    np.testing.assert_allclose(fit.predict(X_NEW * 1e-160).mean / unit, ml2.predict(X_NEW).mean, rtol=1e-4)
    np.testing.assert_allclose(
        fit.predict(X_NEW * 1e-160).variance / unit / unit, ml2.predict(X_NEW).variance, rtol=1e-2
    )
    np.testing.assert_allclose(fit.log_evidence + 40 * np.log(unit), ml2.log_evidence, rtol=1e-4)


@pytest.mark.f32
@pytest.mark.parametrize("power", [-200, 200])
def test_outputs_whose_squares_do_not_exist_are_refused(power, dtype):
    unit = 10.0 ** (power if dtype == jnp.float64 else power // 8)
    x, y = X.astype(dtype), (Y * unit).astype(dtype)
    with pytest.raises(ValueError, match=r"y has .* of size .* change the unit"):
        gp.fit(jax.random.key(0), model(), x, y)
    if power > 0:
        with pytest.raises(ValueError, match=r"X has entries of size .* change the unit"):
            gp.fit(jax.random.key(0), model(), (X * unit).astype(dtype), Y.astype(dtype), standardize=False)


def test_constant_columns_are_reported():
    constant = np.column_stack([X, np.full(40, 3.0)])
    wide = gp.Model(gp.kernels.RBF(1.0, jnp.ones(3)))
    with pytest.warns(UserWarning, match=r"columns \[2\] are constant"):
        fit = gp.fit(jax.random.key(0), wide, constant, Y)
    assert np.isfinite(fit.predict(constant[:3])[0]).all()


def test_a_prior_of_unsaid_units_is_asked_about():
    x, y = standardized()
    prior = gp.default_prior(model(), x)
    quick = gp.ML2(num_restarts=1, max_steps=2)
    asked = []
    for data, standardize in (((X, Y), None), ((X, Y), True), ((X, Y), False), ((x, y), None)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gp.fit(jax.random.key(0), model(), *data, prior=prior, learn=quick, standardize=standardize)
        asked.append(sum("standardize=False" in str(warning.message) for warning in caught))
    assert asked == [1, 0, 0, 0]


def test_a_fit_is_shown_on_one_line(ml2, nuts):
    assert repr(ml2) == "Fit(RBF kernel, Gaussian likelihood; 40 points, 2 inputs; point estimate)"
    assert "Posterior(kernel.lengthscale[2], kernel.variance, likelihood.variance; 2 x 100 draws" in repr(
        nuts
    )


def test_one_point_needs_its_own_units():
    with pytest.raises(ValueError, match="standardize=False"):
        gp.fit(jax.random.key(0), model(), X[:1], Y[:1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"X": X.astype(int)}, TypeError, "floating point"),
        ({"y": np.where(Y[0] == Y, np.nan, Y)}, ValueError, "NaN"),
        ({"y": Y[:-1]}, ValueError, "40 rows"),
        ({"prior": {}, "standardize": True}, ValueError, "nothing for"),
        ({"model": gp.Model(gp.kernels.RBF(1.0, np.ones(3)))}, ValueError, "3"),
        ({"learn": "nuts"}, TypeError, "engine"),
        ({"key": 0}, TypeError, r"jax\.random\.key"),
        ({"model": gp.kernels.RBF()}, TypeError, r"must be gp\.Model.*gp\.Model\(kernel\)"),
        ({"standardize": "no"}, TypeError, "True, False or None"),
        ({"y": np.full(40, 3.5)}, ValueError, r"y is 3\.5 at every point.*standardize=False"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"key": jax.random.key(0), "model": model(), "X": X, "y": Y, **change}
    with pytest.raises(error, match=message):
        inspect.unwrap(gp.fit)(**arguments)  # the annotation checks of the tests would raise first
