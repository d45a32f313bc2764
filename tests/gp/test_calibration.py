"""Reliability and probability integral transforms: small examples, simulations, and wrong predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from probinfer.gp import likelihoods
from probinfer.gp.prediction import NormalMixture
from probinfer.gp.prediction.calibration import pit, reliability

RNG = np.random.default_rng(5)
P = RNG.beta(0.7, 0.9, size=2000)
Y = (RNG.uniform(size=2000) < P).astype(float)


def test_by_hand():
    p, y = [0.9, 0.1, 0.8, 0.2, 0.6, 0.3], [1, 0, 0, 1, 1, 0]
    got = reliability(p, y, 2)
    np.testing.assert_array_equal(got.num_points, [3, 3])
    np.testing.assert_allclose(got.probability, [0.2, (0.6 + 0.8 + 0.9) / 3])
    np.testing.assert_allclose(got.frequency, [1 / 3, 2 / 3])
    error = 0.5 * (1 / 3 - 0.2) + 0.5 * (2.3 / 3 - 2 / 3)
    np.testing.assert_allclose(got.calibration_error, error)
    np.testing.assert_allclose(got.brier, np.mean((np.array(p) - y) ** 2))
    np.testing.assert_allclose(got.log_loss, -np.mean(stats.bernoulli(p).logpmf(y)))
    for i, wins in enumerate((1, 2)):
        wanted = stats.binomtest(wins, 3).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose([got.lower[i], got.upper[i]], wanted, rtol=1e-12)


def test_calibrated_probabilities():
    """2000 points, 20 bins: about 1 in 20 intervals misses; P(more than 5 miss) is 3e-4 (the seed is fixed).

    The calibration error is near its mean by chance, whose standard deviation is some 15 % of it.
    """
    got = reliability(P, Y, 20)
    assert got.num_points.sum() == 2000
    assert np.ptp(got.num_points) <= 1
    assert np.all(np.diff(got.probability) > 0)
    assert np.sum((got.probability < got.lower) | (got.probability > got.upper)) <= 5
    assert 0.5 < got.calibration_error / got.calibration_error_by_chance < 1.6


def test_the_error_by_chance_is_the_mean_over_labels():
    """400 sets of labels: its Monte Carlo error is below 1 %, the normal approximation good to a few per cent."""
    p = P[:300]
    sets = RNG.uniform(size=(400, 300)) < p
    errors = [reliability(p, labels, 6).calibration_error for labels in sets]
    np.testing.assert_allclose(
        reliability(p, sets[0], 6).calibration_error_by_chance, np.mean(errors), rtol=0.05
    )


def test_overconfident_probabilities_are_seen():
    sharp = P**3 / (P**3 + (1 - P) ** 3)
    got = reliability(sharp, Y)
    assert got.calibration_error > 4 * got.calibration_error_by_chance
    assert np.sum((got.probability < got.lower) | (got.probability > got.upper)) >= 4
    assert got.log_loss > reliability(P, Y).log_loss
    assert got.brier > reliability(P, Y).brier


def test_ties_stay_together_and_few_points_suffice():
    got = reliability([0.5] * 50 + [0.9] * 7, [0, 1] * 25 + [1] * 7, 10)
    np.testing.assert_array_equal(got.num_points, [50, 7])
    np.testing.assert_allclose(got.frequency, [0.5, 1.0])
    one = reliability([0.3], [1], 10)
    np.testing.assert_allclose([one.frequency[0], one.upper[0]], 1.0)
    assert reliability([0.0, 1.0], [1, 1], 2).log_loss == np.inf
    assert np.isfinite(reliability([0.0, 1.0], [0, 1], 2).log_loss)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([0.1, 0.2], [1.0]), "vectors of equal length"),
        (([], []), "vectors of equal length"),
        (([[0.1]], [[1]]), "vectors of equal length"),
        (([1.1], [1]), r"within \[0, 1\]"),
        (([np.nan], [1]), r"within \[0, 1\]"),
        (([0.5], [2]), "labels must be 0 or 1"),
        (([0.5], [1], 0), "num_bins must be at least 1"),
    ],
)
def test_bad_input(arguments, match):
    with pytest.raises(ValueError, match=match):
        reliability(*arguments)
    with pytest.raises(ValueError, match="0 < level < 1"):
        reliability([0.5], [1], level=1.0)


# Probability integral transforms


def test_pit_of_real_outputs():
    """Right, too narrow and shifted predictions; the p-value of the right one is above 1e-3 (NumPy's seed is fixed)."""
    x = RNG.normal(size=500)
    zeros, ones = jnp.zeros((1, 500)), jnp.ones((1, 500))
    right = pit(NormalMixture(zeros, ones), x)
    np.testing.assert_allclose(right.values, stats.norm.cdf(x), rtol=1e-12)
    assert right.pvalue == stats.kstest(right.values, "uniform").pvalue > 1e-3
    assert pit(NormalMixture(zeros, 0.2 * ones), x).pvalue < 1e-6
    assert pit(NormalMixture(zeros + 0.5, ones), x).pvalue < 1e-6


@pytest.mark.parametrize("name", ["counts", "classes"])
def test_pit_of_discrete_outputs(name, key):
    """Uniform for right predictions (one of 10^4 keys fails), and within the jump; wrong predictions are detected.

    With means off by 0.8 the largest p-value of 200 keys was 1e-17; with 0.5, two of 200 were above 1e-6 for classes.
    """
    draw_key, pit_key = jax.random.split(key)
    likelihood = likelihoods.Poisson() if name == "counts" else likelihoods.Bernoulli()
    means = jnp.linspace(-1.0, 1.5, 1000)[None]
    right = likelihood.predictive(means, jnp.full_like(means, 0.3))
    if name == "counts":
        f = means[0] + np.sqrt(0.3) * RNG.normal(size=1000)
        y = jnp.asarray(RNG.poisson(np.exp(f)).astype(float))
    else:
        y = right.sample(draw_key, 1)[0]
    got = pit(right, y, pit_key)
    assert got.pvalue > 1e-4
    below, above = np.asarray(right.cdf(y - 1)), np.asarray(right.cdf(y))
    assert np.all((below <= got.values) & (got.values <= above))
    wrong = likelihood.predictive(means + 0.8, jnp.full_like(means, 0.3))
    assert pit(wrong, y, pit_key).pvalue < 1e-6
    with pytest.raises(ValueError, match="pass a key"):
        pit(right, y)


def test_pit_wants_one_output_a_point():
    class Three:
        def cdf(self, y):
            return np.full(3, 0.5)

    with pytest.raises(ValueError, match="one entry per predicted point"):
        pit(Three(), jnp.zeros(1))
