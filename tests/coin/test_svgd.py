"""Coin SVGD against NumPy loops, its equivariances, every scale of target and start, and what may go wrong."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import probinfer as pi
from probinfer import betting, coin, kernels
from probinfer.coin.cloud.particles import ravel_particles
from probinfer.core.binding import LogDensity, StochasticLogDensity
from probinfer.core.status import Status
from probinfer.running.driver import record_nothing
from tests.reference import coin as oracle

SCALE = np.array([0.02, 1.0, 30.0])
ROTATION = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]


def log_target(scale, rotation, bend, radius, x):
    """Correlated, asymmetric for a bend above 0, NaN within a radius of (3, 3, 3): one program for most tests."""
    y = rotation.T @ (x / scale)
    skewed = -0.5 * (y[0] ** 2 + (y[1] - 0.3 * y[0] ** 2) ** 2) + 2 * y[2] - 3 * jax.nn.softplus(y[2])
    value = bend * skewed - 0.5 * (1 - bend) * jnp.sum(y**2)
    return jnp.where(jnp.sum((x - 3) ** 2) < radius**2, jnp.nan, value)


def curved(scale=SCALE, rotation=ROTATION, bend=1.0, radius=0.0, dtype=float):
    return LogDensity(log_target, *(jnp.asarray(v, dtype) for v in (scale, rotation, bend, radius)))


def gauss(scale, radius=0.0, dtype=float):
    return curved(scale * np.ones(3), np.eye(3), 0.0, radius, dtype)


def score(x):
    return np.asarray(jax.vmap(jax.grad(curved()))(jnp.asarray(x)))


def start(n=24, d=3, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


class Run(NamedTuple):
    """The last state and info, and the least and largest spread on the way."""

    state: Any
    info: Any
    low: Any
    high: Any


@jax.jit
def advance(algorithm, state, steps, key):
    info = jax.eval_shape(algorithm.step, key, state)[1]
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), info)
    spread = jnp.std(state.z, axis=0)

    def step(i, run):
        state, info = algorithm.step(jax.random.fold_in(key, i), run.state)
        x = ravel_particles(state.positions)
        spread_now = jnp.std(x.astype(spread.dtype), axis=0)
        return Run(state, info, jnp.minimum(run.low, spread_now), jnp.maximum(run.high, spread_now))

    return jax.lax.fori_loop(0, steps, step, Run(state, zeros, spread + jnp.inf, 0 * spread))


def run_steps(log_density, x, steps, key=None, **settings):
    """So many steps: the number is data."""
    algorithm = coin.svgd(log_density, **settings)
    key = jax.random.key(0) if key is None else key
    return advance(algorithm, algorithm.init(jax.tree.map(jnp.asarray, x)), jnp.int32(steps), key)


def run_published(log_density, x, steps):
    settings = {"geometry": coin.Identity(), "bet": betting.coin(unit=0.5), "bandwidth": "published"}
    return run_steps(log_density, x, steps, **settings)


# What it computes


@pytest.mark.slow
def test_the_default_rule_is_that_of_the_loops():
    """Both bets, restarts on schedule and stale ones; rounding grows with the steps."""
    expected, settled = oracle.default(start(), score, 130)
    run = run_steps(curved(), start(), 130)
    assert int(run.state.step) == 130
    assert settled
    assert bool(run.state.settled)
    np.testing.assert_allclose(run.state.positions, expected, rtol=1e-5, atol=1e-6)


def test_the_published_coin_is_that_of_the_loops():
    run = run_published(curved(), start(), 20)
    np.testing.assert_allclose(
        run.state.positions, oracle.published(start(), score, 20), rtol=1e-7, atol=1e-9
    )


def test_a_bet_that_looks_at_its_parameters_sees_the_cloud():
    """The published optimizer with alpha = 0 is the published coin; it reads its displacement from the parameters."""
    bet = optax.contrib.cocob(alpha=0.0, eps=1e-8)
    settings = {"geometry": coin.Identity(), "bandwidth": "published"}
    published = run_steps(curved(), start(), 30, bet=bet, **settings).state.positions
    np.testing.assert_allclose(
        published, run_published(curved(), start(), 30).state.positions, rtol=1e-6, atol=1e-6
    )


def test_runs_of_the_library_take_the_same_steps(key):
    """As an ``Algorithm`` of ``pi.run``."""
    algorithm = coin.svgd(curved())
    state, _ = pi.run(key, algorithm, algorithm.init(start()), 3, collect=record_nothing)
    np.testing.assert_allclose(state.positions, run_steps(curved(), start(), 3).state.positions, rtol=1e-9)


def test_the_report_of_a_step_is_of_the_cloud_before_it():
    info, x, s = run_steps(curved(), start(), 1).info, start(), score(start())
    np.testing.assert_allclose(info.virial, np.mean((x - x.mean(0)) * s, axis=0), rtol=1e-9)
    z = (x - x.mean(0)) / x.std(0)
    expected = oracle.direction(z, s * x.std(0), oracle.bandwidth("median", z, 0))
    np.testing.assert_allclose(info.direction_norm, np.sqrt(np.mean(np.sum(expected**2, axis=1))), rtol=1e-9)


def test_scales_of_the_coordinates_change_nothing():
    """Powers of two, so that rounding is the same."""
    units = np.array([2.0**-20, 1.0, 2.0**15])
    plain = run_steps(gauss(1.0), start(), 40).state.positions
    moved = run_steps(gauss(units), start() * units, 40).state.positions
    np.testing.assert_allclose(moved / units, plain, rtol=1e-9)


def test_the_order_of_the_particles_does_not_matter():
    there, back = (run_steps(curved(), x, 20).state.positions for x in (start(), start()[::-1]))
    np.testing.assert_allclose(back[::-1], there, rtol=1e-7)


@pytest.mark.f32
@pytest.mark.parametrize("power", [-6, -2, 6])
def test_targets_of_any_scale_are_reached_from_one_start(dtype, power):
    """No setting is changed. 24 particles in 3 dimensions: the mean-field sd is 0.96."""
    c = 10.0 ** (power if dtype == jnp.float64 else power * 2 / 3)
    run = run_steps(gauss(c, dtype=dtype), jnp.asarray(start(), dtype), 1000)
    x = np.asarray(run.state.positions) / c
    assert np.std(x, axis=0).min() > 0.9
    assert np.std(x, axis=0).max() < 1.1
    assert np.all(abs(np.mean(x, axis=0)) < 0.1)
    assert np.all(abs(np.asarray(run.info.virial) + np.var(x, axis=0)) < 0.05)


def test_badly_scaled_and_correlated_targets_are_reached_too():
    run = run_steps(curved(10.0 ** np.array([-3, 0, 3]), ROTATION, 0.0), start(), 1000)
    y = np.asarray(run.state.positions) / 10.0 ** np.array([-3, 0, 3]) @ ROTATION
    assert np.all(abs(np.std(y, axis=0) - 1) < 0.1)
    assert np.all(abs(np.mean(y, axis=0)) < 0.1)


def test_a_start_of_the_right_scale_is_never_left():
    run = run_steps(gauss(1e-6), start(100) * 1e-6, 200)
    assert run.low.min() > 0.8e-6
    assert run.high.max() < 1.25e-6


def test_new_data_traces_nothing(count_compiles):
    run_steps(curved(), start(), 2)
    with count_compiles() as counter:
        run_steps(curved(2 * SCALE), start(seed=3), 3)
    assert counter.count == 0


# Trees, dtypes, minibatches, other bets and kernels


def log_tree(position):
    a, b = position["a"], position["b"]
    return -0.5 * jnp.sum(a**2) - 0.5 * jnp.sum((b.astype(a.dtype) - 3) ** 2)


@pytest.mark.f32
def test_trees_of_mixed_dtypes_keep_their_shapes_and_dtypes(dtype):
    rng = np.random.default_rng(1)
    positions = {
        "a": jnp.asarray(rng.normal(size=(20, 2, 2)), dtype),
        "b": jnp.asarray(rng.normal(size=20), jnp.bfloat16),
    }
    state = run_steps(log_tree, positions, 100).state
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (positions, state.positions)]
    assert kinds[0] == kinds[1]
    assert abs(float(jnp.mean(state.positions["b"].astype(dtype))) - 3) < 0.1
    assert state.z.dtype == dtype


def log_noisy(scale, key, x):
    """A linear term of mean zero, the same for all particles of a step."""
    return -0.5 * jnp.sum((x / scale) ** 2) + 0.3 * jax.random.normal(key, x.shape) @ x


def test_all_particles_of_a_step_share_one_batch(key):
    """Under a kernel that is one everywhere a shared force moves all particles alike."""
    settings = {"geometry": coin.Identity(), "bet": optax.sgd(0.1), "bandwidth": "fixed"}
    noisy = StochasticLogDensity(log_noisy, jnp.full(3, 1e6))
    moves = (
        run_steps(noisy, start(), 1, key, kernel=kernels.RBF(lengthscale=1e6), **settings).state.positions
        - start()
    )
    assert np.min(abs(np.mean(moves, 0))) > 1e-4
    np.testing.assert_allclose(moves, np.broadcast_to(np.mean(moves, 0), moves.shape), rtol=1e-6)


def test_minibatch_noise_does_not_stop_it(key):
    scale = np.array([0.5, 2.0, 1.0])
    spread = np.std(
        run_steps(StochasticLogDensity(log_noisy, jnp.asarray(scale)), start(), 400, key).state.positions,
        axis=0,
    )
    assert np.all(abs(spread / scale - 0.96) < 0.15), spread


OTHERS = [
    {"kernel": kernels.InverseMultiquadric(), "geometry": coin.Diagonal()},
    {"bet": optax.adam(0.1), "geometry": coin.LowRank()},
]


@pytest.mark.parametrize("settings", OTHERS)
def test_other_kernels_geometries_and_bets_reach_the_same_target(settings):
    scale = np.array([0.1, 1.0, 5.0])
    spread = np.std(run_steps(gauss(scale), start(), 300, **settings).state.positions, axis=0) / scale
    assert np.all(abs(spread - 0.96) < 0.1), spread


# Faults


def test_a_particle_without_a_score_is_left_out_and_stays_where_it_is():
    """The others move as if it did not exist."""
    x = np.concatenate([start(23) * 0.3, [[3.0, 3.0, 3.0]]])
    run = run_published(gauss(1.0, radius=1.0), x, 20)
    np.testing.assert_allclose(run.state.positions[-1], x[-1], rtol=1e-12)
    expected = oracle.published(x[:-1], np.negative, 20, sources=24)
    np.testing.assert_allclose(run.state.positions[:-1], expected, rtol=1e-7)
    assert int(run.info.num_nonfinite) == 1
    assert int(run.info.status) == Status.OK
    assert np.all(np.asarray(run.state.bets[0].total)[-1] == 0)


def test_an_optimizer_that_knows_nothing_of_it_is_frozen_too():
    x = np.concatenate([start(23) * 0.3, [[3.0, 3.0, 3.0]]])
    state = run_steps(gauss(1.0, radius=1.0), x, 3, **OTHERS[1]).state
    np.testing.assert_allclose(state.positions[-1], x[-1], rtol=1e-12)
    mu = np.asarray(state.bets[0][0].mu)
    assert np.all(mu[-1] == 0)
    assert np.all(mu[:-1] != 0)


def test_without_any_score_nothing_moves_and_the_status_says_so():
    run = run_steps(gauss(1.0, radius=100.0), start(), 2)
    np.testing.assert_allclose(run.state.positions, start(), rtol=1e-12)
    assert int(run.info.status) == Status.NON_FINITE
    assert int(run.info.num_nonfinite) == 24


def test_on_a_flat_target_the_cloud_stands_still_after_nine_orders_of_magnitude():
    run = run_steps(gauss(1e15), start(), 1000)
    assert int(run.info.status) == Status.NON_FINITE
    assert 1e9 < np.max(run.high / np.std(start(), axis=0)) < 1e11
    later = run_steps(gauss(1e15), start(), 1001)
    np.testing.assert_array_equal(later.state.positions, run.state.positions)


def test_zero_gradients_give_finite_moves():
    assert np.all(np.isfinite(run_steps(gauss(np.inf), start(), 5).state.positions))


def test_duplicates_and_far_particles_stay_finite():
    x = start()
    x[:18] = x[0]  # more than half of the pairs have distance zero
    x[-1] = 1e6
    assert np.all(np.isfinite(run_steps(gauss(1.0), x, 30).state.positions))


def test_two_particles_are_a_cloud():
    state = run_steps(gauss(1.0), start(2), 50).state
    assert np.all(np.isfinite(state.positions))
    assert np.max(abs(np.asarray(state.positions))) < 10


def log_line(x):
    return -0.5 * x[0] ** 2


BAD_STARTS = [
    ("no leaves", {}, ValueError),
    ("floating point", np.ones((3, 2), int), TypeError),
    ("share one leading axis", {"a": np.ones((3, 2)), "b": np.ones((4, 2))}, ValueError),
    ("share one leading axis", np.array(1.0), ValueError),
    ("at least 2 particles", start(1, 2), ValueError),
    ("no coordinates", np.ones((3, 0)), ValueError),
    ("NaN or infinite", np.array([[1.0, 2.0], [np.nan, 0.0]]), ValueError),
    ("all 4 particles are identical", np.ones((4, 2)), ValueError),
    ("the same in all particles", np.array([[1.0, 2.0], [1.0, 3.0]]), ValueError),
]


@pytest.mark.parametrize(("message", "positions", "kind"), BAD_STARTS)
def test_starts_that_are_no_cloud_are_refused(message, positions, kind):
    with pytest.raises(kind, match=message):
        coin.svgd(log_line).init(positions)


def test_a_coordinate_without_spread_is_no_fault_in_the_units_of_the_positions():
    x = start()
    x[:, 1] = 2.0
    assert np.all(np.isfinite(run_published(gauss(1.0), x, 3).state.positions))


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(TypeError, match="must be a function"):
        coin.svgd(3.0)
    with pytest.raises(ValueError, match="bandwidth must be one of"):
        coin.svgd(log_line, bandwidth="mean")
    with pytest.raises(TypeError, match="has none"):
        coin.svgd(log_line, kernels.Linear())
    with pytest.raises(TypeError, match="optax transformation"):
        coin.svgd(log_line, bet=0.1)
    with pytest.raises(TypeError, match="geometry must be"):
        coin.svgd(log_line, geometry="full")
