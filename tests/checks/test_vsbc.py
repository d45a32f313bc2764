"""Symmetry of ranks: enumeration of all sign flips, size, power, and independence of widths."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import ks_2samp

from probinfer.checks import vsbc
from probinfer.checks.calibration.symmetry import symmetry_pvalue

S, L = 300, 40


def simulations(key, shift=0.0, factor=1.0):
    keys = jax.random.split(key)
    theta = jax.random.normal(keys[0], (S, 2))
    return shift + factor * jax.random.normal(keys[1], (S, L, 2)), theta


@pytest.mark.parametrize("num", [1, 2, 7, 10])
def test_pvalue_by_all_sign_flips(num):
    rng = np.random.default_rng(num)
    distances = rng.uniform(0, 0.5, num)
    flips = np.array(list(itertools.product([-1, 1], repeat=num)))
    distance = np.array(
        [ks_2samp(0.5 + f * distances, 0.5 - f * distances, method="asymp").statistic for f in flips]
    )
    for row in rng.choice(len(flips), size=min(6, len(flips)), replace=False):
        exact = np.mean(distance >= distance[row] - 1e-12)
        assert symmetry_pvalue(0.5 + flips[row] * distances) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize(("num", "height"), [(200, 9), (200, 30), (1000, 70)])
def test_tail_by_stepping_the_walk(num, height):
    inside = np.zeros(2 * height - 1)
    inside[height - 1] = 1
    for _ in range(num):
        inside = np.convolve(inside, [0.5, 0, 0.5])[1:-1]
    # A walk that climbs to the height and then swings below it has this excursion.
    signs = np.where(np.arange(num) < height, 1, np.where(np.arange(num) % 2, 1, -1))
    if height % 2:
        signs[height:] *= -1
    assert np.max(np.abs(np.cumsum(signs))) == height
    values = 0.5 + signs * np.linspace(0.49, 0.01, num)
    assert symmetry_pvalue(values) == pytest.approx(1 - inside.sum(), abs=1e-10)


@pytest.mark.f32
def test_widths_are_not_its_business(key, dtype):
    for factor in (0.6, 1.0, 1.8):
        draws, theta = simulations(key, factor=factor)
        report = vsbc(key, draws, theta, level=3e-5)  # the rate of false alarms at each width
        assert draws.dtype == dtype
        assert report.passed
        assert "widths and correlations are not tested" in report.verdict


@pytest.mark.parametrize(("shift", "word"), [(0.5, "too high"), (-0.5, "too low")])
def test_bias_is_found_with_its_side(key, shift, word):
    draws, theta = simulations(key, shift=jnp.asarray([shift, 0.0]))
    report = vsbc(key, draws, theta)
    assert 0.1 < report.bias < 0.5
    assert "value[0]" in report.rejected
    assert report.pvalues["value[1]"] > 1e-4  # the rate of false alarms
    assert f"value[0] {word}" in report.verdict


def test_size(key):
    # 11 of 50 at the level .05 (mean 2.5 at most): probability 5e-5.
    alarms = sum(vsbc(k, *simulations(k)).passed is False for k in jax.random.split(key, 50))
    assert alarms < 11


def test_cannot_tell(key):
    draws, theta = simulations(key)
    few = vsbc(key, draws[:6], theta[:6], level=1e-4)  # the rate of false alarms, here and below
    assert few.passed is None
    assert "run more simulations" in few.verdict
    failed = vsbc(key, draws.at[:200].set(jnp.nan), theta, level=1e-4)
    assert failed.passed is None
    assert "200 simulations failed" in failed.verdict
    constant = vsbc(key, jnp.broadcast_to(theta[:, None], draws.shape), theta, level=1e-4)
    assert constant.passed is None
    assert "cannot tell about value[0]" in constant.verdict


def test_plot(key):
    draws, theta = simulations(key, shift=0.6)
    axes = vsbc(key, draws, theta).plot()
    assert len(axes.lines) == 3


def test_bad_input(key):
    draws, theta = simulations(key)
    with pytest.raises(ValueError, match="false alarm"):
        vsbc(key, draws, theta, level=0.9)
    with pytest.raises(ValueError, match="simulations"):
        vsbc(key, draws, theta[:-1])
    with pytest.raises(TypeError, match="key"):
        vsbc(0, draws, theta)
    with pytest.raises(ValueError, match="no ranks"):
        symmetry_pvalue(np.zeros(0))
