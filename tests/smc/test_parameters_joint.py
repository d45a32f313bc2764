"""Transitions of PMMH and particle Gibbs for parameters: exact starts stay exact, the joint distribution invariant."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

from probinfer import resampling, smc
from probinfer.checks import joint_test
from probinfer.smc.conditional.gibbs import choose_path
from probinfer.smc.filtering.forward_pass import forward
from probinfer.smc.models.feynman_kac import as_batched
from probinfer.smc.parameters import gibbs_step as gibbs
from probinfer.smc.parameters import likelihood, pmmh
from probinfer.smc.parameters import model as parameters
from tests.reference import hmm
from tests.smc import parameter_cases as cases
from tests.smc.models import P_LIMIT

CHAINS, NUM_PARTICLES = 8000, 3
BINS = 6
STEP_SIZE, INVERSE_MASS = 0.4, 1.0


def conditional(key, target, position, path, num_particles=NUM_PARTICLES):
    """A state of PMMH from the distribution it leaves invariant, given parameters and path from their posterior."""
    key_filter, key_path = jax.random.split(key)
    adaptive = resampling.adaptive().conditional()
    model = as_batched(parameters.model_at(target, position))
    sweep = forward(key_filter, model, adaptive, path, target.num_steps, num_particles, "paths")
    log_prior = parameters.log_prior(target, position)
    return pmmh.PMMHState(position, log_prior, sweep.log_evidence, choose_path(key_path, sweep))


def walk(key, target, state, num_particles=NUM_PARTICLES, renewed=None):
    """Make a step of PMMH; a broken one if ``renewed``: it estimates the likelihood at its position again."""
    dtype = state.position.dtype
    if renewed is not None:
        fresh = likelihood.estimate_likelihood(
            jax.random.fold_in(key, 7), target, state.position, num_particles
        )
        log_evidence = jnp.where(renewed, fresh.log_evidence, state.log_evidence)
        state = state._replace(log_evidence=log_evidence)
    factor, scale = jnp.eye(state.position.shape[0], dtype=dtype), jnp.asarray(1.2, dtype)
    return pmmh.pmmh_step(key, target, state, factor, scale, num_particles, True)[0]


def alternate(key, target, position, path, num_particles=NUM_PARTICLES):
    mass = jnp.full_like(position, INVERSE_MASS)
    step_size = jnp.asarray(STEP_SIZE, position.dtype)
    return gibbs.parameter_gibbs_step(key, target, position, path, step_size, mass, num_particles)[:2]


@jax.jit
def four_walks(keys, shares, paths, renewed):
    target = cases.finite_target()

    def one(key, share, path):
        key_start, key_steps = jax.random.split(key)
        state = conditional(key_start, target, flat(target, share), path)
        step = lambda state, key: (walk(key, target, state, renewed=renewed), None)  # noqa: E731
        state, _ = jax.lax.scan(step, state, jax.random.split(key_steps, 4))
        return target.constrain({"share": state.position[0]})["share"], state.path

    return jax.vmap(one)(keys, shares, paths)


@jax.jit
def four_alternations(keys, shares, paths):
    target = cases.finite_target()

    def one(key, share, path):
        step = lambda state, key: (alternate(key, target, *state), None)  # noqa: E731
        (position, path), _ = jax.lax.scan(step, (flat(target, share), path), jax.random.split(key, 4))
        return target.constrain({"share": position[0]})["share"], path

    return jax.vmap(one)(keys, shares, paths)


def flat(target, share):
    return parameters.flatten_position(target.unconstrain({"share": share}))


def exact_start(dtype):
    """Independent shares and paths from their joint posterior."""
    shares, masses = cases.finite_joint()
    paths = hmm.enumerate_paths(cases.FINITE)[0]
    rng = np.random.default_rng(5)
    drawn = rng.choice(masses.size, CHAINS, p=masses.ravel() / masses.sum())
    row, column = np.unravel_index(drawn, masses.shape)
    within = (rng.uniform(size=CHAINS) - 0.5) / len(shares)
    return jnp.asarray(shares[row] + within, dtype), jnp.asarray(paths[column], jnp.int32)


def chi_squared(shares, paths):
    """Return a p-value of the joint distribution of path and binned share; cells with under 10 expected are merged."""
    grid, masses = cases.finite_joint()
    cells = np.add.reduceat(masses, np.arange(0, len(grid), -(-len(grid) // BINS)), axis=0)
    expected = (cells / cells.sum() * CHAINS).ravel()
    bins = np.minimum((np.asarray(shares) * len(grid)).astype(int) // -(-len(grid) // BINS), len(cells) - 1)
    index = bins * masses.shape[1] + hmm.path_index(np.asarray(paths), 3)
    counts = np.bincount(index, minlength=len(expected))
    rare = expected < 10
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    return stats.chisquare(counts, expected).pvalue


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps", [partial(four_walks, renewed=False), four_alternations], ids=["PMMH", "Gibbs"]
)
def test_chains_started_at_the_posterior_stay_there(steps, dtype):
    shares, paths = exact_start(dtype)
    assert chi_squared(shares, paths) > P_LIMIT
    moved, new_paths = steps(jax.random.split(jax.random.key(3), CHAINS), shares, paths)
    assert np.mean(moved != shares) > 0.5
    assert np.mean(np.any(new_paths != paths, axis=1)) > 0.3
    assert chi_squared(moved, new_paths) > P_LIMIT


@pytest.mark.slow
def test_a_chain_that_draws_its_estimate_anew_is_seen(dtype):
    keys, start = jax.random.split(jax.random.key(3), CHAINS), exact_start(dtype)
    assert chi_squared(*four_walks(keys, *start, renewed=True)) < P_LIMIT


# The joint distribution of parameters, path and data; each lane carries a seed, for the start of a transition


def target_of(y):
    return smc.Parameters(cases.PRIORS, Partial(cases.linear, y), cases.NUM_STEPS, cases.log_initial)


def prior_sample(key):
    key_params, key_path, key_seed = jax.random.split(key, 3)
    dtype = jnp.result_type(float)
    target = target_of(jnp.zeros(cases.NUM_STEPS, dtype))
    position = parameters.draw_prior(target, key_params)
    fk = parameters.model_at(target, position)
    keys = jax.random.split(key_path, cases.NUM_STEPS)
    first = fk.init_sample(keys[0])

    def move(x, row):
        x = fk.propagate(row[0], x, row[1])
        return x, x

    _, later = jax.lax.scan(move, first, (keys[1:], jnp.arange(1, cases.NUM_STEPS)))
    path = jnp.concatenate([first[None], later])
    return {"position": position, "path": path, "seed": jax.random.uniform(key_seed, (), dtype)}


def simulate(key, lane):
    noise = jnp.sqrt(jnp.asarray(cases.FIXED["noise"], lane["path"].dtype))
    return lane["path"] + noise * jax.random.normal(key, lane["path"].shape, lane["path"].dtype)


def start_walk(lane, y):
    key = jax.random.key((lane["seed"] * 2**22).astype(jnp.uint32))
    return {
        "chain": conditional(key, target_of(y), lane["position"], lane["path"], 8),
        "seed": lane["seed"],
    }


def step_walk(key, state, y):
    key_walk, key_seed = jax.random.split(key)
    chain = walk(key_walk, target_of(y), state["chain"], 8)
    return {"chain": chain, "seed": jax.random.uniform(key_seed, (), y.dtype)}


def position_walk(state):
    return {"position": state["chain"].position, "path": state["chain"].path, "seed": state["seed"]}


def step_gibbs(shift, key, lane, y):
    """An iteration of particle Gibbs, then (in a broken transition) a shift of the log process variance."""
    key_gibbs, key_seed = jax.random.split(key)
    position, path = alternate(key_gibbs, target_of(y), lane["position"], lane["path"], 8)
    position = position.at[0].add(shift)
    return {"position": position, "path": path, "seed": jax.random.uniform(key_seed, (), path.dtype)}


def log_joint(lane, y):
    return parameters.log_joint(target_of(y), lane["position"], lane["path"])


def judged(step, seed, **settings):
    return joint_test(
        jax.random.key(seed),
        prior_sample,
        simulate,
        step,
        reverse=None,
        quantities={"log joint": log_joint},
        num_simulations=300,
        num_draws=15,
        level=1e-4,
        mode="vmap",
        progress=False,
        **settings,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PMMH", "particle Gibbs"])
def test_a_transition_leaves_the_joint_distribution(name):
    settings = {"init_fn": start_walk, "position_fn": position_walk} if name == "PMMH" else {}
    report = judged(step_walk if name == "PMMH" else Partial(step_gibbs, jnp.full((), 0.0)), 1, **settings)
    assert report.passed, report.verdict  # a false alarm has probability 1e-4
    assert min(report.moved.values()) > 0.7


@pytest.mark.slow
def test_a_transition_with_another_distribution_is_caught():
    report = judged(Partial(step_gibbs, jnp.full((), 0.15)), 1)
    assert report.passed is False, report.verdict
