"""The engine: what comes out, what it says of it, when it stops, and what it refuses."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probinfer as pi
from probinfer import coin, targets
from probinfer.coin.engine import reports
from probinfer.coin.engine.trajectories import empty_trajectory_report
from probinfer.core.binding import LogDensity
from probinfer.core.errors import ConvergenceWarning, NumericalError
from probinfer.core.status import Status
from probinfer.running.checkpoint import Checkpoint

SCALE = np.array([0.1, 1.0, 10.0])


def log_normal(scale, edge, position):
    """A normal of mean 3 in y and 0 in x, NaN where y passes the edge."""
    x, y = position["x"], position["y"]
    value = -0.5 * jnp.sum((x / scale) ** 2) - 0.5 * ((y - 3) / scale[1]) ** 2
    return jnp.where(y > edge, jnp.nan, value)


def normal(scale=SCALE, edge=np.inf, dtype=float):
    example = {"x": jnp.zeros(3, dtype), "y": jnp.zeros((), dtype)}
    fn = LogDensity(log_normal, jnp.asarray(scale, dtype), jnp.asarray(edge, dtype))
    return targets.from_logdensity(fn, example)


def quietly(key, target, engine):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return pi.infer(key, target, engine, progress=False)


@pytest.mark.f32
def test_particles_of_a_normal_have_its_moments(key, dtype):
    """The mean-field sd of 40 particles in 4 dimensions is 0.97."""
    posterior = pi.infer(key, normal(dtype=dtype), coin.SVGD(num_particles=40), progress=False)
    assert posterior.draws["x"].shape == (1, 40, 3)
    assert posterior.draws["x"].dtype == dtype
    np.testing.assert_allclose(np.std(posterior.draws["x"][0], axis=0) / SCALE, 0.96, atol=0.04)
    np.testing.assert_allclose(np.mean(posterior.draws["y"]), 3, atol=0.05)
    info = posterior.info
    assert int(info.status) == Status.OK
    assert 128 <= int(info.num_steps) < 2048
    assert len(info.virials) == len(info.direction_norms) == int(info.num_steps)
    assert info.num_gradients == 40 * (int(info.num_steps) + 1 + 129)  # 16 trajectories of 8, at the end
    np.testing.assert_allclose(info.virial["x"], -(0.96**2), atol=0.06)
    np.testing.assert_allclose(info.location["y"], 0, atol=0.05)
    assert 0 < float(info.ksd) < 0.1
    assert posterior.log_weights is None
    assert np.isnan(info.khat)


def test_too_few_particles_are_told_how_many_to_take(key):
    with pytest.warns(ConvergenceWarning, match=r"too narrow .*num_particles=100.*polish='hmc'"):
        posterior = pi.infer(key, normal(), coin.SVGD(num_particles=8), progress=False)
    assert int(posterior.info.status) == Status.POOR_APPROXIMATION
    assert np.all(np.std(posterior.draws["x"][0], axis=0) < 0.87 * SCALE)


def test_trajectories_run_at_the_end_and_are_counted(key):
    plain = quietly(key, normal(), coin.SVGD(num_particles=8))
    moved = pi.infer(key, normal(), coin.SVGD(num_particles=8, polish="hmc"), progress=False)
    assert 0.5 < float(moved.info.acceptance) <= 1
    assert moved.info.num_gradients == plain.info.num_gradients + 8 * 41
    np.testing.assert_allclose(moved.info.virial["x"], plain.info.virial["x"], rtol=1e-9)
    assert np.max(abs(moved.draws["x"] - plain.draws["x"])) > 0.1


def test_weights_come_with_their_pareto_shape(key):
    posterior = pi.infer(key, normal(), coin.SVGD(num_particles=40, polish="weights"), progress=False)
    assert posterior.log_weights.shape == (1, 40)
    assert float(posterior.info.khat) < 0.7
    weights = np.exp(np.asarray(posterior.log_weights[0]))
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    mean = weights @ np.asarray(posterior.draws["y"][0])
    assert abs(mean - 3) < 5 / 40**0.5  # five standard errors of 40 equal draws: rate 6e-7


def test_a_run_that_is_too_short_says_what_is_wrong(key):
    """After three steps the mean of y is still 3 of its standard deviations away."""
    with pytest.warns(ConvergenceWarning, match="not where its density is"):
        posterior = pi.infer(
            key, normal(np.ones(3)), coin.SVGD(num_particles=40, max_steps=3), progress=False
        )
    assert int(posterior.info.status) == Status.POOR_APPROXIMATION
    assert float(posterior.info.shift["y"]) > 0.3
    no_trajectories = empty_trajectory_report(4, posterior.info.ksd.dtype)
    untried = posterior.info._replace(status=Status.MAX_ITERATIONS)
    assert (
        reports.describe_status(untried, no_trajectories, normal())
        == "direction and virial had not settled after 3 steps"
    )


def test_particles_that_lost_their_density_have_weight_zero(key):
    """Over keys 18 to 34 of 40 get over an edge 1.5 sd from the mean (mean 26.6, sd 3.3): 4 sd from none and all."""
    with pytest.warns(ConvergenceWarning, match="have no finite log density"):
        posterior = pi.infer(key, normal(edge=4.5), coin.SVGD(num_particles=40), progress=False)
    lost = int(posterior.info.num_nonfinite)
    assert 0 < lost < 40
    assert int(np.sum(np.isneginf(posterior.log_weights))) == lost
    assert int(posterior.info.status) == Status.NON_FINITE


def test_a_flat_density_is_an_error(key):
    with pytest.raises(NumericalError, match="flat or improper"):
        pi.infer(key, normal(np.full(3, 1e30)), coin.SVGD(num_particles=40), progress=False)


def test_an_interrupted_run_goes_on_to_the_same_particles(key, tmp_path):
    engine = coin.SVGD(num_particles=40)
    uninterrupted = pi.infer(key, normal(), engine, progress=False)
    store = Checkpoint(tmp_path / "run", every=50)
    for _ in range(2):  # the second call finds the run at its end
        resumed = pi.infer(key, normal(), engine, progress=False, checkpoint=store)
        np.testing.assert_allclose(resumed.draws["x"], uninterrupted.draws["x"], rtol=1e-12)


def rows_log_likelihood(mean, rows):
    return -0.5 * jnp.sum((rows - mean) ** 2, axis=-1)


def no_prior(mean):
    return -0.5 * jnp.sum(mean**2) * 1e-2


def test_minibatch_targets_run_and_are_not_polished(key):
    """Mean of 64 rows of unit variance: posterior sd 1/8."""
    rows = np.random.default_rng(0).normal(size=(64, 2)) + 5
    target = targets.minibatch(no_prior, rows_log_likelihood, jnp.asarray(rows), 16, example=jnp.zeros(2))
    posterior = quietly(key, target, coin.SVGD(num_particles=40, max_steps=512))
    draws = np.asarray(posterior.draws[0])
    assert np.all(abs(np.mean(draws, axis=0) - rows.mean(0)) < 0.125)
    assert np.all(abs(np.std(draws, axis=0) * 8 - 1) < 0.3)
    with pytest.raises(TypeError, match="needs the exact log density"):
        coin.SVGD(polish="hmc").sample(key, target)
    # no trajectories there; with as many parameters as particles, as in networks, the advice names Adam
    assert np.all(np.isnan(posterior.info.shift))
    no_trajectories = empty_trajectory_report(2, posterior.info.ksd.dtype)
    unsettled = posterior.info._replace(status=Status.MAX_ITERATIONS)
    assert reports.describe_status(unsettled, no_trajectories, target).endswith(
        f"after {int(unsettled.num_steps)} steps"
    )
    network = unsettled._replace(num_particles=2)
    assert "Adam with a tuned rate is far better" in reports.describe_status(network, no_trajectories, target)


@pytest.mark.slow
def test_the_noise_of_batches_is_no_complaint(key):
    """A mean by batches of 20 of 200: the noise of one batch's score is three times the threshold."""
    y = np.random.default_rng(0).normal(3.0, 1.0, size=200)
    target = targets.minibatch(
        lambda v: -0.5 * v["m"] ** 2 / 100,
        lambda v, b: -0.5 * (b - v["m"]) ** 2,
        y,
        20,
        example={"m": jnp.zeros(())},
    )
    for seed in range(3):
        posterior = quietly(jax.random.fold_in(key, seed), target, coin.SVGD(num_particles=50, max_steps=512))
        assert int(posterior.info.status) != Status.POOR_APPROXIMATION
        assert float(posterior.info.location["m"]) == 0
        assert posterior.info.num_gradients == 50 * (int(posterior.info.num_steps) + 16)
        assert abs(np.mean(posterior.draws["m"]) - y.mean()) < 0.5 / 200**0.5
    # a cloud that has not arrived is still told, with advice that can be followed
    far = targets.minibatch(
        lambda v: -0.5 * v["m"] ** 2 / 1e8,
        lambda v, b: -0.5 * (b - v["m"]) ** 2,
        y + 3000,
        20,
        example={"m": jnp.zeros(())},
    )
    with pytest.warns(ConvergenceWarning, match="not where its density.*larger batches, or raise max_steps"):
        pi.infer(key, far, coin.SVGD(num_particles=50, max_steps=64), progress=False)


