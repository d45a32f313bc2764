"""Every transition leaves the joint distribution of parameters and data invariant; broken ones do not."""

import jax
import jax.numpy as jnp
import pytest

from probinfer.app.commands.check import TRANSITIONS
from probinfer.app.suite import known_targets, trials
from probinfer.mcmc.hamiltonian import IntegratorState
from probinfer.mcmc.lanes.hmc import hmc_transition
from probinfer.mcmc.nuts_steps import init_trajectory, is_complete, take_leapfrog_step

STEP_SIZE, INVERSE_MASS = 0.35, (0.6, 0.3)
MAX_DEPTH = 4


def init_state(logdensity_fn, position):
    return IntegratorState(position, *jax.value_and_grad(logdensity_fn)(position))


def hmc(logdensity_fn, key, state, accept=1.0, step_size=STEP_SIZE):
    uniforms = jax.random.uniform(key, (4,), state.position.dtype).at[1].multiply(accept)
    mass, step_size = (jnp.asarray(value, state.position.dtype) for value in (INVERSE_MASS, step_size))
    return hmc_transition(uniforms, state, jax.value_and_grad(logdensity_fn), step_size, mass, 5)[0]


def hmc_without_accept(logdensity_fn, key, state):
    return hmc(logdensity_fn, key, state, accept=0.0, step_size=0.9)


def nuts(logdensity_fn, key, state, slope=1.0, step_size=STEP_SIZE):
    value_and_grad_fn = jax.value_and_grad(logdensity_fn)
    mass = jnp.asarray(INVERSE_MASS, state.position.dtype)
    step_size = jnp.asarray(step_size, mass.dtype)
    key_first, key_rest = jax.random.split(key)
    first = jax.random.uniform(key_first, (3,), mass.dtype)

    def leap(tree):
        uniforms = jax.random.uniform(jax.random.fold_in(key_rest, tree.num_leapfrogs), (2,), mass.dtype)
        return take_leapfrog_step(slope * uniforms, tree, value_and_grad_fn, step_size, mass)

    tree = init_trajectory(first, state, mass, MAX_DEPTH)
    return jax.lax.while_loop(lambda t: ~is_complete(t, MAX_DEPTH), leap, tree).chosen


def nuts_that_always_moves(logdensity_fn, key, state):
    """Choose the last state of every half, whatever its weight, with steps so long that weights differ."""
    return nuts(logdensity_fn, key, state, slope=0.0, step_size=0.9)


def judged(kernel, seed):
    return trials.joint(kernel, known_targets.location_and_scale(), 400, jax.random.key(seed), 1e-4)


@pytest.mark.parametrize(
    "kernel",
    [
        TRANSITIONS["NUTS"](),
        pytest.param(TRANSITIONS["HMC"](), marks=pytest.mark.slow),
        pytest.param(
            trials.Transition("HMC, many data sets", init_state, hmc, lambda state: state.position),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            trials.Transition("NUTS by leapfrogs", init_state, nuts, lambda state: state.position),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda kernel: kernel.name,
)
def test_a_transition_leaves_the_joint_distribution_invariant(kernel):
    report, passed, verdict = judged(kernel, 1)
    assert passed, verdict  # a false alarm has probability 1e-4
    assert min(report.moved.values()) > 0.9


@pytest.mark.parametrize(
    "step", [pytest.param(hmc_without_accept, marks=pytest.mark.slow), nuts_that_always_moves]
)
def test_a_broken_transition_is_detected(step):
    _, passed, verdict = judged(
        trials.Transition("broken", init_state, step, lambda state: state.position), 2
    )
    assert passed is False, verdict  # over keys p is below 1e-100
