"""A million draws in single precision: the dead are never chosen, and everybody else as often as the weights say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from probinfer import resampling

SIZE = 2**20
BLOCKS = 64
# standard deviation of a block's offspring count, at most: sqrt of its mean for schemes with independent draws, one or
# two boundary cells for the others
INDEPENDENT = {"multinomial", "residual", "killing"}


def million(first_alive):
    """Weights over thirteen orders of magnitude, half of them zero, runs of zeros at both ends and in the middle."""
    key_weight, key_dead = jax.random.split(jax.random.key(1))
    log_weights = 3 * jax.random.normal(key_weight, (SIZE,), jnp.float32)
    log_weights = jnp.where(jax.random.bernoulli(key_dead, 0.5, (SIZE,)), -jnp.inf, log_weights)
    for run in (slice(0, 1000), slice(500_000, 501_000), slice(SIZE - 1000, SIZE)):
        log_weights = log_weights.at[run].set(-jnp.inf)
    return log_weights.at[0].set(0.0) if first_alive else log_weights


@pytest.mark.parametrize(
    ("name", "given"),
    [(name, False) for name in ("multinomial", "stratified", "systematic", "residual", "killing", "ssp")]
    + [(name, True) for name in ("stratified", "systematic")],
)
def test_a_million_draws(name, given):
    log_weights = million(given)
    scheme = resampling.conditional(name) if given else resampling.get(name)
    ancestors, resampled = scheme(jax.random.key(2), log_weights, SIZE)
    counts = np.bincount(ancestors, minlength=SIZE)
    exact = np.exp(np.asarray(log_weights, float))
    exact = SIZE * exact / exact.sum()
    assert counts[exact == 0].sum() == 0
    assert counts.sum() == SIZE
    assert resampled.dtype == jnp.float32
    blocks, expected = counts.reshape(BLOCKS, -1).sum(axis=1), exact.reshape(BLOCKS, -1).sum(axis=1)
    if name in INDEPENDENT:
        # chi-squared over the blocks, false-fail rate 1e-6; residual and killing vary less than multinomial
        assert np.sum((blocks - expected) ** 2 / expected) < stats.chi2.isf(1e-6, BLOCKS)
    elif not given:
        # the points of all cells inside a block are there; two cells are cut (ssp: one particle is open)
        assert np.abs(blocks - expected).max() < 2.1
    if name not in INDEPENDENT:
        assert np.abs(counts - exact).max() < (2.1 if name == "stratified" else 1.1)


def test_optimal_keeps_no_draw_twice():
    log_weights = million(False)
    ancestors, kept = resampling.optimal(jax.random.key(3), log_weights, SIZE // 4)
    assert np.all(np.diff(ancestors) > 0)
    assert not np.any(np.isneginf(np.asarray(log_weights)[ancestors]))
    log_threshold = np.min(kept)
    np.testing.assert_array_equal(kept, np.maximum(np.asarray(log_weights)[ancestors], log_threshold))
    # the threshold solves its equation, and what is heavier is kept
    exact = np.asarray(log_weights, float)
    np.testing.assert_allclose(np.sum(np.minimum(np.exp(exact - log_threshold), 1)), SIZE // 4, rtol=1e-4)
    assert np.isin(np.flatnonzero(exact > log_threshold + 1e-5), ancestors).all()