def test_new_data_traces_nothing(key, count_compiles):
    engine = coin.SVGD(num_particles=40)
    pi.infer(key, normal(), engine, progress=False)
    with count_compiles() as counter:
        quietly(key, normal(2 * SCALE), engine)
    assert counter.count == 0


def test_the_number_of_particles_follows_the_dimension():
    assert coin.particles_for(2) == 100
    assert coin.predicted_sd(coin.particles_for(50), 50) >= 0.95
    assert coin.particles_for(10**6) == 2000
    np.testing.assert_allclose(coin.predicted_sd(100, 50), 0.858, atol=1e-3)
    with pytest.raises(ValueError, match="at least one particle"):
        coin.predicted_sd(0, 3)


def test_settings_that_cannot_work_are_refused(key):
    for settings, kind, message in (
        ({"num_particles": 1}, ValueError, "2 or more"),
        ({"num_particles": 2.0}, TypeError, "must be an integer"),
        ({"max_steps": 0}, ValueError, "1 or more"),
        ({"max_steps": "many"}, TypeError, "must be an integer"),
        ({"polish": "wax"}, ValueError, "polish must be None or one of hmc, nuts, weights"),
    ):
        with pytest.raises(kind, match=message):
            coin.SVGD(**settings)
    with pytest.raises(TypeError, match="Target"):
        coin.SVGD().sample(key, lambda x: x)
    with pytest.raises(TypeError, match="key"):
        coin.SVGD().sample(0, normal())
