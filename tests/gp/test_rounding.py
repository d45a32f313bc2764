"""Predictive variances at the level of rounding: right or reported, positive semi-definite, and usable for draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import gp
from probinfer.core.status import Status
from probinfer.gp.prediction import components
from tests.reference import gp_exact as oracle

RNG = np.random.default_rng(42)
X, X_NEW = RNG.normal(size=(30, 2)), RNG.normal(size=(12, 2))
X_NEW[:4] = X[:4]
Y = 3 * X[:, 0] - 2 * X[:, 1]
predict = jax.jit(lambda conditioned, X: conditioned.predict(X))
predict_joint = jax.jit(lambda conditioned, X: conditioned.predict_joint(X))


def conditioned(variance, lengthscale, noise, dtype):
    kernel = gp.kernels.RBF(variance, jnp.full(2, lengthscale))
    model = gp.Model(kernel, gp.likelihoods.Gaussian(noise))
    return gp.condition(model, jnp.asarray(X, dtype), jnp.asarray(Y, dtype))


def true_variances(process, dtype, jitter=True):
    kernel = process.model.kernel
    x, new = np.asarray(X, dtype), np.asarray(X_NEW, dtype)
    grams = [
        oracle.rbf_long_double(a, b, float(kernel.variance), kernel.lengthscale)
        for a, b in ((x, x), (x, new))
    ]
    noise = np.full(30, float(process.model.likelihood.variance) + jitter * float(process.jitter))
    return oracle.variance_long_double(*grams, np.longdouble(float(kernel.variance)), noise)


@pytest.mark.f32
@pytest.mark.parametrize("noise", [1e-12, 1e-8, 1e-3])
@pytest.mark.parametrize("lengthscale", [0.5, 3.0, 1000.0])
@pytest.mark.parametrize("variance", [1.0, 1e6])
def test_a_variance_is_right_to_its_floor(variance, lengthscale, noise, dtype):
    """Against extended precision, with whatever jitter was reported; where nothing is lost, to a factor of two."""
    process = conditioned(variance, lengthscale, noise, dtype)
    assert process.status == Status.OK
    moments, true = (
        predict(process, jnp.asarray(X_NEW, dtype)),
        true_variances(process, dtype),
    )
    assert (np.abs(moments.variance - true) <= moments.floor).all()
    assert (moments.variance > 0).all()
    resolved = ~np.asarray(moments.lost)
    np.testing.assert_allclose(moments.variance[resolved], true[resolved], rtol=1)
    if process.jitter > 0:  # a variance that is not lost is not due to the jitter
        np.testing.assert_allclose(
            moments.variance[resolved], true_variances(process, dtype, False)[resolved], rtol=1
        )
    assert moments.status == (Status.OK if resolved.all() else Status.PRECISION_LOST)


def test_ordinary_noise_loses_nothing():
    assert predict(conditioned(1.0, 1.0, 1e-6, float), jnp.asarray(X_NEW)).status == Status.OK


def test_nearly_linear_data_keep_their_standard_deviations():
    """A prior variance of 2e6 beside a noise variance of 7e-9: differences of variances are zero or negative."""
    process = conditioned(2.4e6, 2000.0, 7e-9, float)
    new = jnp.asarray(X_NEW)
    moments, true = predict(process, new), true_variances(process, float)
    plain = process.model.kernel.diag(new) - jnp.sum(
        jax.scipy.linalg.solve_triangular(
            process.chol,
            process.model.kernel.gram(process.X, new),
            lower=True,
        )
        ** 2,
        0,
    )
    assert (plain <= 0).any()
    np.testing.assert_allclose(moments.stddev, np.sqrt(true), rtol=0.5)
    assert moments.status == Status.PRECISION_LOST
    _, covariance = predict_joint(process, new)
    np.testing.assert_allclose(np.sqrt(np.diagonal(covariance)), np.sqrt(true), rtol=0.5)
    values = np.linalg.eigvalsh(covariance)
    assert values[0] > -1e-13 * values[-1]


def stack(process):
    return jax.tree.map(lambda leaf: leaf[None], process)


@pytest.mark.f32
@pytest.mark.parametrize(("variance", "noise"), [(1.0, 1e-14), (1.0, 1e-2), (2.4e6, 7e-9)])
def test_functions_are_drawn_on_dense_grids_and_duplicates(variance, noise, dtype):
    """The factor of the draws reproduces the covariance; equal points have equal values."""
    process = conditioned(variance, 2.0, noise, dtype)
    line = np.linspace(-1, 1, 12)[:, None] * 1e-3 * np.ones(2)
    line[6:] = line[:6]
    new = jnp.asarray(line, dtype)
    mean, covariance = predict_joint(process, new)
    drawn = components.functions(stack(process), jnp.zeros(12, int), new, jnp.eye(12, dtype=dtype)) - mean
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(drawn.T @ drawn, covariance, atol=100 * eps * float(covariance.max()))
    floor = float(predict(process, new).floor.max())
    np.testing.assert_allclose(drawn[:, :6], drawn[:, 6:], atol=3 * np.sqrt(floor))


@pytest.mark.parametrize(
    ("likelihood", "inference"),
    [
        (gp.likelihoods.Bernoulli(), gp.EP()),
        pytest.param(gp.likelihoods.StudentT(0.1), gp.Laplace(), marks=pytest.mark.slow),
        pytest.param(gp.likelihoods.Poisson(), gp.VI(), marks=pytest.mark.slow),
    ],
)
def test_approximations_have_semidefinite_covariances(likelihood, inference):
    y = jnp.asarray((Y[:12] > 0) + 0.0).at[0].set(4.0 if hasattr(likelihood, "df") else 1.0)
    model = gp.Model(gp.kernels.RBF(4.0, jnp.full(2, 5.0)), likelihood)
    process = gp.condition(model, jnp.asarray(X[:12]), y, inference)
    new = jnp.concatenate([jnp.asarray(X_NEW), jnp.asarray(X_NEW)])
    moments, (_, covariance) = predict(process, new), predict_joint(process, new)
    assert moments.status == Status.OK
    np.testing.assert_allclose(jnp.diagonal(covariance), moments.variance, rtol=1e-6)
    values = np.linalg.eigvalsh(covariance)
    assert values[0] > -1e-13 * values[-1]
    drawn = components.functions(stack(process), jnp.zeros(5, int), new, jnp.ones((5, 24)))
    np.testing.assert_allclose(drawn[:, :12], drawn[:, 12:], atol=1e-5)


@pytest.mark.slow
def test_derivatives_pass_the_bound():
    """d variance / d x at points whose variance was replaced: finite, and that of the formula where it was not."""
    x = jnp.asarray(X_NEW[6])

    def slope(variance, lengthscale, noise):
        process = conditioned(variance, lengthscale, noise, float)
        return jax.grad(lambda x: process.predict(x[None]).variance[0])(x), process

    got, process = slope(1.0, 1.0, 1e-2)
    step = 1e-6
    wanted = [
        (process.predict((x + step * e)[None])[1][0] - process.predict((x - step * e)[None])[1][0])
        / (2 * step)
        for e in np.eye(2)
    ]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert np.isfinite(slope(2.4e6, 2000.0, 7e-9)[0]).all()


def test_a_variance_that_is_the_jitters_is_lost():
    """Duplicate columns and almost no noise: the variances are those of the jitter."""
    x = np.linspace(0, 3, 40)[:, None] * np.ones(2)
    model = gp.Model(gp.kernels.RBF(2.2, jnp.full(2, 2.9)), gp.likelihoods.Gaussian(1e-24))
    process = gp.condition(model, jnp.asarray(x), jnp.sin(jnp.asarray(x[:, 0])))
    moments = process.predict(jnp.linspace(0.03, 2.97, 50)[:, None] * jnp.ones(2))
    assert process.jitter > 0
    assert moments.status == Status.PRECISION_LOST
    assert np.asarray(moments.lost).all()
    far = process.predict(jnp.full((1, 2), 30.0))
    assert far.status == Status.OK
    np.testing.assert_allclose(far.variance, 2.2, rtol=1e-9)
