import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.core.status import Status
from probinfer.numerics import weights
from tests.reference import weighted as oracle

CASES = {
    "plain": np.array([0.3, -1.2, 2.0, 0.1, -3.0, 1.1, 0.0]),
    "zeros": np.array([-np.inf, -1.2, 2.0, -np.inf, -3.0, 1.1, -np.inf]),
    "huge": np.array([0.3, -1.2, 2.0, 0.1, -3.0, 1.1, 0.0]) + 3e4,
    "tiny": np.array([0.3, -1.2, 2.0, 0.1, -3.0, 1.1, 0.0]) - 3e4,
}
VALUES = np.array([1.5, -2.0, 0.25, 7.0, 7.0, -1.0, 0.5])
EMPTY = np.full(7, -np.inf)


@pytest.fixture(params=CASES)
def log_weights(request, dtype):
    return jnp.asarray(CASES[request.param], dtype)


@pytest.fixture
def tolerance(dtype):
    return 1e-12 if dtype == jnp.float64 else 2e-6


@pytest.mark.f32
def test_normalized_weights_sum_to_one_and_keep_the_sum(log_weights, tolerance, dtype):
    result = jax.jit(weights.normalize)(log_weights)
    assert result.log_weights.dtype == result.log_sum.dtype == dtype
    np.testing.assert_allclose(
        np.exp(result.log_weights), oracle.probabilities(log_weights), rtol=tolerance * 10
    )
    top = float(jnp.max(log_weights))
    expected = top + np.log(np.sum(np.exp(np.asarray(log_weights, float) - top)))
    np.testing.assert_allclose(result.log_sum, expected, rtol=tolerance)
    np.testing.assert_allclose(weights.log_mean_exp(log_weights), expected - np.log(7), rtol=tolerance)


@pytest.mark.f32
def test_effective_sizes(log_weights, tolerance):
    p = oracle.probabilities(log_weights)
    np.testing.assert_allclose(weights.ess(log_weights), 1 / np.sum(p**2), rtol=10 * tolerance)
    entropy = -np.sum(p[p > 0] * np.log(p[p > 0]))
    np.testing.assert_allclose(weights.entropic_ess(log_weights), np.exp(entropy), rtol=10 * tolerance)


@pytest.mark.parametrize("size", [1, 5])
def test_effective_sizes_of_equal_and_single_weights(size, dtype):
    equal = jnp.full(size, -700.0, dtype)
    single = jnp.full(size, -jnp.inf, dtype).at[0].set(3.0)
    for measure in (weights.ess, weights.entropic_ess):
        np.testing.assert_allclose(measure(equal), size, rtol=1e-5)
        np.testing.assert_allclose(measure(single), 1, rtol=1e-5)


@pytest.mark.f32
def test_moments(log_weights, tolerance, dtype):
    values = jnp.asarray(VALUES, dtype)
    mean, variance = oracle.moments(log_weights, VALUES)
    np.testing.assert_allclose(weights.mean(log_weights, values), mean, rtol=20 * tolerance)
    np.testing.assert_allclose(weights.variance(log_weights, values), variance, rtol=20 * tolerance)
    table = jnp.stack([values, -2 * values], axis=1)
    covariance = weights.covariance(log_weights, table)
    np.testing.assert_allclose(covariance, variance * np.array([[1, -2], [-2, 4]]), rtol=20 * tolerance)
    np.testing.assert_allclose(weights.variance(log_weights, table), np.diag(covariance), rtol=20 * tolerance)


def test_equal_weights_give_the_usual_estimators(dtype):
    values = jnp.asarray(np.stack([VALUES, VALUES**2], axis=1), dtype)
    equal = jnp.zeros(7, dtype)
    np.testing.assert_allclose(weights.mean(equal, values), np.mean(values, axis=0), rtol=1e-5)
    np.testing.assert_allclose(weights.covariance(equal, values), np.cov(values.T), rtol=1e-5)


def test_quantiles(log_weights, dtype):
    levels = np.array([0.0, 0.05, 0.3, 0.5, 0.77, 0.95, 1.0])
    found = jax.jit(weights.quantile)(log_weights, jnp.asarray(VALUES, dtype), jnp.asarray(levels, dtype))
    assert found.tolist() == [oracle.quantile(log_weights, VALUES, p) for p in levels]


def test_quantiles_of_equal_weights_are_order_statistics(dtype):
    size = 1000
    values = jax.random.permutation(jax.random.key(0), jnp.arange(size))
    levels = (jnp.arange(size, dtype=dtype) + 1) / size  # every level is a jump of the distribution function
    found = weights.quantile(jnp.full(size, 2.5, dtype), values, levels)
    assert found.dtype == values.dtype
    assert found.tolist() == list(range(size))


