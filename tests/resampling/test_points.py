"""Systematic resampling: exact counts, zero weights, and equality of batched and single calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.resampling import systematic
from probinfer.resampling.counts import expected_offspring, relative_weights
from probinfer.resampling.points import systematic_counts
from tests.reference import weighted as oracle

# one-sided, badly scaled, with zeros in front, in the middle and behind
LOG_WEIGHTS = np.array([-np.inf, -0.2, -7.0, -np.inf, 1.3, 0.4, -2.0, -np.inf, -np.inf, 0.1, -4.0, -np.inf])
cumulative = jax.jit(systematic_counts, static_argnums=2)


@pytest.mark.parametrize("num", [1, 7, 40])
@pytest.mark.parametrize("offset", [0.0, 0.013, 0.5, 0.871, 1 - 2.0**-24])
def test_offspring_are_those_of_exact_arithmetic(num, offset, dtype):
    # quarters and eighths: every cumulative weight is exact, ties between points and bounds included
    probabilities = np.array([0, 0.125, 0, 0.25, 0.125, 0.5, 0, 0])
    offspring = np.diff(
        cumulative(jnp.asarray(num * probabilities, dtype), jnp.asarray(offset, dtype), num), prepend=0
    )
    assert offspring.tolist() == oracle.systematic_counts(probabilities, offset, num).tolist()


def test_weight_zero_is_never_chosen_and_every_bound_is_right():
    size = 2**20
    # single precision, half of the weights zero, the others over thirteen orders of magnitude
    rng = np.random.default_rng(size)
    log_weights = np.where(rng.random(size) < 0.5, -np.inf, 5 * rng.standard_normal(size)).astype(np.float32)
    log_weights[[0, 1, size - 2, size - 1]] = -np.inf
    probabilities = expected_offspring(relative_weights(jnp.asarray(log_weights)), size)
    exact = np.asarray(probabilities, float) / np.sum(np.asarray(probabilities, float))
    for offset in (0.0, 0.4321, 1 - 2.0**-24):
        counts = np.asarray(cumulative(probabilities, jnp.float32(offset), size))
        offspring = np.diff(counts, prepend=0)
        assert offspring.min() >= 0
        assert offspring[exact == 0].sum() == 0
        assert counts[-1] == size
        excess = counts - (size * np.cumsum(exact) - offset)  # ceil(x) - x, up to rounding of x
        assert excess.min() > -0.002
        assert excess.max() < 1.002


def test_weight_zero_is_never_chosen_over_many_keys():
    # blackjax's systematic resampling chooses a zero in about 3 of 10^6 draws of this kind
    log_weights = jax.random.normal(jax.random.key(3), (64,), jnp.float32)
    log_weights = log_weights.at[::3].set(-jnp.inf).at[-2:].set(-jnp.inf)
    keys = jax.random.split(jax.random.key(4), 50_000)
    ancestors, _ = jax.vmap(systematic, (0, None, None))(keys, log_weights, 64)
    assert not np.isin(ancestors, np.flatnonzero(log_weights == -jnp.inf)).any()


@pytest.mark.f32
def test_integers_are_expected_exactly(dtype):
    assert jnp.all(expected_offspring(jnp.full(49, 0.3, dtype), 49) == 1)
    thirds = jnp.exp(jnp.log(jnp.asarray([1 / 3, 1 / 3, 0, 1 / 6, 1 / 6], dtype)))
    assert expected_offspring(thirds, 6).tolist() == [2, 2, 0, 1, 1]


def test_same_batched_and_no_retrace(key, count_compiles, dtype):
    batch = [jnp.asarray(row, dtype) for row in (LOG_WEIGHTS, LOG_WEIGHTS[::-1].copy(), np.zeros(12))]
    keys = list(jax.random.split(key, 3))
    batched, _ = jax.vmap(lambda k, x: systematic(k, x, 12))(jnp.stack(keys), jnp.stack(batch))
    systematic(keys[0], batch[0], 12)
    with count_compiles() as counter:
        singles = [systematic(k, x, 12)[0] for k, x in zip(keys, batch, strict=True)]
    assert counter.count == 0
    assert batched.tolist() == [single.tolist() for single in singles]
