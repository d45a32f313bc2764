"""Calibration against scikit-learn and brute force; maps that keep the order; figures by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

from probinfer.lm.rewards import calibration


def steps(num, slope=0.4, offset=-0.5, seed=0, decimals=None):
    """Scores whose true logit is slope * score + offset: overconfident."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.5, 3.0, num)
    logits = logits if decimals is None else np.round(logits, decimals)
    return logits, (rng.random(num) < special.expit(slope * logits + offset)).astype(int)


def loss(theta, logits, labels):
    """Mean negative log likelihood with Platt's targets."""
    right = labels.sum()
    targets = np.where(labels, (right + 1) / (right + 2), 1 / (len(labels) - right + 2))
    found = theta[0] * logits + theta[1]
    return np.mean(np.logaddexp(0, found) - targets * found)


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_affine_maps_have_the_largest_likelihood(method):
    logits, labels = steps(300)
    fitted = calibration.calibrate(logits, labels, method)
    best = np.array([float(fitted.slope), float(fitted.offset)])
    assert (best[1] == 0) == (method == "temperature")
    free = np.array([1.0, float(method == "platt")])
    for direction in np.random.default_rng(1).normal(size=(20, 2)) * free * 1e-3:
        assert loss(best + direction, logits, labels) > loss(best, logits, labels)


def test_platt_on_many_steps_is_logistic_regression_and_finds_the_truth():
    logits, labels = steps(20_000)
    fitted = calibration.calibrate(logits, labels, "platt")
    peer = LogisticRegression(C=1e12, tol=1e-10).fit(logits[:, None], labels)
    np.testing.assert_allclose(
        [fitted.slope, fitted.offset], [peer.coef_[0, 0], peer.intercept_[0]], atol=2e-3
    )
    # standard errors are about 0.008 and 0.02: five of them
    np.testing.assert_allclose([fitted.slope, fitted.offset], [0.4, -0.5], atol=0.1)
    before, after = (calibration.reliability(x, labels) for x in (logits, fitted(jnp.asarray(logits))))
    assert after.ece < 0.02 < before.ece
    assert after.brier < before.brier
    assert after.auc == pytest.approx(before.auc, abs=1e-12)


def test_pools_are_those_of_scikit_learn():
    rng = np.random.default_rng(2)
    for size in (1, 2, 5, 50):
        means, weights = rng.normal(size=size), rng.integers(1, 5, size)
        pool = calibration.pool_adjacent(means, weights)
        found = (np.bincount(pool, means * weights) / np.bincount(pool, weights))[pool]
        peer = IsotonicRegression().fit_transform(np.arange(size), means, sample_weight=weights)
        np.testing.assert_allclose(found, peer, rtol=1e-12)


@pytest.mark.parametrize("decimals", [None, 0])
def test_isotonic_without_smoothing_is_that_of_scikit_learn(decimals):
    logits, labels = steps(400, decimals=decimals)
    fitted = calibration.calibrate(logits, labels, "isotonic", smoothing=1e-9)
    peer = IsotonicRegression().fit(logits, labels)
    inside = peer.predict(logits)
    found = special.expit(np.asarray(fitted(jnp.asarray(logits))))
    np.testing.assert_allclose(found, inside, atol=1e-6)


def test_smoothed_isotonic_maps_are_finite_monotone_and_laplace():
    logits = np.array([-2.0, -1.0, -1.0, 1.0, 2.0, 3.0])
    fitted = calibration.calibrate(logits, [0, 0, 0, 1, 1, 1], "isotonic")
    np.testing.assert_allclose(fitted.knots, [-2, -1, 1, 3], rtol=1e-6)
    np.testing.assert_allclose(special.expit(np.asarray(fitted.values)), [0.2, 0.2, 0.8, 0.8], rtol=1e-6)
    # 90 of 100 and then 1 of 1: smoothed to 91/102 and 2/3, which is out of order, so pooled again
    turned = calibration.calibrate([*[0.0] * 100, 1.0], [*[1] * 90, *[0] * 10, 1], "isotonic")
    np.testing.assert_allclose(special.expit(np.asarray(turned.values)), [93 / 105] * 2, rtol=1e-6)
    many = calibration.calibrate(*steps(500, seed=3), "isotonic")
    grid = np.asarray(many(jnp.linspace(-30, 30, 2001)))
    assert np.isfinite(grid).all()
    assert (np.diff(grid) >= 0).all()
    assert (np.diff(many.knots) > 0).all()


@pytest.mark.f32
@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_maps_are_pytrees_that_keep_the_order(method, dtype):
    logits, labels = steps(200)
    fitted = calibration.calibrate(logits, labels, method)
    x = jnp.array([-jnp.inf, -40.0, -1.0, 0.0, 2.0, 40.0, jnp.inf], dtype)
    traces = []

    @jax.jit
    def run(fitted, x):
        traces.append(1)
        return fitted(x)

    values = run(fitted, x)
    assert values.dtype == dtype
    assert not jnp.isnan(values).any()
    assert (jnp.diff(values[1:-1]) >= 0).all()
    assert values[0] <= values[1]
    assert values[-1] >= values[-2]
    np.testing.assert_allclose(jax.vmap(fitted)(x), values, rtol=1e-6)
    if method != "isotonic":
        run(calibration.calibrate(-logits, 1 - labels, method), x)
        assert len(traces) == 1


