"""A million draws in single precision: zero weights are never chosen, all others as often as their weights require."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from probinfer import resampling

BLOCKS = 64
# standard deviation of a block's offspring count, at most: sqrt of its mean for schemes with independent draws, one or
# two boundary cells for the others
INDEPENDENT = {"multinomial", "residual"}


def sample(size, first_alive):
    """Weights over thirteen orders of magnitude, half of them zero, runs of zeros at both ends and in the middle."""
    rng = np.random.default_rng(1)
    log_weights = np.where(rng.random(size) < 0.5, -np.inf, 3 * rng.standard_normal(size)).astype(np.float32)
    for run in (slice(0, 1000), slice(size // 2, size // 2 + 1000), slice(size - 1000, size)):
        log_weights[run] = -np.inf
    if first_alive:
        log_weights[0] = 0
    return jnp.asarray(log_weights)


@pytest.mark.parametrize(
    ("name", "is_conditional"),
    [(name, False) for name in ("multinomial", "stratified", "systematic", "residual", "ssp")]
    + [(name, True) for name in ("stratified", "systematic")],
)
def test_a_million_draws(name, is_conditional):
    size = 2**17 if is_conditional else 2**20
    log_weights = sample(size, is_conditional)
    scheme = resampling.conditional(name) if is_conditional else resampling.get(name)
    ancestors, resampled = scheme(jax.random.key(2), log_weights, size)
    counts = np.bincount(ancestors, minlength=size)
    exact = np.exp(np.asarray(log_weights, float))
    exact = size * exact / exact.sum()
    assert counts[exact == 0].sum() == 0
    assert counts.sum() == size
    assert resampled.dtype == jnp.float32
    blocks, expected = counts.reshape(BLOCKS, -1).sum(axis=1), exact.reshape(BLOCKS, -1).sum(axis=1)
    if name in INDEPENDENT:
        # chi-squared over the blocks, false-fail rate 1e-6; residual varies less than multinomial
        assert np.sum((blocks - expected) ** 2 / expected) < stats.chi2.isf(1e-6, BLOCKS)
    elif not is_conditional:
        # the points of all cells inside a block are there; two cells are cut (ssp: one particle is open)
        assert np.abs(blocks - expected).max() < 2.1
    if name not in INDEPENDENT:
        assert np.abs(counts - exact).max() < (2.1 if name == "stratified" else 1.1)


def test_optimal_keeps_no_draw_twice():
    size = 2**17
    log_weights = sample(size, False)
    ancestors, new_log_weights = resampling.optimal(jax.random.key(3), log_weights, size // 4)
    assert np.all(np.diff(ancestors) > 0)
    assert not np.any(np.isneginf(np.asarray(log_weights)[ancestors]))
    log_threshold = np.min(new_log_weights)
    np.testing.assert_array_equal(
        new_log_weights, np.maximum(np.asarray(log_weights)[ancestors], log_threshold)
    )
    # the threshold solves its equation, and what is heavier is kept
    exact = np.asarray(log_weights, float)
    np.testing.assert_allclose(np.sum(np.minimum(np.exp(exact - log_threshold), 1)), size // 4, rtol=1e-4)
    assert np.isin(np.flatnonzero(exact > log_threshold + 1e-5), ancestors).all()
