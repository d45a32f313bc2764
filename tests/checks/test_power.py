"""Power that the checks report, against the frequency of detection and against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from probinfer import checks
from probinfer.checks.calibration.bands import ecdf_band
from probinfer.checks.calibration.symmetry import _share_above_half
from probinfer.checks.power import distances
from probinfer.checks.power.coverage import detectable_in_balls, prepare_balls
from probinfer.checks.power.ranks import leaving_probability
from probinfer.core.binding import LogDensity
from tests.params import quick
from tests.reference import ball_ranks

# A claim of .9 is held to .8 at least: of R repetitions this many must reject, missed at .8 with probability 1e-5.
FEWEST = {24: 10, 60: 33, 100: 62}


def quadratic(precision, x):
    return -0.5 * x @ precision @ x


def correlated(dims, correlation):
    covariance = correlation * np.ones((dims, dims)) + (1 - correlation) * np.eye(dims)
    return covariance, LogDensity(quadratic, jnp.asarray(np.linalg.inv(covariance)))


@pytest.mark.parametrize("dims", [1, 2, 5, 20])
def test_what_tarp_finds_at_a_normal_posterior(dims):
    """References at the posterior means: squared distances are chi-square, noncentral under a bias.

    16 384 members stand in for true values: the power is known to about .03, the sizes to a few per cent.
    """
    rng, size, num_draws, level = np.random.default_rng(dims), 256, 63, 0.05
    draws = rng.normal(size=(size, num_draws, dims))
    balls = prepare_balls(draws, rng.normal(size=(size, dims)), np.zeros((size, dims)), np.eye(dims))
    detectable, _ = detectable_in_balls(balls, size, level)
    edges = ecdf_band(1, num_draws + 1).edges

    def power(bias=0.0, scale=1.0):
        cumulative = ball_ranks.law(dims, num_draws, bias, scale)[edges - 1]
        return leaving_probability(size, num_draws + 1, level, cumulative)

    bias = optimize.brentq(lambda size: power(size) - 0.9, 0.3, 4)
    wide = optimize.brentq(lambda scale: power(0.0, scale) - 0.9, 1.01, 3)
    narrow = optimize.brentq(lambda scale: power(0.0, scale) - 0.9, 0.3, 0.99)
    assert 0.95 * bias < detectable.bias < 1.2 * bias  # an offset of 1/√S of the references is allowed for
    assert np.log(detectable.too_wide) == pytest.approx(np.log(wide), rel=0.12)
    assert np.log(detectable.too_narrow) == pytest.approx(np.log(narrow), rel=0.12)
    assert power(detectable.bias) > 0.85


def gaussian_draws(seed, dims, bias=0.0, scale=1.0, size=300, num_draws=49):
    """theta ~ N(0, I), x = theta + noise of sd .5: draws of N(.8 x, .2 I), the first coordinate shifted."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=(size, dims))
    x = theta + 0.5 * rng.normal(size=(size, dims))
    draws = 0.8 * x[:, None] + np.sqrt(0.2) * scale * rng.normal(size=(size, num_draws, dims))
    draws[:, :, 0] += np.sqrt(0.2) * bias
    return draws, theta, x


@pytest.mark.slow
@pytest.mark.parametrize("dims", [1, 5])
@pytest.mark.parametrize("error", ["bias", "too_narrow", "too_wide"])
def test_tarp_finds_what_it_says(dims, error):
    claimed = getattr(checks.tarp(jax.random.key(0), *gaussian_draws(0, dims)).uniform.power, error)
    wrong = {"bias": claimed} if error == "bias" else {"scale": claimed}
    num_rejected = sum(
        checks.tarp(jax.random.key(seed), *gaussian_draws(1 + seed, dims, **wrong)).pvalue <= 0.05
        for seed in range(60)
    )
    assert num_rejected >= FEWEST[60]


def test_tarp_does_not_claim_the_power_of_a_rank_of_a_parameter():
    """A bias of a quarter of a sd changes distances from the center to second order only."""
    report = checks.tarp(jax.random.key(0), *gaussian_draws(0, 1))
    ranked = checks.detectable_errors(300, 50, 0.05)
    assert ranked.bias < 0.3
    assert report.uniform.power.bias > 2 * ranked.bias
    assert "in one direction" in report.verdict