def test_separated_and_useless_scores():
    separated = calibration.calibrate([-1.0, -1.0, 1.0, 1.0], [0, 0, 1, 1], "platt")
    assert float(separated.slope) == pytest.approx(special.logit(3 / 4), rel=1e-4)
    backwards = calibration.calibrate([-1.0, -1.0, 1.0], [1, 1, 0], "platt")
    assert float(backwards.slope) == 0
    assert float(backwards.offset) == pytest.approx(special.logit((2 * 3 / 4 + 1 / 3) / 3), rel=1e-4)
    assert float(backwards(jnp.array(jnp.inf))) == float(backwards.offset)
    flat = calibration.calibrate([0.0, 0.0, 0.0], [1, 0, 1], "temperature")
    assert jnp.isfinite(flat.slope)


def test_figures_are_those_of_scikit_learn_and_by_hand():
    logits, labels = steps(400, decimals=1)  # with ties
    said = special.expit(logits)
    found = calibration.reliability(logits, labels)
    assert found.auc == pytest.approx(roc_auc_score(labels, logits), rel=1e-12)
    assert found.brier == pytest.approx(brier_score_loss(labels, said), rel=1e-12)
    assert found.counts.sum() == found.num_steps == 400
    error = 0.0
    for low, high, predicted, observed, count in zip(*found[:5], strict=True):
        inside = (said >= low) & ((said < high) | (high == 1))
        assert count == inside.sum()
        assert predicted == pytest.approx(said[inside].mean())
        assert observed == pytest.approx(labels[inside].mean())
        error += inside.sum() / 400 * abs(said[inside].mean() - labels[inside].mean())
    assert found.ece == pytest.approx(error)
    assert str(found).startswith("400 steps: AUC 0.")
    assert len(str(found).splitlines()) == 2 + len(found.counts)


def test_the_variance_of_the_area_is_that_of_its_placements():
    logits, labels = steps(60, decimals=0, seed=4)
    right, wrong = logits[labels == 1], logits[labels == 0]
    pairs = (right[:, None] > wrong).astype(float) + 0.5 * (right[:, None] == wrong)
    by_right, by_wrong = pairs.mean(axis=1), pairs.mean(axis=0)
    expected = by_right.var(ddof=1) / len(right) + by_wrong.var(ddof=1) / len(wrong)
    area, variance = calibration.auc(logits, labels)
    assert area == pytest.approx(pairs.mean(), rel=1e-12)
    assert variance == pytest.approx(expected, rel=1e-9)


def test_the_interval_covers_the_true_area():
    # normal scores one apart: the true area is Phi(1 / sqrt 2); the coverage of 400 intervals at 95 % is tested at 5.5
    # standard errors of 0.011 (false-fail rate 4e-8)
    rng = np.random.default_rng(6)
    truth = special.ndtr(1 / np.sqrt(2))
    labels = np.arange(100) < 40
    hits = 0
    for _ in range(400):
        low, high = calibration.reliability(rng.normal(size=100) + labels, labels).auc_interval
        hits += low <= truth <= high
    assert abs(hits / 400 - 0.95) < 0.06


def test_infinite_scores_and_perfect_order():
    found = calibration.reliability([-np.inf, 0.0, np.inf], [0, 0, 1])
    assert found.auc == 1
    assert found.auc_interval == (1.0, 1.0)
    assert found.brier == pytest.approx(0.25 / 3)
    assert found.lower.tolist() == [0.0, 0.5, 0.9]


def test_bad_input_is_refused_in_words():
    good = [0.0, 1.0], [0, 1]
    with pytest.raises(ValueError, match="method must be one of temperature, platt, isotonic; got 'beta'"):
        calibration.calibrate(*good, "beta")
    with pytest.raises(ValueError, match=r"both be \(n,\), got \(2,\) and \(3,\)"):
        calibration.calibrate([0.0, 1.0], [0, 1, 1])
    with pytest.raises(ValueError, match="1 of 2 logits are NaN"):
        calibration.reliability([0.0, np.nan], [0, 1])
    with pytest.raises(ValueError, match="must be finite to calibrate on"):
        calibration.calibrate([0.0, np.inf], [0, 1])
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        calibration.calibrate([0.0, 1.0], [0, 2])
    for labels in ([1, 1], [0, 0]):
        with pytest.raises(ValueError, match="labels are alike"):
            calibration.reliability([0.0, 1.0], labels)
    with pytest.raises(ValueError, match="alike"):
        calibration.reliability([], [])
    with pytest.raises(ValueError, match="smoothing must be positive"):
        calibration.calibrate(*good, "isotonic", smoothing=0)
    for bad in ({"num_bins": 0}, {"level": 1.0}):
        with pytest.raises(ValueError, match="num_bins must be positive and level between 0 and 1"):
            calibration.reliability(*good, **bad)
