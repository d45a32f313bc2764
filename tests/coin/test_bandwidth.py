"""The bandwidth without a sort against NumPy's sorts."""

import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import kernels
from probinfer.coin.cloud import bandwidth

RNG = np.random.default_rng(0)


@pytest.mark.f32
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_quantile_is_that_of_the_sorted_values_that_are_kept(dtype, share):
    values = np.asarray(RNG.gamma(0.3, size=101) * 1e-3, dtype)
    mask = RNG.random(101) < 0.7
    expected = np.sort(values[mask])[max(int(np.ceil(share * mask.sum())), 1) - 1]
    value = bandwidth.masked_quantile(jnp.asarray(values), jnp.asarray(mask), jnp.asarray(share, dtype))
    assert value.dtype == dtype
    assert value == expected


def test_quantile_of_nothing_is_infinite_and_zeros_are_values():
    no_values, all_values = jnp.zeros(3, bool), jnp.ones(3, bool)
    assert bandwidth.masked_quantile(jnp.ones(3), no_values, jnp.asarray(0.5)) == jnp.inf
    assert bandwidth.masked_quantile(jnp.array([0.0, 0.0, 5.0]), all_values, jnp.asarray(0.5)) == 0


def test_published_rule_is_the_median_over_all_ordered_pairs():
    """An odd N: the median of N² values, N zeros among them, is one of them."""
    x = RNG.normal(size=(31, 2))
    squares = np.sum((x[:, None] - x[None]) ** 2, axis=-1)
    value = bandwidth.squared_bandwidth("published", jnp.asarray(x), jnp.ones(31, bool), jnp.int32(0))
    np.testing.assert_allclose(value, np.median(squares) / np.log(32), rtol=1e-12)


def test_the_quantile_rises_from_2_to_50_percent_in_32_steps():
    x = RNG.normal(size=(40, 3))
    squares = np.sort(np.sum((x[:, None] - x[None]) ** 2, axis=-1)[np.triu_indices(40, 1)])
    all_values = jnp.ones(40, bool)
    for step, share in ((0, 0.02), (16, 0.1), (32, 0.5), (1000, 0.5)):
        value = bandwidth.squared_bandwidth("median", jnp.asarray(x), all_values, jnp.int32(step))
        np.testing.assert_allclose(value, squares[int(np.ceil(share * 780 - 1e-9)) - 1], rtol=1e-12)


def test_particles_that_are_not_kept_do_not_count():
    x = RNG.normal(size=(20, 2))
    mask = np.arange(20) < 15
    step = jnp.int32(50)
    with_mask = bandwidth.squared_bandwidth(
        "median", jnp.asarray(x * np.where(mask, 1, 1e9)[:, None]), jnp.asarray(mask), step
    )
    assert with_mask == bandwidth.squared_bandwidth("median", jnp.asarray(x[:15]), jnp.ones(15, bool), step)


def test_a_sample_of_pairs_estimates_the_median_of_all():
    """4096 pairs of 3000 normal points: standard error of the median's rank 0.8 %; five of them, rate 6e-7."""
    x = np.sort(RNG.normal(size=(3000, 1)), axis=0)  # sorted: the order must not matter
    value = bandwidth.squared_bandwidth("median", jnp.asarray(x), jnp.ones(3000, bool), jnp.int32(99))
    rank = np.mean((x[::7] - x[::11].T) ** 2 <= float(value))
    assert abs(rank - 0.5) < 5 * 0.5 / 64 + 0.01  # and the error of the thinned comparison
    first, second = bandwidth.pair_sample(3000)
    assert len(first) == 4096
    assert not np.any(first == second)


def test_more_than_half_duplicates_leave_a_scale():
    x = np.zeros((10, 2))
    x[-1] = 3.0
    value = bandwidth.squared_bandwidth("median", jnp.asarray(x), jnp.ones(10, bool), jnp.int32(99))
    np.testing.assert_allclose(value, 18 * 9 / 45)


def test_lengthscales_are_in_units_of_the_bandwidth():
    kernel = bandwidth.scaled_kernel(kernels.RBF(lengthscale=0.5**0.5), jnp.asarray(4.0))
    np.testing.assert_allclose(kernel.evaluate(jnp.zeros(2), jnp.ones(2)), np.exp(-2 / 4))