def test_mean_field_passes_the_identities_and_they_say_so():
    """Independent draws with the conditional widths: every spread is 1, each variance .36 of the correct one."""
    covariance, target = correlated(2, 0.8)
    passed = 0
    for seed in range(12):
        normal = np.random.default_rng(seed).normal(size=(1000, 2))
        report = checks.stein_identity(
            jnp.asarray(normal / np.sqrt(np.diag(np.linalg.inv(covariance)))), target
        )
        passed += report.passed
        assert "mean field" in report.verdict
        assert "width in all" in report.verdict
    assert passed >= 7  # fewer at the size .05: rate 3e-6


@pytest.mark.parametrize(("dims", "correlation"), [(1, 0.0), (2, 0.8), (5, 0.6)])
def test_what_the_identities_find_at_a_normal(dims, correlation):
    r"""Per draw the first has variance :math:`c = \Sigma_{jj} P_{jj}`, also its slope in a shift; the second c + 1.

    4000 draws know both to 5 %, and their skewness moves the critical value by less.
    """
    covariance, target = correlated(dims, correlation)
    root, num = np.linalg.cholesky(covariance), 4000
    draws = np.random.default_rng(dims).normal(size=(num, dims)) @ root.T
    power = checks.stein_identity(jnp.asarray(draws), target).power
    ratio = covariance[0, 0] * np.linalg.inv(covariance)[0, 0]
    needed = stats.norm.isf(0.05 / (4 * dims)) + stats.norm.ppf(0.9)
    assert power.bias == pytest.approx(needed / np.sqrt(num * ratio), rel=0.15)
    error = needed * np.sqrt((ratio + 1) / num)
    assert 2 * np.log(power.too_wide) == pytest.approx(error, rel=0.25)
    assert 2 * np.log(power.too_narrow) == pytest.approx(-error, rel=0.25)


@pytest.mark.parametrize("error", ["bias", "too_narrow", "too_wide"])
def test_the_identities_find_what_they_say(error):
    covariance, target = correlated(2, 0.6)
    root = np.linalg.cholesky(covariance)

    def report(seed, shift=0.0, scale=1.0):
        draws = scale * np.random.default_rng(seed).normal(size=(400, 2)) @ root.T
        return checks.stein_identity(jnp.asarray(draws + np.array([shift, 0.0])), target)

    claimed = getattr(report(0).power, error)
    wrong = {"shift": claimed} if error == "bias" else {"scale": claimed}
    assert sum(report(1 + seed, **wrong).passed is False for seed in range(24)) >= FEWEST[24]


@pytest.mark.parametrize("num_draws", [1, 4, 7, 30])
def test_the_share_that_vsbc_counts(num_draws):
    """P(p > 1/2) by simulation of 100 000 ranks: 5 standard errors of .0016."""
    rng = np.random.default_rng(num_draws)
    below = np.sum(rng.normal(-0.4, 1.0, (100_000, num_draws)) < rng.normal(size=(100_000, 1)), axis=1)
    smooth = (below + rng.uniform(size=100_000)) / (num_draws + 1)
    assert _share_above_half(np.array([0.4]), num_draws)[0] == pytest.approx(np.mean(smooth > 0.5), abs=0.008)


def test_the_share_of_a_shared_bias_that_posterior_sbc_sees():
    """Flat prior, one observation and one more: of a bias of both posteriors 1 - 1/√2 is detected.

    The mean of 200 000 differences has an error of .0022; 5 of them.
    """
    rng, bias, num = np.random.default_rng(0), 1.0, 200_000
    first = np.ones(num)  # the observed datum; its posterior has sd 1
    theta = first + bias + rng.normal(size=num)
    second = theta + rng.normal(size=num)
    center = (first + second) / 2 + bias * np.sqrt(0.5)
    assert np.mean(center - theta) / np.sqrt(0.5) == pytest.approx(1 - np.sqrt(0.5), abs=0.012)


