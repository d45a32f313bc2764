"""TARP: a test for each known defect of released code, and for the claims that the references allow."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.checks import RankTable, TARPReport, tarp, uniformity
from probinfer.checks.calibration.references import References, regression_references

S, L, D = 300, 50, 3
module = sys.modules["probinfer.checks.calibration.coverage"]


def conjugate(key, num=S):
    """theta ~ N(0, I), x ~ N(theta, I): the posterior is N(x / 2, I / 2)."""
    keys = jax.random.split(key, 3)
    theta = jax.random.normal(keys[0], (num, D))
    x = theta + jax.random.normal(keys[1], theta.shape)
    return theta, x, jax.random.normal(keys[2], (num, L, D))


def posterior(x, noise, factor=1.0):
    return x[:, None] / 2 + factor * np.sqrt(0.5) * noise


def halfway(key, x):
    return x / 2


def x_free(key, x):
    return jax.random.normal(key, (D,))


def report_of(ranks, num_draws):
    ranks = np.asarray(ranks)
    table = RankTable(
        ranks=ranks[:, None],
        names=("tarp",),
        num_draws=num_draws,
        thin=1,
        failures=(),
        constant=(),
        uses_data=(True,),
    )
    return TARPReport(uniformity(table), References(np.zeros((len(ranks), 1)), True, None))


def test_defect_1_imports_need_only_declared_packages():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['deprecation', 'matplotlib', 'sklearn']));"
        "from probinfer.checks import tarp"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_defect_2_the_credibility_axis_runs_from_zero_to_one():
    report = report_of(np.tile(np.arange(40, 61), 10), 100)
    assert report.credibility[[0, -1]].tolist() == [0, 1]
    assert report.coverage[[0, -1]].tolist() == [0, 1]
    assert np.max(np.abs(report.coverage - report.credibility)) == pytest.approx(0.4, abs=0.01)
    assert report.passed is False


def test_defect_3_the_callers_arrays_stay_as_they_are(key):
    theta, x, noise = (np.array(a) for a in conjugate(key))
    draws = np.array(posterior(x, noise))
    copies = [a.copy() for a in (draws, theta, x)]
    tarp(key, draws, theta, x).bootstrap(key, 20)
    for before, after in zip(copies, (draws, theta, x), strict=True):
        np.testing.assert_array_equal(before, after)


def test_defect_4_replicates_differ_and_one_key_repeats_them():
    report = report_of(np.random.default_rng(0).integers(0, 51, 200), 50)
    curves = report.bootstrap(jax.random.key(7), 20)
    assert len(np.unique(curves, axis=0)) == 20
    np.testing.assert_array_equal(curves, report.bootstrap(jax.random.key(7), 20))


def test_defect_5_bootstrap_keeps_references_with_their_simulations(key):
    theta, x, noise = conjugate(key)
    report = tarp(key, posterior(x, noise), theta, x, reference=halfway)
    curves = report.bootstrap(key, 1000)
    assert curves.shape[1] == len(report.coverage)
    # The mean of a resampled proportion is the proportion: 5.5 standard errors at each of 52 points.
    np.testing.assert_allclose(curves.mean(axis=0), report.coverage, atol=5.5 * 0.5 / np.sqrt(1000 * S))


@pytest.mark.parametrize("whiten", ["pooled", "prior"])
def test_defect_6_origin_and_units_do_not_matter(key, whiten):
    theta, x, noise = conjugate(key)
    draws, units = posterior(x, noise, 1.3), jnp.asarray([1.0, 1e3, 1e-2])
    plain = tarp(key, draws, theta, x, whiten=whiten)
    moved = tarp(key, 100 + draws * units, 100 + theta * units, x, whiten=whiten)
    # Rounding may move a distance across another: at most a handful of the S ranks, by one.
    assert np.sum(plain.ranks != moved.ranks) <= 3
    assert plain.pvalue == pytest.approx(moved.pvalue, rel=0.2)


def test_defect_7_references_have_the_units_of_theta(key):
    theta, x, noise = conjugate(key)
    draws, units = posterior(x, noise), jnp.asarray([1.0, 1e3, 1e-2])
    plain = tarp(key, draws, theta, x, reference=halfway)
    scaled = tarp(
        key,
        draws * units,
        theta * units,
        x,
        reference=jax.tree_util.Partial(lambda u, k, x: u * x / 2, units),
    )
    assert np.sum(plain.ranks != scaled.ranks) <= 3
    unwhitened = tarp(key, draws, theta, x, reference=halfway, whiten=None)
    true_squares = jnp.sum((theta - x / 2) ** 2, axis=-1)[:, None]
    ranks = np.sum(jnp.sum((draws - x[:, None] / 2) ** 2, axis=-1) < true_squares, axis=1)
    np.testing.assert_array_equal(unwhitened.ranks, ranks)


@pytest.mark.parametrize("num_draws", [50, 99, 100])
def test_defect_8_uniform_ranks_lie_on_the_diagonal(num_draws):
    report = report_of(np.tile(np.arange(num_draws + 1), 3), num_draws)
    np.testing.assert_allclose(report.coverage, report.credibility, atol=1e-12)
    assert report.pvalue == pytest.approx(1, abs=1e-6)


def test_defect_9_the_global_generator_is_left_alone(key):
    theta, x, noise = conjugate(key)
    before = np.random.get_state()  # noqa: NPY002
    tarp(key, posterior(x, noise), theta, x).bootstrap(key, 5)
    after = np.random.get_state()  # noqa: NPY002
    assert before[2] == after[2]
    np.testing.assert_array_equal(before[1], after[1])


def test_defect_10_a_bootstrap_computes_no_distance(key, monkeypatch):
    theta, x, noise = conjugate(key)
    report = tarp(key, posterior(x, noise), theta, x)
    monkeypatch.setattr(module, "_distances", None)
    assert report.bootstrap(key, 100).shape[0] == 100


@pytest.mark.slow
def test_defect_11_pvalues_are_uniform_if_the_posterior_is_right(key):
    pvalues = []
    for k in jax.random.split(key, 80):
        theta, x, noise = conjugate(k, 100)
        pvalues.append(tarp(k, posterior(x, noise), theta, x).pvalue)
    # Dvoretzky-Kiefer-Wolfowitz at 1e-4 for 80 values, plus the steps of a discrete statistic (0.01).
    for level in np.linspace(0.05, 0.95, 19):
        assert abs(np.mean(np.asarray(pvalues) <= level) - level) < np.sqrt(np.log(2e4) / 160) + 0.01
    # 14 of 80 at the level .05: probability 4e-5 if the level is kept.
    assert np.sum(np.asarray(pvalues) <= 0.05) < 14


def test_the_default_sees_a_posterior_that_ignores_the_data(key):
    theta, x, noise = conjugate(key)
    report = tarp(key, noise, theta, x)
    assert report.references.uses_data
    assert 0.2 < report.references.explained < 0.7  # one half
    assert report.passed is False
    blind = tarp(key, noise, theta, x, reference=x_free, level=1e-4)  # the rate of false alarms
    assert blind.passed is None
    assert "no claim of accuracy" in blind.verdict


@pytest.mark.parametrize("factor", [0.6, 1.6])
def test_wrong_widths_fail_whatever_the_references(key, factor):
    theta, x, noise = conjugate(key)
    for reference in (None, x_free):
        assert tarp(key, posterior(x, noise, factor), theta, x, reference=reference).passed is False


@pytest.mark.f32(slow=True)
def test_a_right_posterior_passes_and_says_what_could_have_been_seen(key, dtype):
    theta, x, noise = conjugate(key)
    report = tarp(key, posterior(x, noise), theta, x, level=1e-4)  # the rate of false alarms
    assert theta.dtype == dtype
    assert report.passed
    assert "could have found a bias" in report.verdict


def test_data_without_information_allow_no_claim(key):
    theta, _, noise = conjugate(key)
    report = tarp(key, noise, theta, jax.random.normal(jax.random.key(5), (S, 2)), level=1e-4)
    assert report.passed is None
    assert "found no information about theta in x" in report.verdict
    assert tarp(key, noise, theta, None, level=1e-4).passed is None


def test_a_scale_that_no_linear_regression_sees(key):
    keys = jax.random.split(key, 3)
    log_scale = 0.7 * jax.random.normal(keys[0], (S, 1))
    x = jnp.exp(log_scale) * jax.random.normal(keys[1], (S, 15))
    report = tarp(key, 0.7 * jax.random.normal(keys[2], (S, L, 1)), log_scale, x)
    assert report.passed is False


def test_references_know_only_the_past():
    rng = np.random.default_rng(0)
    theta, x, others = rng.normal(size=(128, 2)), rng.normal(size=(128, 3)), rng.normal(size=(128, 2))
    points = regression_references(np.random.default_rng(1), x, theta, others).points
    np.testing.assert_array_equal(points[:8], others[:8])
    for changed, untouched in [(20, 32), (64, 128), (127, 128)]:
        other = theta.copy()
        other[changed] += 5
        again = regression_references(np.random.default_rng(1), x, other, others).points
        np.testing.assert_array_equal(points[:untouched], again[:untouched])
        assert np.any(points[untouched:] != again[untouched:]) == (untouched < 128)


def test_trees_and_failures(key):
    theta, x, noise = conjugate(key)
    draws = posterior(x, noise).at[4, 2].set(jnp.nan)
    tree = ({"a": draws[..., 0], "b": draws[..., 1:]}, {"a": theta[:, 0], "b": theta[:, 1:]}, {"y": x})
    report = tarp(key, *tree)
    assert report.ranks[4] == -1
    assert "1 simulations failed: a draw is NaN" in report.verdict
    np.testing.assert_array_equal(report.ranks, tarp(key, draws, theta, x).ranks)


def test_autocorrelated_draws_are_thinned(key):
    theta, x, _ = conjugate(key)
    noise = jnp.repeat(jax.random.normal(key, (S, 20, D)), 10, axis=1)
    report = tarp(key, posterior(x, noise), theta, x)
    assert report.uniform.ranks.thin >= 8


def test_plot_draws_coverage_and_band(key):
    theta, x, noise = conjugate(key)
    axes = tarp(key, posterior(x, noise, 1.6), theta, x).plot()
    assert axes.get_xlabel() == "credibility"
    assert len(axes.collections) == 1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"reference": np.zeros((S, D))}, TypeError, "must be a function"),
        ({"reference": lambda key, x: jnp.zeros(D + 1)}, ValueError, "shaped like one theta"),
        ({"whiten": "posterior"}, ValueError, "whiten must be"),
        ({"theta": jnp.zeros((S, D + 1))}, ValueError, "match"),
        ({"x": jnp.zeros((S - 1, D))}, ValueError, "x must have leaves"),
        ({"key": 1}, TypeError, "key"),
    ],
)
def test_bad_input(key, change, error, words):
    given = {
        "key": key,
        "draws": jnp.zeros((S, L, D)),
        "theta": jnp.zeros((S, D)),
        "x": jnp.zeros((S, D)),
    } | change
    with pytest.raises(error, match=words):
        tarp(given.pop("key"), given.pop("draws"), given.pop("theta"), given.pop("x"), **given)


def test_bad_bootstrap(key):
    with pytest.raises(ValueError, match="num >= 1"):
        report_of(np.arange(51), 50).bootstrap(key, 0)
    with pytest.raises(TypeError, match="key"):
        report_of(np.arange(51), 50).bootstrap(3)
