"""Bands against enumeration for small samples and simulated coverage for large ones, and agreement with the p-value."""

import itertools

import numpy as np
import pytest
from scipy.stats import multinomial

from probinfer.checks import band_power, detectable_errors, ecdf_band, ecdf_pvalue
from probinfer.checks.calibration.bands import staying_probability
from probinfer.checks.power.ranks import simulations_needed


def inside(band, ranks):
    """Whether the distribution function of each row of ranks stays in the band."""
    below = (ranks[:, :, None] < band.edges).sum(axis=1) / ranks.shape[1]
    return np.all((below >= band.lower - 1e-12) & (below <= band.upper + 1e-12), axis=1)


@pytest.mark.parametrize(
    ("num_samples", "num_cells"), [(4, 3), pytest.param(6, 4, marks=pytest.mark.slow), (3, 8)]
)
def test_pvalue_and_band_by_enumeration(num_samples, num_cells):
    samples = np.array(list(itertools.product(range(num_cells), repeat=num_samples)))
    samples = samples[:, ::-1]
    pvalues = np.array([ecdf_pvalue(row, num_cells) for row in samples])
    for value in np.unique(np.round(pvalues, 10)):
        # The p-value is the probability of the p-values that are as small.
        assert np.mean(pvalues <= value + 1e-9) == pytest.approx(value, abs=1e-8)
    band = ecdf_band(num_samples, num_cells, level=0.8)
    assert np.mean(inside(band, samples)) == pytest.approx(band.coverage, abs=1e-10)
    assert band.coverage >= 0.8
    np.testing.assert_array_equal(inside(band, samples), pvalues > 0.2 + 1e-12)


def test_staying_probability_of_unequal_cells():
    mass, low, high, total = np.array([0.2, 0.5, 0.3]), np.array([0, 2]), np.array([2, 4]), 5
    expected = sum(
        multinomial.pmf([a, b, total - a - b], total, mass)
        for a in range(total + 1)
        for b in range(total + 1 - a)
        if low[0] <= a <= high[0] and low[1] <= a + b <= high[1]
    )
    assert staying_probability(low, high, mass, total) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("num_samples", "num_cells"), [(100, 101), (1000, 101), (1000, 1001)])
def test_simulated_coverage(num_samples, num_cells):
    rng, num = np.random.default_rng(1), 2000
    band = ecdf_band(num_samples, num_cells)
    assert band.coverage == pytest.approx(0.95, abs=2e-3)  # what integers allow
    num_inside = 0
    for _ in range(num):
        below = np.searchsorted(np.sort(rng.integers(num_cells, size=num_samples)), band.edges) / num_samples
        num_inside += np.all((below >= band.lower - 1e-12) & (below <= band.upper + 1e-12))
    # 4.9 standard errors of the simulated coverage: fails by chance with probability 1e-6.
    assert num_inside / num == pytest.approx(band.coverage, abs=4.9 * np.sqrt(0.05 * 0.95 / num))


def test_band_and_pvalue_agree():
    rng = np.random.default_rng(2)
    ranks = np.minimum((rng.beta(1, 1.2, size=(150, 100)) * 51).astype(int), 50)
    band = ecdf_band(100, 51)
    pvalues = np.array([ecdf_pvalue(row, 51) for row in ranks])
    np.testing.assert_array_equal(inside(band, ranks), pvalues > 0.05)
    assert 10 < np.sum(pvalues > 0.05) < 140


def test_many_cells_are_looked_at_on_their_own_edges():
    band = ecdf_band(50, 4001)
    assert len(band.edges) < 600
    assert np.all(band.edges == np.round(band.points * 4001))


def test_a_hopeless_sample_has_a_tiny_positive_pvalue():
    assert 0 < ecdf_pvalue(np.zeros(500, int), 101) < 1e-12


@pytest.mark.parametrize("cells", [3, 11])
def test_a_pvalue_is_no_less_than_the_tail_of_one_edge(cells):
    """All ranks are in the first cell with probability (1/cells)^S; for many of these S, 1 - coverage rounds to 0."""
    for size in range(20, 90):
        pvalue = ecdf_pvalue(np.zeros(size, int), cells)
        assert pvalue >= (1 / cells) ** size * (1 - 1e-9) > 0


@pytest.mark.slow
def test_power_by_simulation():
    rng, num, size, draws = np.random.default_rng(3), 400, 100, 40
    for bias, scale in [(0.3, 1.0), (0.0, 0.75), (0.0, 1.4)]:
        num_rejected = 0
        for _ in range(num):
            ranks = (rng.normal(bias, scale, (size, draws)) < rng.normal(size=(size, 1))).sum(axis=1)
            num_rejected += ecdf_pvalue(ranks, draws + 1) <= 0.05
        # 4.9 standard errors at most: fails by chance with probability 1e-6.
        assert band_power(size, draws + 1, 0.05, bias=bias, scale=scale) == pytest.approx(
            num_rejected / num, abs=4.9 * 0.5 / np.sqrt(num)
        )


def test_power_without_error_is_the_size():
    assert band_power(200, 51, 0.05) == pytest.approx(1 - ecdf_band(200, 51).coverage, abs=1e-9)


def test_detectable_errors_shrink_with_the_number_of_simulations():
    small, large = detectable_errors(100, 101, 0.05), detectable_errors(1000, 101, 0.05)
    assert large.bias < small.bias
    assert small.too_narrow < large.too_narrow < 1 < large.too_wide < small.too_wide
    for size, error in [(small.bias, "bias"), (small.too_narrow, "scale"), (small.too_wide, "scale")]:
        assert band_power(100, 101, 0.05, **{error: size}) == pytest.approx(0.9, abs=0.03)
    assert not detectable_errors(8, 101, 0.05 / 30).enough
    needed = simulations_needed(101, 0.05 / 30)
    assert detectable_errors(needed, 101, 0.05 / 30).enough


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ecdf_band(0, 10), "no ranks"),
        (lambda: ecdf_band(10, 1), "two possible values"),
        (lambda: ecdf_band(10, 10, level=1.0), "between 0 and 1"),
        (lambda: ecdf_pvalue(np.array([0, 10]), 10), "must lie in 0 ... 9"),
        (lambda: ecdf_pvalue(np.array([-1, 3]), 10), "drop failed"),
        (lambda: band_power(10, 10, 0.05, scale=0.0), "positive"),
        (lambda: detectable_errors(10, 10, 0.05, power=1.0), "power must"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