DISTANCES = {
    "mmd": checks.mmd,
    "energy": checks.energy_distance,
    "sliced": checks.sliced_wasserstein,
}


def compared(name, seed, bias=0.0, scale=1.0, num=60):
    rng = np.random.default_rng(seed)
    a, b = scale * rng.normal(size=(num, 2)) + np.array([bias, 0.0]), rng.normal(size=(num, 2))
    key = jax.random.key(seed)
    if name == "ksd":
        return checks.ksd(jnp.asarray(a), STANDARD, key=key, num_bootstrap=99)
    options = {"num_directions": 8} if name == "sliced" else {}
    return DISTANCES[name](jnp.asarray(a), jnp.asarray(b), key=key, num_permutations=99, **options)


STANDARD = LogDensity(quadratic, jnp.eye(2))


@pytest.mark.parametrize("name", quick([*DISTANCES, "ksd"], "mmd"))
def test_distances_find_what_they_say(name):
    claimed = compared(name, 0).power
    for wrong in ({"bias": claimed.bias}, {"scale": claimed.too_narrow}, {"scale": claimed.too_wide}):
        num_rejected = sum(compared(name, 1 + seed, **wrong).pvalue <= 0.05 for seed in range(24))
        assert num_rejected >= FEWEST[24], wrong
    assert 0.2 < claimed.bias < 1.5
    assert claimed.too_narrow > 0.3
    assert claimed.too_wide < 3


@pytest.mark.parametrize(("name", "power"), [("energy", 0.5), ("sliced", 1.0)])
def test_how_far_relabeled_draws_spread_where_one_set_is_wider(name, power, monkeypatch):
    """The factor on the null of two sets, one twice as wide, against that null: 400 permutations estimate it to 10 %.

    Both sets are first divided by their common widths, whose squares the wider one makes 2.5 times as large.
    """
    recorded, plain = {}, distances.smallest_errors

    def record(biased, scaled, null, critical, level, **_):
        recorded.update(scaled=scaled, null=null)
        return plain(biased, scaled, null, critical, level)

    monkeypatch.setattr(distances, "smallest_errors", record)
    rng = np.random.default_rng(5)
    a, b = jnp.asarray(rng.normal(size=(2, 200, 2)))
    options = {"key": jax.random.key(1), "num_permutations": 400}
    assert DISTANCES[name](a, b, **options).power is not None
    wide = DISTANCES[name](2 * a, b, **options)
    growth = 2.5**power * np.std(wide.null) / np.std(recorded["null"])
    assert recorded["scaled"](2.0).growth == pytest.approx(growth, rel=0.3)
    assert recorded["scaled"](1.0).growth == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_the_classifier_finds_the_bias_that_it_says():
    def report(seed, bias=0.0):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(size=(200, 2)) + np.array([bias, 0.0]), rng.normal(size=(200, 2))
        return checks.c2st(jax.random.key(seed), jnp.asarray(a), jnp.asarray(b))

    claimed = report(0).power
    assert claimed.too_narrow == 0  # of widths it makes no claim
    assert np.isinf(claimed.too_wide)
    assert sum(report(1 + seed, claimed.bias).passed is False for seed in range(24)) >= FEWEST[24]


def test_an_estimator_as_wrong_as_it_says_contradicts_the_other():
    """Normal log weights of variance 1/2: the gap is 1/2. Forward runs have the error that another report claims."""

    def runs(seed, error=0.0):
        rng = np.random.default_rng(seed)
        forward, reverse = rng.normal(size=(2, 50)) * np.sqrt(0.5) + np.array([[-0.25], [0.25]])
        return checks.evidence_sandwich(forward + error, reverse)

    claimed = runs(0).detectable
    assert 0.5 < claimed < 1.5
    num_rejected = sum(runs(1 + seed, claimed).contradiction for seed in range(100))
    assert num_rejected >= FEWEST[100]
    assert sum(runs(1 + seed, 0.5).contradiction for seed in range(100)) <= 20  # size .05 at most: rate 1e-7
