"""Exact conditioning against NumPy inverses, and errors for bad data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import gp
from probinfer.core.status import Status
from probinfer.gp.model.leaves import get_leaf
from tests.reference import gp_predict as oracle

VARIANCE, LENGTHSCALE, NOISE = 1.7, np.array([0.6, 1.9]), 0.3
X = np.random.default_rng(1).normal(size=(12, 2))
Y = np.sin(2 * X[:, 0]) + 0.3 * X[:, 1]
X_NEW = np.random.default_rng(2).normal(size=(5, 2))


def model(likelihood=None, mean=None):
    kernel = gp.kernels.Matern52(variance=VARIANCE, lengthscale=LENGTHSCALE)
    return gp.Model(
        kernel, likelihood or gp.likelihoods.Gaussian(NOISE), mean or gp.means.Linear([0.5, -0.2], 0.1)
    )


def data(dtype):
    return jnp.asarray(X, dtype), jnp.asarray(Y, dtype), jnp.asarray(X_NEW, dtype)


def close(got, wanted, dtype, scale=1.0):
    tolerance = 1e-10 if dtype == jnp.float64 else 2e-4
    np.testing.assert_allclose(np.asarray(got, float), wanted, atol=tolerance * scale, rtol=tolerance)


def oracle_parts():
    gram = oracle.matern52(X, X, VARIANCE, LENGTHSCALE)
    cross = oracle.matern52(X, X_NEW, VARIANCE, LENGTHSCALE)
    new = oracle.matern52(X_NEW, X_NEW, VARIANCE, LENGTHSCALE)
    slope = np.array([0.5, -0.2])
    return gram, cross, new, X @ slope + 0.1, X_NEW @ slope + 0.1


@pytest.mark.f32
def test_condition_matches_matrix_inverses(dtype):
    x, y, _ = data(dtype)
    gram, _, _, prior_mean, _ = oracle_parts()
    mean, covariance, log_evidence = oracle.condition(gram, Y, np.full(12, NOISE), prior_mean)
    conditioned = gp.condition(model(), x, y)
    close(conditioned.mean, mean, dtype)
    close(conditioned.variance, np.diag(covariance), dtype)
    close(conditioned.log_evidence, log_evidence, dtype, 10)
    close(conditioned.log_loo, oracle.leave_one_out(gram, Y, np.full(12, NOISE), prior_mean), dtype)
    assert conditioned.status == Status.OK
    assert conditioned.jitter == 0
    assert {
        leaf.dtype for leaf in jax.tree.leaves(conditioned) if jnp.issubdtype(leaf.dtype, jnp.floating)
    } == {dtype}


def test_sites_reproduce_the_posterior(dtype):
    """Posterior precision = K⁻¹ + Λ, precision times mean = K⁻¹ m + λ1: the sites are the likelihood."""
    x, y, _ = data(dtype)
    gram, _, _, prior_mean, _ = oracle_parts()
    conditioned = gp.condition(model(), x, y)
    prior_precision = np.linalg.inv(gram)
    covariance = np.linalg.inv(prior_precision + np.diag(conditioned.sites.lam2))
    close(
        conditioned.mean,
        covariance @ (prior_precision @ prior_mean + np.asarray(conditioned.sites.lam1)),
        dtype,
        100,
    )


@pytest.mark.f32
def test_predict_matches_matrix_inverses(dtype):
    x, y, x_new = data(dtype)
    gram, cross, new, prior_mean, new_mean = oracle_parts()
    mean, covariance = oracle.predict(gram, cross, new, Y, np.full(12, NOISE), prior_mean, new_mean)
    conditioned = gp.condition(model(), x, y)
    close(conditioned.predict(x_new)[0], mean, dtype)
    close(conditioned.predict(x_new)[1], np.diag(covariance), dtype)
    close(conditioned.predict_joint(x_new)[1], covariance, dtype)


def test_known_noise_per_point(dtype):
    x, y, x_new = data(dtype)
    gram, cross, new, prior_mean, new_mean = oracle_parts()
    noise = np.linspace(0.05, 2.0, 12)
    conditioned = gp.condition(model(gp.likelihoods.KnownNoise(noise)), x, y)
    close(conditioned.log_evidence, oracle.condition(gram, Y, noise, prior_mean)[2], dtype, 10)
    close(
        conditioned.predict(x_new)[0],
        oracle.predict(gram, cross, new, Y, noise, prior_mean, new_mean)[0],
        dtype,
    )
    close(conditioned.log_loo, oracle.leave_one_out(gram, Y, noise, prior_mean), dtype)


def test_one_point(dtype):
    conditioned = gp.condition(
        gp.Model(gp.kernels.RBF(2.0, 1.0), gp.likelihoods.Gaussian(0.5)), np.array([[0.3]]), np.array([1.4])
    )
    close(conditioned.mean, [1.4 * 2.0 / 2.5], dtype)
    close(conditioned.variance, [2.0 - 4.0 / 2.5], dtype)


@pytest.mark.f32
def test_gradient_in_every_hyperparameter_input_and_output(dtype):
    """Central differences of the NumPy evidence; error of the differences about 1e-9 relative."""
    x, y, _ = data(dtype)
    grads = jax.grad(gp.log_evidence, argnums=(0, 1, 2))(model(), x, y)

    def value(variance=VARIANCE, lengthscale=LENGTHSCALE, noise=NOISE, shift=0.0, x=X, y=Y):
        gram = oracle.matern52(x, x, variance, lengthscale)
        return oracle.condition(gram, y, np.full(12, noise), x @ np.array([0.5, -0.2]) + 0.1 + shift)[2]

    def difference(fn, step=1e-5):
        return (fn(step) - fn(-step)) / (2 * step)

    unit = np.zeros_like(X)
    unit[3, 1] = 1.0
    wanted = {
        "kernel.variance": difference(lambda h: value(variance=VARIANCE + h)),
        "kernel.lengthscale": [
            difference(lambda h, d=d: value(lengthscale=LENGTHSCALE + h * np.eye(2)[d])) for d in (0, 1)
        ],
        "likelihood.variance": difference(lambda h: value(noise=NOISE + h)),
        "mean.intercept": difference(lambda h: value(shift=h)),
    }
    tolerance = 1e-6 if dtype == jnp.float64 else 2e-3
    for name, number in wanted.items():
        np.testing.assert_allclose(get_leaf(grads[0], name), number, rtol=tolerance)
    np.testing.assert_allclose(grads[1][3, 1], difference(lambda h: value(x=X + h * unit)), rtol=tolerance)
    np.testing.assert_allclose(grads[2][3], difference(lambda h: value(y=Y + h * unit[:, 1])), rtol=tolerance)


def test_derivatives_of_predictions_are_right():
    """d predict / d lengthscale by central differences of the oracle: prediction is differentiable too."""
    x, y, x_new = data(jnp.float64)

    def mean_of(lengthscale):
        changed = gp.replace(model(), {"kernel.lengthscale": lengthscale})
        mean, variance = gp.condition(changed, x, y).predict(x_new)
        return mean[0] + variance[1]

    def slow(lengthscale):
        parts = [
            oracle.matern52(a, b, VARIANCE, lengthscale) for a, b in ((X, X), (X, X_NEW), (X_NEW, X_NEW))
        ]
        mean, cov = oracle.predict(*parts, Y, np.full(12, NOISE), *oracle_parts()[3:])
        return mean[0] + cov[1, 1]

    grad = jax.grad(mean_of)(jnp.asarray(LENGTHSCALE))
    for d in (0, 1):
        step = 1e-5 * np.eye(2)[d]
        np.testing.assert_allclose(
            grad[d], (slow(LENGTHSCALE + step) - slow(LENGTHSCALE - step)) / 2e-5, rtol=1e-6
        )


def test_hessian_is_symmetric_and_matches_differences_of_the_gradient():
    x, y, _ = data(jnp.float64)

    def value(parameters):
        kernel = gp.kernels.Matern52(parameters[0], parameters[1:3])
        return gp.log_evidence(gp.Model(kernel, gp.likelihoods.Gaussian(parameters[3])), x, y)

    parameters = jnp.array([1.7, 0.6, 1.9, 0.3])
    hessian = jax.jit(jax.hessian(value))(parameters)
    grad = jax.jit(jax.grad(value))
    columns = [(grad(parameters + 1e-5 * e) - grad(parameters - 1e-5 * e)) / 2e-5 for e in jnp.eye(4)]
    np.testing.assert_allclose(hessian, jnp.stack(columns), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-12)


def test_new_data_of_the_same_shape_trace_nothing(count_compiles):
    x, y, _ = data(jnp.float64)
    gp.condition(model(), x, y).log_evidence.block_until_ready()
    other = jnp.asarray(X[::-1].copy()), jnp.asarray(Y[::-1].copy())
    with count_compiles() as counter:
        gp.condition(model(gp.likelihoods.Gaussian(0.4)), *other).log_evidence.block_until_ready()
    assert counter.count == 0


def test_vmap_over_models(dtype):
    x, y, _ = data(dtype)
    noises = jnp.asarray([0.1, 0.3, 0.9], dtype)
    values = jax.vmap(lambda noise: gp.log_evidence(model(gp.likelihoods.Gaussian(noise)), x, y))(noises)
    wanted = [gp.log_evidence(model(gp.likelihoods.Gaussian(float(noise))), x, y) for noise in noises]
    np.testing.assert_allclose(values, jnp.stack(wanted), rtol=1e-12)


@pytest.mark.f32
@pytest.mark.parametrize("variance", [1e4, 1e-8])
def test_extreme_kernel_variance(variance, dtype):
    x, y, _ = data(dtype)
    extreme = gp.Model(gp.kernels.RBF(variance, 1.0), gp.likelihoods.Gaussian(NOISE))
    conditioned = gp.condition(extreme, x, y)
    wanted = oracle.condition(oracle.rbf(X, X, variance, 1.0), Y, np.full(12, NOISE), np.zeros(12))
    assert conditioned.status == Status.OK
    relative = 1e-8 if dtype == jnp.float64 else 2e-2
    np.testing.assert_allclose(conditioned.log_evidence, wanted[2], rtol=relative)
    np.testing.assert_allclose(conditioned.mean, wanted[0], atol=relative)


@pytest.mark.f32
def test_duplicate_rows_need_jitter_and_it_is_reported(dtype):
    x = jnp.asarray(np.repeat([[0.0], [1.0]], 6, 0), dtype)
    y = jnp.asarray(np.tile([0.1, -0.1], 6), dtype)
    noiseless = gp.Model(
        gp.kernels.RBF(1.0, 1.0), gp.likelihoods.Gaussian(1e-300 if dtype == jnp.float64 else 1e-30)
    )
    conditioned = gp.condition(noiseless, x, y)
    assert conditioned.status == Status.OK
    assert conditioned.jitter > 0
    assert np.isfinite(conditioned.log_evidence)
    with_noise = gp.condition(gp.Model(gp.kernels.RBF(1.0, 1.0), gp.likelihoods.Gaussian(0.1)), x, y)
    assert with_noise.jitter == 0


@pytest.mark.f32
def test_an_indefinite_gram_gives_nan_and_a_status(dtype):
    x, y, _ = data(dtype)
    broken = gp.condition(
        gp.Model(gp.kernels.RBF(jnp.asarray(-1.0), 1.0), gp.likelihoods.Gaussian(NOISE)), x, y
    )
    assert broken.status == Status.NOT_POSITIVE_DEFINITE
    assert np.isnan(broken.log_evidence)
    infinite = gp.condition(
        gp.Model(gp.kernels.RBF(jnp.asarray(jnp.nan), 1.0), gp.likelihoods.Gaussian(NOISE)), x, y
    )
    assert infinite.status == Status.NON_FINITE


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X[:, 0], Y, ValueError, r"X\[:, None\]"),
        (X, Y[:, None], ValueError, r"y.ravel\(\)"),
        (X, Y[:-1], ValueError, "12 rows but y has 11"),
        (X[:0], Y[:0], ValueError, "at least one row"),
        (X.astype(int), Y, TypeError, "X must be floating point"),
        (X, (Y > 0).astype(int), TypeError, "y must be floating point"),
        (X, Y > 0, TypeError, "y must be floating point"),
        (np.where(X[3, 1] == X, np.nan, X), Y, ValueError, r"X has 1 entries .* \(3, 1\)"),
        (X, np.where(Y[4] == Y, np.inf, Y), ValueError, r"y has 1 entries .* \(4,\)"),
        (X, Y.astype(np.float32), TypeError, "X is float64 but y is float32"),
        (X.astype(np.float16), Y, TypeError, "float32 or float64"),
        (X.astype(object), Y, TypeError, "categories"),
        (X + 1j, Y, TypeError, "floating point"),
    ],
)
def test_bad_data(x, y, error, message):
    with pytest.raises(error, match=message):
        gp.condition(model(), x, y)


def test_bad_new_inputs():
    conditioned = gp.condition(model(), X, Y)
    with pytest.raises(ValueError, match="3 columns"):
        conditioned.predict(np.zeros((2, 3)))
    with pytest.raises(TypeError, match="float32"):
        conditioned.predict(X_NEW.astype(np.float32))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gp.Model(gp.kernels.RBF), TypeError, "parentheses"),
        (lambda: gp.Model(gp.kernels.RBF(), likelihood=0.1), TypeError, "Model.likelihood"),
        (lambda: gp.likelihoods.Gaussian([0.1, 0.2]), ValueError, "KnownNoise"),
        (lambda: gp.likelihoods.KnownNoise(0.1), ValueError, "vector"),
        (lambda: gp.condition(model(gp.likelihoods.KnownNoise(np.ones(3))), X, Y), ValueError, "12 rows"),
        (lambda: gp.condition(model(mean=gp.means.Linear(np.ones(3))), X, Y), ValueError, "3 entries"),
    ],
)
def test_bad_models(make, error, message):
    with pytest.raises(error, match=message):
        make()
