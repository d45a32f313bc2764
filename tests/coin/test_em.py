"""Coin EM against the exact answer of a hierarchical normal model, and its promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probinfer as pi
from probinfer import betting, coin
from probinfer.core.binding import LogDensity, StochasticLogDensity

# z_i ~ N(theta, tau²), x_i ~ N(z_i, 1): the best theta is the mean of x, for any tau; with tau free, tau² = var(x) - 1
DATA = 3.0 + 2.0 * np.random.default_rng(0).normal(size=12)


def log_joint(data, latent, parameters):
    return -0.5 * jnp.sum((latent - parameters) ** 2) - 0.5 * jnp.sum((data - latent) ** 2)


def start(dtype, num=30, size=12):
    return jnp.asarray(np.random.default_rng(1).normal(size=(num, size)), dtype)


def mean_latent(latents):
    return jnp.mean(latents)


@pytest.mark.f32
@pytest.mark.parametrize("maximize_fn", [None, mean_latent])
def test_the_best_mean_of_a_hierarchical_model(key, dtype, maximize_fn, count_compiles):
    """Every fixed point has the particle mean at (x + theta)/2, so theta is exact with any number of particles."""
    algorithm = coin.em(LogDensity(log_joint, jnp.asarray(DATA, dtype)), maximize_fn=maximize_fn)
    state = algorithm.init(start(dtype), jnp.zeros((), dtype))
    state, (_, info) = pi.run(key, algorithm, state, 500)
    assert float(state.parameters) == pytest.approx(DATA.mean(), abs=0.02)
    np.testing.assert_allclose(np.mean(state.positions, axis=0), (DATA + DATA.mean()) / 2, atol=0.1)
    assert state.parameters.dtype == state.positions.dtype == dtype
    assert int(jnp.max(info.status)) == pi.Status.OK
    # the posterior deviation is 0.71; 30 particles in 12 dimensions are a little narrow
    assert 0.5 < np.std(state.positions, axis=0).mean() < 0.75
    other = coin.em(LogDensity(log_joint, jnp.asarray(DATA[::-1].copy() * 2, dtype)), maximize_fn=maximize_fn)
    initial = other.init(start(dtype) * 2, jnp.ones((), dtype))
    with count_compiles() as compiles:
        pi.run(key, other, initial, 500)
    assert compiles.count == 0


@pytest.mark.slow
def test_parameters_of_another_scale(key):
    """The same model in units of 1e-3 for z and x, and theta in units of 1e3: no unit is set."""

    def scaled(latent, parameters):
        return log_joint(DATA, 1e3 * latent, 1e-3 * parameters["mean"])

    algorithm = coin.em(scaled)
    state = algorithm.init(1e-3 * start(jnp.float64), {"mean": jnp.zeros(())})
    state, _ = pi.run(key, algorithm, state, 500)
    assert 1e-3 * float(state.parameters["mean"]) == pytest.approx(DATA.mean(), abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("maximize_fn", [None, mean_latent])
def test_few_particles_in_many_dimensions_far_away(key, maximize_fn):
    """Single coordinates leave the metric all the time there; when each stopped all others, 1000 steps were too few."""
    x = 1e3 * (5 + np.sqrt(2) * np.random.default_rng(2).normal(size=100))

    def log_scaled(latent, parameters):
        return 1e-6 * log_joint(x, latent, parameters)

    algorithm = coin.em(log_scaled, maximize_fn=maximize_fn)
    state, _ = pi.run(key, algorithm, algorithm.init(start(float, 10, 100), jnp.zeros(())), 600)
    assert abs(float(state.parameters) - x.mean()) < 0.03 * 1e3


FOUR = np.array([-2.0, 1.0, 5.0, 8.0])


def log_joint_with_scale(latent, parameters):
    mean, log_tau = parameters["mean"], parameters["log_tau"]
    prior = -0.5 * jnp.sum((latent - mean) ** 2) * jnp.exp(-2 * log_tau) - latent.size * log_tau
    return prior - 0.5 * jnp.sum((FOUR - latent) ** 2)


@pytest.mark.slow
def test_a_variance_is_found_with_enough_particles(key):
    """tau² = var(x) - 1, from particles whose spread is nearly that of the posterior: 100 in 4 dimensions."""
    algorithm = coin.em(log_joint_with_scale)
    state = algorithm.init(start(jnp.float64, 100, 4), {"mean": jnp.zeros(()), "log_tau": jnp.zeros(())})
    state, (_, info) = pi.run(key, algorithm, state, 1000)
    expected = np.sqrt(np.var(FOUR) - 1)
    assert float(jnp.exp(state.parameters["log_tau"])) == pytest.approx(expected, rel=0.05)
    assert float(state.parameters["mean"]) == pytest.approx(FOUR.mean(), abs=0.05)
    assert float(info.gradient_norm[-1]) < 0.3
    assert float(info.log_joint[-1]) > float(info.log_joint[0])


def noisy_joint(data, key, latent, parameters):
    return log_joint(data, latent, parameters) * (1 + 0.5 * jax.random.normal(key, dtype=latent.dtype))


def test_a_minibatch_serves_both_steps(key):
    algorithm = coin.em(StochasticLogDensity(noisy_joint, jnp.asarray(DATA)))
    state = algorithm.init(start(jnp.float64), jnp.zeros(()))
    state, (_, info) = pi.run(key, algorithm, state, 500)
    assert float(state.parameters) == pytest.approx(DATA.mean(), abs=0.3)
    assert len(np.unique(np.asarray(info.log_joint))) == 500


def hole(latent, parameters):
    return jnp.where(latent[0] > 50, jnp.nan, log_joint(DATA, latent, parameters))


def test_a_particle_without_a_density_is_left_out(key):
    algorithm = coin.em(hole)
    initial = start(jnp.float64).at[4, 0].set(60.0)
    state, (_, info) = pi.run(key, algorithm, algorithm.init(initial, jnp.zeros(())), 30)
    np.testing.assert_allclose(state.positions[4], initial[4], rtol=1e-9)
    assert int(info.cloud.num_nonfinite[0]) == 1
    assert np.all(np.isfinite(info.log_joint))
    assert 0 < float(state.parameters) < 5


def nowhere(latent, parameters):
    return jnp.nan * jnp.sum(latent) * parameters


def test_without_any_density_nothing_moves_and_the_status_says_so(key):
    for maximize_fn in (None, lambda latents: jnp.nan * jnp.mean(latents)):
        algorithm = coin.em(nowhere, maximize_fn=maximize_fn)
        initial = algorithm.init(start(jnp.float64, 6), jnp.ones(()))
        state, info = jax.jit(algorithm.step)(key, initial)
        assert int(info.status) == pi.Status.NON_FINITE
        assert float(state.parameters) == 1.0
        np.testing.assert_allclose(state.positions, initial.positions, rtol=1e-12)


def test_the_published_set_up_moves_by_halves(key):
    """Identity and a unit of one half: the first move of every latent number and of every parameter."""
    half = betting.coin(unit=0.5)
    algorithm = coin.em(
        LogDensity(log_joint, jnp.asarray(DATA)),
        geometry=coin.Identity(),
        bet=half,
        parameter_bet=half,
        bandwidth="published",
    )
    initial = algorithm.init(start(jnp.float64, 6), jnp.zeros(()))
    state, _ = jax.jit(algorithm.step)(key, initial)
    np.testing.assert_allclose(jnp.abs(state.positions - initial.positions), 0.5, rtol=1e-9)
    assert abs(float(state.parameters)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: coin.em(None), TypeError, "log_joint_fn must be a function"),
        (lambda: coin.em(hole, maximize_fn=1.0), TypeError, "maximize_fn must be a function"),
        (lambda: coin.em(hole, bandwidth="wide"), ValueError, "bandwidth must be"),
        (lambda: coin.em(hole).init(jnp.eye(12), {}), ValueError, "no leaves"),
        (lambda: coin.em(hole).init(jnp.eye(12), jnp.arange(2)), TypeError, "floating point"),
        (lambda: coin.em(hole).init(jnp.ones((3, 12)), jnp.zeros(())), ValueError, "identical"),
        (
            lambda: coin.em(hole, maximize_fn=mean_latent).init(jnp.eye(12), jnp.zeros(2)),
            ValueError,
            "shaped like those given",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
