"""Particle Gibbs started at the exact posterior stays there: two states, three steps, four particles."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from probinfer import resampling
from tests.params import quick

REPEATS = 60_000
NUM = 4
START = np.array([0.7, 0.3])
TRANSITION = np.array([[0.8, 0.2], [0.35, 0.65]])
POTENTIAL = np.array([[0.3, 1.0], [1.0, 0.15], [0.25, 1.0]])  # step, state
PATHS = list(product(range(2), repeat=3))


def posterior():
    """Probabilities of all paths."""
    mass = [START[a] * TRANSITION[a, b] * TRANSITION[b, c] for a, b, c in PATHS]
    mass = mass * np.array([np.prod(POTENTIAL[range(3), path]) for path in PATHS])
    return mass / mass.sum()


def sweep(resample, key, reference):
    """One pass of particle Gibbs: ``reference`` (3,) in, a path of the new particles out."""
    dtype = jnp.result_type(float)
    potential, transition = jnp.asarray(POTENTIAL, dtype), jnp.asarray(TRANSITION, dtype)
    *keys, key_uniform = jax.random.split(key, 4)
    uniforms = jax.random.uniform(key_uniform, (4, NUM), dtype)
    states = (uniforms[0] > START[0]).astype(jnp.int32).at[0].set(reference[0])
    paths = jnp.zeros((NUM, 3), jnp.int32).at[:, 0].set(states)

    def step(carry, item):
        (paths, log_weights), (t, key, uniform) = carry, item
        ancestors, log_weights = resample(key, log_weights, t)
        paths = paths[ancestors]
        states = (uniform > transition[paths[:, t - 1], 0]).astype(jnp.int32).at[0].set(reference[t])
        return (paths.at[:, t].set(states), log_weights + jnp.log(potential[t, states])), None

    start = (paths, jnp.log(potential[0, states]))
    items = (jnp.arange(1, 3), jnp.stack(keys[1:]), uniforms[1:3])
    (paths, log_weights), _ = jax.lax.scan(step, start, items)
    cumulative = jnp.cumsum(jnp.exp(log_weights))
    return paths[jnp.sum(cumulative < uniforms[3, 0] * cumulative[-1])]


def deviation(resample):
    """Chi-squared statistic of one sweep from exact paths."""
    probabilities = posterior()
    start = np.random.default_rng(11).choice(len(PATHS), size=REPEATS, p=probabilities)
    keys = jax.random.split(jax.random.key(12), REPEATS)
    references = jnp.asarray(np.array(PATHS)[start], jnp.int32)
    ended = jax.jit(jax.vmap(partial(sweep, resample)))(keys, references)
    counts = np.bincount(np.asarray(ended) @ [4, 2, 1], minlength=len(PATHS))
    return np.sum((counts - REPEATS * probabilities) ** 2 / (REPEATS * probabilities))


def resample(adaptive, key, log_weights, t):
    return adaptive(key, log_weights, NUM, t)[:2]


def forced(scheme, key, log_weights, t):
    """The fault: an unconditional scheme whose first ancestor is overwritten."""
    ancestors, log_weights = scheme(key, log_weights, NUM)
    return ancestors.at[0].set(0), log_weights


# false-fail rate 1e-6 a case
LIMIT = stats.chi2.isf(1e-6, len(PATHS) - 1)


@pytest.mark.parametrize("name", quick(resampling.CONDITIONAL, "multinomial"))
def test_particle_gibbs_started_at_the_posterior_stays_there(name):
    # about two of three times the trigger fires: with and without resampling
    adaptive = resampling.adaptive(name, resampling.ess_below(0.9)).conditional()
    assert deviation(partial(resample, adaptive)) < LIMIT


def test_an_overwritten_ancestor_is_noticed():
    # over 24 keys 109 on average, as a noncentral chi-squared with 102: below the limit, 41, at a rate of 3e-5
    assert deviation(partial(forced, resampling.systematic)) > LIMIT
