"""Trajectories from a cloud: exact draws stay, clouds that are wrong are moved, lost particles and modes are seen.

One density, a mixture of two normals in three dimensions, serves all tests: its numbers are data.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probinfer as pi
from probinfer import coin, targets
from probinfer.coin.engine.trajectories import (
    confirms_cloud,
    describe_drift,
    describe_misfit,
    empty_trajectory_report,
    run_trajectories,
)
from probinfer.core.binding import LogDensity
from probinfer.core.errors import ConvergenceWarning
from probinfer.core.status import Status

NAMES = ["a", "b", "c"]
N, DIMS = 100, 3
SCALE = np.array([0.1, 1.0, 50.0])
FAR = 30.0  # of the second mode, in standard deviations along the first coordinate


def log_two_normals(scale, far, log_share, x):
    z = x / scale
    away = z.at[0].add(-far)
    return jnp.logaddexp(-0.5 * jnp.sum(z**2), log_share - 0.5 * jnp.sum(away**2))


def density(log_share=-np.inf, dtype=float):
    return LogDensity(
        log_two_normals, jnp.asarray(SCALE, dtype), jnp.asarray(FAR, dtype), jnp.asarray(log_share, dtype)
    )


@jax.jit
def try_cloud(key, algorithm, state, early):
    mask = jnp.ones(len(state.z), bool)
    return run_trajectories(key, algorithm, state, state.z, mask, (early,))


def report_of(key, table, early=None, log_share=-np.inf, dtype=float):
    algorithm = coin.svgd(density(log_share, dtype))
    state = algorithm.init(jnp.asarray(table, dtype))
    return try_cloud(key, algorithm, state, jnp.asarray(table if early is None else early, dtype))


def draws(seed=0):
    return np.random.default_rng(seed).normal(size=(N, DIMS)) * SCALE


@pytest.mark.f32
def test_exact_draws_stay(dtype):
    """Independent draws are noisier than particles, so the noise that is allowed is that of both.

    Shift and growth of a coordinate are at 4 or more of their errors before there is a word: fewer than 1 in 10 000 for
    ten clouds.
    """
    for seed in range(10):
        report = report_of(jax.random.key(seed), draws(seed), dtype=dtype)
        assert describe_misfit(report, NAMES) == ""
        assert 0.4 < float(report.acceptance) <= 1
        assert int(report.num_lost) == int(report.num_forsaken) == 0
        assert int(report.num_gradients) == N * 129
    assert report.shift.dtype == dtype


def test_a_steady_cloud_is_vouched_for(key):
    """A grid of quantiles is nearer to the normal than draws: no shift above 0.3 nor growth above 1.3."""
    normal = np.random.default_rng(1).normal(size=(N, DIMS))
    ranks = np.argsort(np.argsort(normal, axis=0), axis=0)
    grid = np.asarray(jax.scipy.special.ndtri((ranks + 0.5) / N)) * SCALE
    assert confirms_cloud(report_of(key, grid))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x + np.array([0, 1.0, 0]), r"the mean of b by -"),
        (lambda x: x * [1, 1, 0.5], r"the spread of c by a factor of (1\.[5-9]|2)"),
        (lambda x: x * [2.5, 1, 1], r"the spread of a by a factor of 0\.[3-6]"),
        (lambda x: 0.7 * x, r"the spread of (all coordinates|[abc]) by a factor of 1\."),
    ],
)
def test_wrong_clouds_are_moved_back(key, wrong, message, match):
    """Errors of a half to two standard deviations, at more than six errors of the trial: 1e-6 to miss one."""
    report = report_of(key, wrong(draws()))
    description = describe_misfit(report, NAMES)
    match(message, description)
    assert "does not represent its density" in description
    assert "polish='nuts'" in description
    assert not confirms_cloud(report)
    assert "move by" in describe_drift(report)


@pytest.fixture
def match():
    import re

    def check(pattern, text):
        assert re.search(pattern, text), text

    return check


def test_a_particle_in_a_mode_without_mass_is_lost(key):
    table = draws()
    table[7] = SCALE * [FAR, 0, 0]
    lost = report_of(key, table, log_share=-60.0)
    assert int(lost.num_lost) == 1
    np.testing.assert_allclose(lost.depth, 60, atol=6)
    assert "1 of the particles are where the density is e^-" in describe_misfit(lost, NAMES)
    # the same place is none of negligible mass where the mode has a share
    assert int(report_of(key, table, log_share=0.0).num_lost) == 0


def test_a_mode_that_only_early_particles_saw_is_forsaken(key):
    early = draws(1)
    early[:5] += SCALE * [FAR, 0, 0]
    report = report_of(key, draws(), early, log_share=0.0)
    assert int(report.num_forsaken) == 5
    assert "5 early particles were in a mode that has none now" in describe_misfit(report, NAMES)
    # its tails, a mode of e^-60 of the mass, and a mode that has a particle are nothing to speak of
    assert int(report_of(key, draws(), early, log_share=-60.0).num_forsaken) == 0
    both = draws()
    both[:50] += SCALE * [FAR, 0, 0]
    assert int(report_of(key, both, early, log_share=0.0).num_forsaken) == 0


@pytest.mark.parametrize(("log_share", "wrong"), [(0.0, False), (-0.3, False), (-2.0, True), (3.0, True)])
def test_modes_that_hold_the_wrong_share_are_named(key, log_share, wrong):
    """Half of the particles in each of two modes; 1 to e^share is what their density asks for."""
    both = draws()
    both[::2] += SCALE * [FAR, 0, 0]
    report = report_of(key, both, log_share=log_share)
    np.testing.assert_allclose(report.shares.particles, [0.5, 0.5, 0, 0], atol=1e-6)
    asked = np.exp(log_share) / (1 + np.exp(log_share))
    np.testing.assert_allclose(np.sort(report.shares.mass[:2]), np.sort([asked, 1 - asked]), atol=0.06)
    description = describe_misfit(report, NAMES)
    assert (
        "the particles are in 2 separate modes, and one of these holds 50% of them" in description
    ) == wrong


def test_no_trial_says_nothing():
    report = empty_trajectory_report(DIMS, jnp.float32)
    assert describe_misfit(report, NAMES) == describe_drift(report) == ""
    assert not confirms_cloud(report)


def log_funnel(x):
    return -0.5 * (x[0] / 1.5) ** 2 - 0.5 * jnp.sum(x[1:] ** 2) * jnp.exp(-x[0]) - 0.5 * x[0] * (len(x) - 1)


@pytest.mark.slow
def test_a_funnel_is_not_called_right():
    """Ten dimensions: the mean of the log scale is off by 0.6 of its standard deviation, where scores see nothing.

    Four keys of four, by a growth at four or more of its errors each time.
    """
    target = targets.from_logdensity(log_funnel, jnp.zeros(10))
    for seed in range(4):
        with pytest.warns(ConvergenceWarning, match=r"trajectories from the particles move .*mcmc\.NUTS"):
            report = pi.infer(jax.random.key(seed), target, coin.SVGD(), progress=False)
        assert abs(float(np.mean(report.draws[0, :, 0]))) / 1.5 > 0.3
        assert int(report.info.status) == Status.POOR_APPROXIMATION
        assert float(report.info.growth.max()) > 1.3
