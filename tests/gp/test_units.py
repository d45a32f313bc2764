"""The values of a user are in the units of the data: a table over all kernels, means and likelihoods."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import gp, kernels
from probinfer.gp.model.leaves import leaf_names
from probinfer.gp.model.scaling import Scaling
from probinfer.gp.model.units import in_model_units

k = kernels
X = np.random.default_rng(0).normal(size=(6, 2)) * [3.0, 500.0]
SCALING = Scaling(np.zeros(2), np.array([4.0, 700.0]), np.array(20.0), np.array(30.0))
SHIFTED = Scaling(np.array([5.0, -100.0]), np.array([4.0, 700.0]), np.array(20.0), np.array(30.0))
LENGTHS = jnp.asarray([2.0, 300.0])
KERNELS = {
    "RBF": k.RBF(50.0, LENGTHS),
    "Matern12": k.Matern12(50.0, LENGTHS),
    "Matern32": k.Matern32(50.0, LENGTHS),
    "Matern52": k.Matern52(50.0, 40.0),
    "RationalQuadratic": k.RationalQuadratic(50.0, LENGTHS, 0.7),
    "InverseMultiquadric": k.InverseMultiquadric(50.0, LENGTHS, 0.3),
    "Periodic": k.Periodic(50.0, jnp.asarray([0.8, 1.3]), LENGTHS),
    "Linear": k.Linear(jnp.asarray([2.0, 1e-4])),
    "Constant": k.Constant(70.0),
    "White": k.White(9.0),
    "Polynomial": k.Polynomial(0.3, 2.0, 3).on(0),
    "Sum": k.RBF(50.0, 2.0).on(0) + k.White(3.0),
    "Product": k.RBF(1.0, 2.0).on(0) * k.Periodic(25.0, 1.0, 6.0).on(0) * k.RBF(3.0, 300.0).on(1),
    "Scaled": 400.0 * k.Matern32(1.0, 300.0).on(1),
    "Scaled inside": 1.0 * (k.RBF(50.0, LENGTHS) + k.Constant(3.0)),
    "ActiveDims": k.RBF(50.0, jnp.asarray([300.0, 2.0])).on((1, 0)),
}


def make_model(kernel, mean=None, likelihood=None):
    return gp.Model(kernel, likelihood or gp.likelihoods.Gaussian(7.0), mean or gp.means.Zero())


def converted(model, scaling=SCALING, fixed=None):
    return in_model_units(model, scaling, frozenset(leaf_names(model)) if fixed is None else frozenset(fixed))


def test_the_table_has_every_kernel():
    abstract = {"Kernel", "Stationary", "Warped"}
    assert set(kernels.__all__) - abstract <= set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_the_covariance_is_the_same_in_both_units(name):
    """K in the units of the data is the square of that of y times K of the standardized inputs."""
    model, unknown = converted(make_model(KERNELS[name]))
    assert unknown == []
    scaled = jnp.asarray(SCALING.inputs(X))
    np.testing.assert_allclose(
        30.0**2 * model.kernel.gram(scaled), KERNELS[name].gram(jnp.asarray(X)), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(model.likelihood.variance, 7.0 / 900)


@pytest.mark.parametrize(
    "mean", [gp.means.Constant(50.0), gp.means.Linear([2.0, -0.1], 5.0), gp.means.Zero()]
)
def test_the_mean_is_the_same_in_both_units(mean):
    model, unknown = converted(make_model(k.RBF(), mean), SHIFTED)
    assert unknown == []
    wanted = mean(jnp.asarray(X)) if not isinstance(mean, gp.means.Zero) else 20.0
    np.testing.assert_allclose(20.0 + 30.0 * model.mean(jnp.asarray(SHIFTED.inputs(X))), wanted, rtol=1e-9)


def test_likelihoods():
    def likelihood_of(likelihood):
        return converted(make_model(k.RBF(), likelihood=likelihood))[0].likelihood

    np.testing.assert_allclose(
        likelihood_of(gp.likelihoods.KnownNoise(np.arange(6.0))).noise, np.arange(6) / 900
    )
    student = likelihood_of(gp.likelihoods.StudentT(6.0, 3.0))
    np.testing.assert_allclose([student.scale, student.df], [0.2, 3.0])
    np.testing.assert_allclose(likelihood_of(gp.likelihoods.NegativeBinomial(0.3)).dispersion, 0.3)


def test_defaults_are_standard_deviations_unless_they_are_fixed_or_a_period():
    model = make_model(k.Periodic() + k.RBF(lengthscale=jnp.ones(2)), likelihood=gp.likelihoods.Gaussian())
    start, _ = converted(model, fixed=())
    periodic, rbf = start.kernel.terms
    np.testing.assert_allclose([rbf.variance, *rbf.lengthscale, start.likelihood.variance], 1.0)
    np.testing.assert_allclose([periodic.variance, periodic.lengthscale], 1.0)
    np.testing.assert_allclose(periodic.period, 1 / np.sqrt(4 * 700.0))  # one period for both columns
    converted_model, _ = converted(model)
    np.testing.assert_allclose(converted_model.kernel.terms[1].lengthscale, [1 / 4, 1 / 700])
    np.testing.assert_allclose(converted_model.kernel.terms[0].period, [1 / 4, 1 / 700])
    np.testing.assert_allclose(converted_model.likelihood.variance, 1 / 900)


def test_one_factor_carries_the_unit():
    """A fixed variance of 1 in a product with a learned one is a pure number."""
    model = make_model(k.RBF(lengthscale=2.0).on(0) * k.RBF(lengthscale=3.0).on(1))
    start, _ = converted(model, fixed=["kernel.factors.1.kernel.variance"])
    np.testing.assert_allclose([factor.kernel.variance for factor in start.kernel.factors], 1.0)


@pytest.mark.parametrize(
    ("model", "fixed", "scaling", "unknown"),
    [
        (make_model(k.Linear(2.0)), ["kernel.variance"], SHIFTED, ["kernel.variance"]),
        (make_model(k.Linear(2.0)), [], SHIFTED, []),
        (make_model(k.Polynomial(2.0, 3.0)), ["kernel.variance"], SCALING, ["kernel.variance"]),
        (make_model(k.Warped(k.RBF(), jnp.log1p)), [], SCALING, ["kernel.fn"]),
        (make_model(k.RBF(), gp.means.Linear(1.0, 5.0)), ["mean.intercept"], SHIFTED, ["mean.intercept"]),
    ],
)
def test_what_cannot_be_converted_is_named(model, fixed, scaling, unknown):
    assert converted(model, scaling, fixed)[1] == unknown


def test_a_known_period_is_that_of_the_users_column():
    """With and without a prior that fixes it, and declared to be in standard deviations."""
    rng = np.random.default_rng(0)
    x = np.linspace(0, 12, 40)[:, None]
    y = 300 + 50 * np.sin(2 * np.pi * x[:, 0] / 1.5) + 5 * rng.normal(size=40)
    model = gp.Model(k.Periodic(period=1.5), gp.likelihoods.Gaussian(25.0))
    learn = gp.ML2(num_restarts=1)
    fit = gp.fit(jax.random.key(0), model, x, y, learn=learn)
    np.testing.assert_allclose(float(fit.model.kernel.period) * x.std(), 1.5, rtol=0.01)
    prior = gp.replace(gp.default_prior(model, x), {"kernel.period": gp.fixed})
    with pytest.warns(
        UserWarning, match="distributions of the prior are read in units of standard deviations"
    ):
        fit = gp.fit(jax.random.key(0), model, x, y, learn=learn, prior=prior)
    np.testing.assert_allclose(float(fit.model.kernel.period) * x.std(), 1.5, rtol=1e-12)
    scaled = gp.replace(
        model, {"kernel.period": jnp.asarray(1.5 / x.std()), "likelihood.variance": jnp.asarray(0.02)}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = gp.fit(jax.random.key(0), scaled, x, y, learn=learn, prior=prior, standardize=True)
    np.testing.assert_allclose(same.log_evidence, fit.log_evidence, rtol=1e-5)


def test_what_was_not_converted_is_warned_of():
    x, y = np.linspace(1, 9, 20)[:, None], np.sin(np.linspace(1, 9, 20)) + np.linspace(0, 1, 20) ** 2
    model = gp.Model(k.Warped(k.RBF(), jnp.tanh), gp.likelihoods.Gaussian(0.1))
    with pytest.warns(UserWarning, match=r"the units of kernel\.fn cannot be converted"):
        gp.fit(jax.random.key(0), model, x, y, learn=gp.ML2(num_restarts=1))
