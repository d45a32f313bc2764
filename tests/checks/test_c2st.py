"""Classifier two-sample test: size, linear and nonlinear differences, folds of chains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.checks import c2st
from probinfer.checks.discrepancy.classifier import _split
from probinfer.checks.draws import collect


def draws(seed, n=200):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, 2)))


@pytest.mark.slow
def test_size(key):
    """At most .05 (Bonferroni): of 12 pairs more than 4 are rejected at rate 2e-4."""
    pvalues = [
        c2st(
            jax.random.fold_in(key, s), draws(2 * s), draws(2 * s + 1), num_steps=60, num_permutations=99
        ).pvalue
        for s in range(12)
    ]
    assert sum(p <= 0.05 for p in pvalues) <= 4


def test_power_linear_and_not(key):
    """A shift by 1 sd (accuracy .69) and a ring of the same moments (network only): z above 4 in a fold of 200."""
    shifted = c2st(key, draws(0), draws(1) + jnp.asarray([1.0, 0.0]), num_steps=60, num_permutations=99)
    assert shifted.pvalue <= 0.05
    assert shifted.accuracies["linear"].mean() > 0.6
    angle = np.random.default_rng(5).uniform(0, 2 * np.pi, 200)
    ring = jnp.asarray(np.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], axis=1))
    report = c2st(key, draws(0), ring, num_steps=300, num_permutations=99)
    assert report.accuracies["network"].mean() > 0.65 > report.accuracies["linear"].mean()
    assert report.verdict.startswith("the draws differ in distribution")
    assert report.plot().get_xlabel() == "fold"


def test_folds_take_whole_chains():
    chains = collect("a", draws(0).reshape(4, 50, 2))
    train, test = _split(chains, 1, 2)
    np.testing.assert_array_equal(test.values, chains.values[2:])
    np.testing.assert_array_equal(train, chains.values[:2].reshape(-1, 2))
    single = collect("a", draws(0))
    train, test = _split(single, 0, 2)
    np.testing.assert_array_equal(test.values, single.values[:, :100])
    np.testing.assert_array_equal(train, single.rows[100:])


def test_bad_inputs_are_refused(key):
    with pytest.raises(ValueError, match="folds must be at least 2"):
        c2st(key, draws(0), draws(1), folds=1)
    with pytest.raises(ValueError, match="num_permutations at least 80"):
        c2st(key, draws(0), draws(1), num_permutations=50)
    with pytest.raises(TypeError, match="typed key"):
        c2st(3, draws(0), draws(1))
    with pytest.raises(ValueError, match="needs at least 40"):
        c2st(key, draws(0)[:30], draws(1))
