"""Every algorithm runs in our loop and in blackjax's, to the same draws, and traces once.

A new algorithm is one line in ``ALGORITHMS``: a function that builds it from a log density, and a starting position.
"""

from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import pytest

import probinfer as pi
from probinfer.core.algorithms import algorithm
from probinfer.core.types import pytree
from tests.params import quick

NUM_STEPS = 6
SCALES = jnp.array([1.0, 30.0])  # badly scaled
TRACES: list[str] = []


@pytree
class Target:
    """An asymmetric log density in two dimensions; arrays are data."""

    scales: object

    def __call__(self, position):
        TRACES.append("target")
        z = position / self.scales
        return -jnp.sum(jnp.exp(z) - z)


class WalkState(NamedTuple):
    position: object
    logdensity: object


class WalkInfo(NamedTuple):
    is_accepted: object


def walk_init(logdensity_fn, position):
    return WalkState(position, logdensity_fn(position))


def walk_step(logdensity_fn, key, state):
    """Random-walk Metropolis, the smallest algorithm of the library's own kind."""
    key_move, key_accept = jax.random.split(key)
    position = state.position + jax.random.normal(key_move, state.position.shape, state.position.dtype)
    proposed = walk_init(logdensity_fn, position)
    accept = jnp.log(jax.random.uniform(key_accept)) < proposed.logdensity - state.logdensity
    return jax.tree.map(lambda new, old: jnp.where(accept, new, old), proposed, state), WalkInfo(accept)


OURS = {
    "random walk": lambda target: algorithm(walk_init, walk_step, target),
}
THEIRS = {
    "blackjax.nuts": lambda target: blackjax.nuts(target, 0.5, SCALES**2, max_num_doublings=4),
    "blackjax.hmc": lambda target: blackjax.hmc(target, 0.5, SCALES**2, 3),
    "blackjax.mala": lambda target: blackjax.mala(target, 0.1),
}
ALGORITHMS = OURS | THEIRS


@pytest.fixture
def position(dtype):
    return jnp.array([0.5, -20.0], dtype)


@pytest.mark.parametrize("name", quick(ALGORITHMS, *OURS, "blackjax.hmc"))
def test_both_loops_make_the_same_draws(name, key, position, count_compiles):
    alg = ALGORITHMS[name](Target(SCALES))
    state = alg.init(position)
    end, history = pi.run(key, alg, state, NUM_STEPS)
    their_end, theirs = blackjax.util.run_inference_algorithm(key, alg, NUM_STEPS, initial_state=state)
    assert jax.tree.structure(history.records) == jax.tree.structure(theirs)
    for ours, other in zip(
        jax.tree.leaves((end, history.records)), jax.tree.leaves((their_end, theirs)), strict=True
    ):
        assert ours.dtype == other.dtype
        assert jnp.allclose(ours, other, rtol=1e-4 if ours.dtype == jnp.float32 else 1e-9, equal_nan=True)
    new_key = jax.random.key(1)
    with count_compiles() as compiles:
        pi.run(new_key, alg, state, NUM_STEPS)
    assert compiles.count == 0
    states, _ = history
    assert len(jnp.unique(states.position[:, 0])) > 1  # it moves


@pytest.mark.f32
@pytest.mark.parametrize("name", OURS)
def test_new_data_of_the_same_shape_traces_nothing(name, key, position, count_compiles):
    state = OURS[name](Target(SCALES)).init(position)
    first, _ = pi.run(key, OURS[name](Target(SCALES)), state, NUM_STEPS)
    rebuilt, new_key = OURS[name](Target(2 * SCALES)), jax.random.key(1)
    traces = len(TRACES)
    with count_compiles() as compiles:
        second, _ = pi.run(new_key, rebuilt, state, NUM_STEPS)
    assert compiles.count == 0
    assert len(TRACES) == traces
    assert not jnp.array_equal(first.position, second.position)
