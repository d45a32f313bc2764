"""Single transitions and windows against their definitions: no distribution is estimated, nothing fails by chance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from probinfer.mcmc.adaptation import metric as metrics
from probinfer.mcmc.adaptation import warmup as warmups
from probinfer.mcmc.adaptation.tuning import draw_index
from probinfer.mcmc.hamiltonian import IntegratorState, energy, leapfrog
from probinfer.mcmc.lanes.hmc import hmc_transition
from probinfer.mcmc.nuts_steps import init_trajectory, sample_trajectory, take_leapfrog_step
from tests.params import quick

MASS = np.array([1.0, 4.0])


def log_normal(x):
    return -0.5 * jnp.sum(x**2 / jnp.asarray(MASS, x.dtype))


def state_at(x, dtype):
    x = jnp.asarray(x, dtype)
    return IntegratorState(x, *jax.value_and_grad(log_normal)(x))


def test_every_draw_has_its_row():
    rows = [int(draw_index(jnp.int32(number), 3, 4, 2)) for number in range(3 + 4 * 2)]
    # three of the warm-up, then every second one, the last transition included
    assert rows == [4, 4, 4, 4, 0, 4, 1, 4, 2, 4, 3]
    assert [int(draw_index(jnp.int32(number), 0, 2, 1)) for number in range(3)] == [0, 1, 2]


@pytest.mark.f32
def test_a_trajectory_weighs_all_its_states_and_no_other(dtype):
    """Three doublings without a turn: the weight is that of eight states, integrated from end to end."""
    value_and_grad_fn, mass = jax.value_and_grad(log_normal), jnp.asarray(MASS, dtype)
    step_size = jnp.asarray(0.05, dtype)
    sample = jax.jit(partial(sample_trajectory, value_and_grad_fn=value_and_grad_fn, max_depth=3))
    for seed in range(4):
        start = state_at([0.3, -1.0], dtype)
        tree = sample(jax.random.key(seed), start, step_size=step_size, inverse_mass=mass)
        assert int(tree.depth) == 3
        assert not bool(tree.turning)
        state, momentum = tree.first
        log_weights, momenta = [], []
        for _ in range(8):
            log_weights.append(float(tree.energy - energy(state.logdensity, momentum, mass)))
            momenta.append(momentum)
            state, momentum = leapfrog(value_and_grad_fn, state, momentum, step_size, mass)
        tolerance = 1e-3 if dtype == jnp.float32 else 1e-9
        np.testing.assert_allclose(tree.log_weight, logsumexp(log_weights), atol=tolerance)
        np.testing.assert_allclose(tree.momentum_sum, np.sum(momenta, axis=0), atol=tolerance)


def turns(momenta, mass, ends=0.5):
    """The criterion of Betancourt (2017), A.4.2, by its definition; the sum lacks half of both ends."""
    rho = np.sum(momenta, axis=0) - ends * (momenta[0] + momenta[-1])
    return momenta[0] @ (mass * rho) <= 0 or momenta[-1] @ (mass * rho) <= 0


def test_a_trajectory_doubles_until_a_subtree_turns():
    """No subtree of a completed doubling turns; the whole trajectory may, and then it is complete."""
    value_and_grad_fn, mass = jax.value_and_grad(log_normal), jnp.ones(2)
    sample = jax.jit(partial(sample_trajectory, value_and_grad_fn=value_and_grad_fn, max_depth=6))
    move = jax.jit(partial(leapfrog, value_and_grad_fn))
    by_ends = 0
    starts = np.random.default_rng(0).normal(size=(300, 2)) * np.sqrt(MASS)
    for seed, at in enumerate(starts):
        step_size, start = 0.1 + 0.004 * seed, state_at(at, jnp.float64)
        tree = sample(jax.random.key(seed), start, step_size=jnp.asarray(step_size), inverse_mass=mass)
        state, momentum = tree.first
        path = []
        for _ in range(int(tree.num_leapfrogs) + 1):
            path.append(np.asarray(momentum))
            state, momentum = move(state, momentum, step_size, mass)
        size, leaf = 2 ** int(tree.depth), int(tree.leaf)
        forward = leaf == 0 or (int(tree.directions) >> int(tree.depth)) & 1
        momenta, half = (path[:size], path[size:]) if forward else (path[leaf:], path[:leaf][::-1])
        np.testing.assert_allclose(tree.momentum_sum, np.sum(momenta, axis=0), atol=1e-9)
        for length in 2 ** np.arange(1, int(tree.depth)):
            parts = [momenta[i : i + length] for i in range(0, size, length)]
            assert not any(turns(part, mass) for part in parts)
        if half:  # stopped where a subtree of it turned
            parts = [half[-length:] for length in (2, 4, 8, 16, 32) if leaf % length == 0]
            assert any(turns(part, mass) for part in parts)
            by_ends += not any(turns(part, mass, ends=0.0) for part in parts)
        elif turns(momenta, mass):
            by_ends += not turns(momenta, mass, ends=0.0)
        else:
            assert int(tree.depth) == 6
    # 11 or so of 300: none has a probability of 2e-5
    assert by_ends, "leaving out half of the ends made no difference"


def test_a_new_half_is_accepted_by_the_ratio_of_weights(dtype):
    """The first doubling is one state: it is accepted with the ratio of its weight to that of the start, at most 1."""
    # from the mode the leapfrog only loses weight
    start, mass = state_at([0.0, 0.0], dtype), jnp.asarray(MASS, dtype)
    tree = init_trajectory(jnp.asarray([0.7, 0.9, 0.2], dtype), start, mass, 4)
    step = partial(take_leapfrog_step, value_and_grad_fn=jax.value_and_grad(log_normal), inverse_mass=mass)
    step = jax.jit(partial(step, step_size=jnp.asarray(1.3, dtype)))
    log_weight = step(jnp.full(2, 0.5, dtype), tree).half.log_weight
    assert log_weight < -1e-3
    for factor, accepted in ((0.99, True), (1.01, False)):
        after = step(jnp.asarray([0.5, float(jnp.exp(log_weight)) * factor], dtype), tree)
        assert bool(jnp.any(after.chosen.position != start.position)) is accepted


def test_a_transition_is_accepted_by_its_own_uniform_number(dtype):
    """The second number; the first is the jitter of the step size, and the two must be independent."""
    # from the mode the leapfrog only loses weight: p^2 + (1 - step^2 / 4) x^2 is conserved
    start, mass = state_at([0.0, 0.0], dtype), jnp.asarray(MASS, dtype)
    value_and_grad_fn = jax.value_and_grad(log_normal)
    transition = jax.jit(partial(hmc_transition, value_and_grad_fn=value_and_grad_fn, num_leapfrogs=3))

    def move(jitter, accept):
        uniforms = jnp.asarray([jitter, accept, 0.9, 0.2], dtype)
        return transition(uniforms, start, step_size=jnp.asarray(1.3, dtype), inverse_mass=mass)

    for jitter in (0.02, 0.98):
        _, log_acceptance_ratio = move(jitter, 0.5)
        assert log_acceptance_ratio < -1e-3
        for factor, accepted in ((0.99, True), (1.01, False)):
            state, _ = move(jitter, float(jnp.exp(log_acceptance_ratio)) * factor)
            assert bool(jnp.any(state.position != start.position)) is accepted


def warmed_up(config, draws, num_chains, dtype):
    """The warm-up after steps of draws (step, chain, d) from a standard normal."""
    state = warmups.init(config, num_chains, metrics.identity(2, 2, dtype))
    update = jax.jit(warmups.update)
    for row in jnp.asarray(draws, dtype):
        state = update(
            config,
            state,
            row,
            -row,
            -jnp.sum(row**2, axis=1) / 2,
            jnp.full(num_chains, 0.8, dtype),
            jnp.int32(7),
        )
    return state


@pytest.mark.f32
@pytest.mark.parametrize("num_warmup", quick([1, 3, 16, 17, 46, 106], 1, 17))
def test_a_last_window_of_few_draws_changes_nothing(num_warmup, dtype):
    """The last window of these warm-ups has one to seven steps: its R-hat and scales are useless."""
    num_chains = 2
    config = warmups.WarmupConfig(jnp.ones(3, bool), jnp.asarray(0.8, dtype), num_warmup, 2)
    draws = np.random.default_rng(num_warmup).normal(size=(num_warmup, num_chains, 2))
    state = warmed_up(config, draws, num_chains, dtype)
    assert bool(warmups.is_finished(state))
    assert int(state.num_steps) == num_warmup
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state))
    if num_warmup < 16:  # nothing was learned
        np.testing.assert_array_equal(state.choice.metric.sigma, np.ones(2))
    else:
        assert np.all(np.abs(np.log(np.asarray(state.choice.metric.sigma))) < 0.1)  # exact for a normal


def test_constant_chains_leave_the_metric_finite(dtype):
    config = warmups.WarmupConfig(jnp.ones(3, bool), jnp.asarray(0.8, dtype), 30, 2)
    state = warmed_up(config, np.broadcast_to([[1.0, 2.0], [3.0, 2.0]], (20, 2, 2)), 2, dtype)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state))
    assert float(state.rhat) > 1e3


def test_rhat_of_a_window_is_that_of_its_draws_wherever_they_lie(dtype):
    draws = np.random.default_rng(0).normal(size=(10, 2, 2))
    config = warmups.WarmupConfig(jnp.ones(3, bool), jnp.asarray(0.8, dtype), 60, 2)
    rhats = [float(warmed_up(config, draws + shift, 2, dtype).rhat) for shift in (0.0, 1e7)]
    halves = draws.reshape(2, 5, 2, 2)
    within = halves.var(axis=1).mean(axis=(0, 1))
    between = halves.mean(axis=1).reshape(4, 2).var(axis=0, ddof=1)
    # whitened by the scales of the window: R-hat does not change, up to the rotation of a dense metric
    assert rhats[0] == pytest.approx(np.sqrt(np.max(1 + between / within)), rel=0.2)
    assert rhats[1] == pytest.approx(rhats[0], rel=1e-6)


def test_secant_pairs_give_the_scales_of_a_normal_and_nothing_if_the_curvature_has_the_wrong_sign():
    """Pairs dx and dg = -P dx give the scales 1 / sqrt(P); those of the other sign are ignored."""
    precision = jnp.array([4.0, 1 / 9, 1.0])
    differences = jnp.concatenate(
        [jnp.diag(jnp.array([0.3, 2.0, 0.7])), -jnp.diag(jnp.array([0.1, 5.0, 0.2]))]
    )
    candidates = jnp.array([True, False, False])
    metric = metrics.from_secants(differences, -differences * precision, candidates, 2)
    np.testing.assert_allclose(metric.sigma, 1 / np.sqrt(precision), rtol=1e-4)
    upside_down = metrics.from_secants(differences, differences * precision, candidates, 2)
    np.testing.assert_array_equal(upside_down.sigma, np.ones(3))