def test_quantiles_by_column_and_of_booleans(dtype):
    values = jnp.asarray(np.arange(12).reshape(4, 3) % 5, dtype)
    log_weights, half = jnp.asarray([0.0, 1.0, -1.0, 0.5], dtype), jnp.asarray([0.5], dtype)
    columns = [weights.quantile(log_weights, values[:, j], half)[0] for j in range(3)]
    assert weights.quantile(log_weights, values, half)[0].tolist() == columns
    truth = weights.quantile(jnp.zeros(4, dtype), jnp.asarray([True, False, False, False]), half)
    assert truth.tolist() == [False]


def test_draws_of_zero_weight_do_not_count(dtype):
    values = jnp.asarray([1.0, jnp.nan, 3.0, jnp.inf], dtype)
    log_weights = jnp.asarray([0.0, -jnp.inf, 0.0, -jnp.inf], dtype)
    kept, equal, level = values[::2], jnp.zeros(2, dtype), jnp.asarray([0.3, 0.9], dtype)
    assert weights.mean(log_weights, values) == 2
    assert weights.variance(log_weights, values) == weights.variance(equal, kept)
    assert weights.covariance(log_weights, values[:, None])[0, 0] == 2
    assert weights.quantile(log_weights, values, level).tolist() == [1, 3]


def test_one_draw_with_all_the_weight_has_no_spread(dtype):
    log_weights = jnp.asarray([0.0, -jnp.inf], dtype)
    assert jnp.isnan(weights.variance(log_weights, jnp.asarray([1.0, 2.0], dtype)))


@pytest.mark.f32
def test_all_weights_zero(dtype):
    empty, values = jnp.asarray(EMPTY, dtype), jnp.asarray(VALUES, dtype)
    assert weights.status(empty) == Status.DEGENERATE_WEIGHTS
    assert weights.normalize(empty).log_sum == -jnp.inf
    assert jnp.all(weights.normalize(empty).log_weights == -jnp.inf)
    assert weights.log_mean_exp(empty) == -jnp.inf
    assert weights.ess(empty) == weights.entropic_ess(empty) == 0
    assert jnp.isnan(weights.mean(empty, values))
    assert jnp.isnan(weights.quantile(empty, values, jnp.asarray([0.5], dtype)))[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_plus_infinity_are_failures(bad, dtype):
    broken = jnp.asarray(CASES["plain"], dtype).at[2].set(bad)
    assert weights.status(broken) == Status.NON_FINITE
    assert jnp.isnan(weights.normalize(broken).log_sum)
    assert jnp.all(jnp.isnan(weights.normalize(broken).log_weights))
    for measure in (weights.ess, weights.entropic_ess, weights.log_mean_exp):
        assert jnp.isnan(measure(broken))
    assert jnp.isnan(weights.mean(broken, jnp.asarray(VALUES, dtype)))


def test_good_weights_have_status_ok(log_weights):
    assert weights.status(log_weights) == Status.OK


def test_a_value_that_is_nan_shows(dtype):
    values = jnp.asarray([1.0, jnp.nan, 3.0], dtype)
    equal = jnp.zeros(3, dtype)
    assert jnp.isnan(weights.mean(equal, values))
    assert jnp.isnan(weights.quantile(equal, values, jnp.asarray([0.1], dtype)))[0]


def test_gradients_are_finite_beside_zero_weights(dtype):
    log_weights = jnp.asarray([0.1, -jnp.inf, 0.7], dtype)
    values = jnp.asarray([1.0, 2.0, 3.0], dtype)

    def total(x):
        return weights.ess(x) + weights.entropic_ess(x) + weights.log_mean_exp(x) + weights.mean(x, values)

    gradient = jax.grad(total)(log_weights)
    assert jnp.all(jnp.isfinite(gradient))
    step = 1e-2 if dtype == jnp.float32 else 1e-5
    ahead, behind = total(log_weights.at[0].add(step)), total(log_weights.at[0].add(-step))
    np.testing.assert_allclose(gradient[0], (ahead - behind) / (2 * step), rtol=1e-3)


def test_batches_are_lifted_by_vmap(dtype):
    batch = jnp.asarray(np.stack([CASES["plain"], CASES["zeros"], EMPTY]), dtype)
    for measure in (weights.ess, weights.status, weights.log_mean_exp):
        np.testing.assert_allclose(
            jax.vmap(measure)(batch), jnp.stack([measure(row) for row in batch]), rtol=1e-5
        )


def test_single_precision_stays_single(dtype):
    log_weights, values = jnp.asarray(CASES["plain"], jnp.float32), jnp.asarray(VALUES, dtype)
    assert weights.ess(log_weights).dtype == jnp.float32
    assert weights.mean(log_weights, values).dtype == dtype
    assert weights.mean(log_weights, jnp.arange(7)).dtype == jnp.float32
