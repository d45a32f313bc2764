r"""A population of parameters, each with a particle filter of its own: SMC^2, one observation a step.

After each observation the parameters are weighed by its predicted density. Where their effective sample size is below
half their number, or the last observation has been seen, they are resampled and moved by particle marginal Metropolis
steps, half of them independent draws from a Student-t with mean and covariance of the population, half local ones.

A *learning* population decides when to move, how often, and how to propose; what it chose is a ``Plan``. If too few
proposals are accepted, its filters are too noisy: it stops, to be given twice as many state particles
(``attach``). A population that keeps a given plan has an unbiased evidence, :math:`E\hat Z = Z`.

References:
    Chopin, Jacob and Papaspiliopoulos (2013), "SMC^2", algorithm 1 and sections 3.5 (moves), 3.6 (more particles).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer import resampling
from probinfer.core.algorithms import Algorithm, algorithm
from probinfer.core.status import Status
from probinfer.core.types import Array, PRNGKey
from probinfer.numerics import weights
from probinfer.numerics.covariance_factor import first_root, root_of
from probinfer.smc.parameters.likelihood import extend, run_to, value
from probinfer.smc.parameters.model import Parameters, draw, log_prior
from probinfer.smc.parameters.proposals import propose

__all__ = ["Plan", "Population", "Step", "attach", "begin", "empty_plan", "is_over", "record", "smc2"]

_ENOUGH_ACCEPTED = 2.0  # mean number of accepted moves of a particle
_MOST_MOVES = 30


class Plan(NamedTuple):
    """When and how to move; row t - 1 is for the moves after observation t.

    ``num_moves`` (T,), 0 where there is no move; ``means`` (T, d) and ``roots`` (T, d, d) of the proposals.
    """

    num_moves: Any
    means: Any
    roots: Any


class Population(NamedTuple):
    """M parameters after ``num_seen`` observations."""

    positions: Any  # (M, d)
    log_priors: Any  # (M,)
    log_evidences: Any  # (M,), of their filters
    log_weights: Any  # (M,)
    log_factor: Any  # the evidence is exp(log_factor) times the mean weight
    filters: Any  # states, leaves (M, ...); None before ``attach``
    num_seen: Any
    plan: Plan
    learning: Any
    crowded: Any  # too few proposals were accepted
    finished: Any
    status: Any
    num_undefined: Any
    num_filter_steps: Any  # observations times filters, in the floating type


class Step(NamedTuple):
    """What one step did: ESS before it, moves, and shares of independent and local proposals accepted (NaN: none)."""

    ess: Any
    num_moves: Any
    acceptance: Any
    log_evidence: Any


def smc2(target: Parameters, least_acceptance: Array) -> Algorithm:
    """Return a population as an algorithm; a step moves where it is due and takes one observation.

    Args:
        target: parameters and models.
        least_acceptance: a learning population stops where a smaller share of the proposals is accepted.
    """
    return algorithm(_no_init, _step, target, least_acceptance)


def _no_init(target: Parameters, least_acceptance: Array, population: Population) -> Population:
    return population


def empty_plan(num_steps: int, dimension: int) -> Plan:
    """Return a plan without moves, to be learned; T d^2 numbers.

    Args:
        num_steps: T.
        dimension: d.
    """
    dtype = jnp.result_type(float)
    root = first_root(dimension, dtype)
    return Plan(
        jnp.zeros(num_steps, jnp.int32),
        jnp.zeros((num_steps, dimension), dtype),
        jnp.broadcast_to(root, (num_steps, *root.shape)),
    )


@partial(jax.jit, static_argnames="num")
def begin(key: PRNGKey, target: Parameters, plan: Plan, learning: Array, *, num: int) -> Population:
    """Draw parameters from the prior; ``attach`` gives them filters and the first observation.

    Args:
        key: random key.
        target: parameters and models.
        plan: to be kept, or filled.
        learning: whether to fill it.
        num: M.
    """
    positions = jax.vmap(partial(draw, target))(jax.random.split(key, num))
    log_priors = jax.vmap(partial(log_prior, target))(positions)
    none, zero, no = jnp.zeros_like(log_priors), jnp.zeros((), positions.dtype), jnp.zeros((), jnp.int32)
    return Population(
        positions, log_priors, none, none, zero, None, no + 1, plan, learning, no > 0, no > 0, no, no, zero
    )


@partial(jax.jit, static_argnames="num_particles")
def attach(key: PRNGKey, target: Parameters, population: Population, *, num_particles: int) -> Population:
    r"""Give every parameter a new filter, and the weight :math:`\hat Z_{new} / \hat Z_{old}`.

    At the start the old evidence is that of no observation, 1. Later this is the exchange step of Chopin et al.
    (2013), section 3.6.1.

    Args:
        key: random key.
        target: parameters and models.
        population: its filters are not read.
        num_particles: N of each filter.
    """
    num = population.log_weights.shape[0]
    run = partial(_fresh, target, population.num_seen, num_particles)
    filters, log_evidences, undefined = run(jax.random.split(key, num), population.positions)
    dead = population.log_weights == -jnp.inf
    gained = jnp.where(dead, 0, log_evidences - jnp.where(dead, 0, population.log_evidences))
    seen = population.num_seen.astype(population.log_factor.dtype)
    return _judged(
        population._replace(
            filters=filters,
            log_evidences=log_evidences,
            log_weights=population.log_weights + gained,
            crowded=jnp.zeros((), bool),
            num_undefined=population.num_undefined + jnp.sum(undefined, dtype=jnp.int32),
            num_filter_steps=population.num_filter_steps + num * seen,
        )
    )


def is_over(population: Population, info: Step) -> Array:
    """Whether all observations are used, the filters are too noisy, or all particles are dead."""
    del info
    return population.finished | population.crowded | (population.status != int(Status.OK))


def record(population: Population, info: Step) -> Step:
    """What is kept of a step."""
    del population
    return info


def _fresh(target: Parameters, num_seen: Array, num_particles: int, keys: Array, positions: Array) -> tuple:
    """Filters (M,) over the observations so far, their log evidences, and whether these are undefined."""
    one = partial(run_to, target=target, num_seen=num_seen, num_particles=num_particles)
    filters = jax.vmap(lambda key, position: one(key, position=position))(keys, positions)
    return filters, *_values(filters, positions.dtype)


def _values(filters: Any, dtype: Any) -> tuple[Array, Array]:
    log_evidences, undefined = jax.vmap(value)(filters)
    return log_evidences.astype(dtype), undefined


def _judged(population: Population) -> Population:
    dead = jnp.all(population.log_weights == -jnp.inf)
    return population._replace(
        status=jnp.where(dead, int(Status.DEGENERATE_WEIGHTS), int(Status.OK)).astype(jnp.int32)
    )


def _step(
    target: Parameters, least_acceptance: Array, key: PRNGKey, population: Population
) -> tuple[Population, Step]:
    key_move, key_extend = jax.random.split(key)
    num = population.log_weights.shape[0]
    ess = weights.ess(population.log_weights)
    last = population.num_seen == target.num_steps
    learned = (ess < 0.5 * num) | last
    due = jnp.where(population.learning, learned, population.plan.num_moves[population.num_seen - 1] > 0)
    population, num_moves, acceptance = lax.cond(
        due, partial(_rejuvenate, target), _stay, key_move, population
    )
    crowded = population.learning & due & (jnp.max(acceptance) < least_acceptance)
    population = lax.cond(
        last | crowded, lambda key, population: population, partial(_observe, target), key_extend, population
    )
    population = population._replace(crowded=crowded, finished=last & ~crowded)
    log_evidence = population.log_factor + weights.log_mean_exp(population.log_weights)
    return population, Step(ess, num_moves, acceptance, log_evidence)


def _observe(target: Parameters, key: PRNGKey, population: Population) -> Population:
    num, t = population.log_weights.shape[0], population.num_seen
    one = lambda key, position, state: extend(key, target, position, state, t)  # noqa: E731
    filters = jax.vmap(one)(jax.random.split(key, num), population.positions, population.filters)
    log_evidences, undefined = _values(filters, population.positions.dtype)
    dead = population.log_evidences == -jnp.inf
    gained = log_evidences - jnp.where(dead, 0, population.log_evidences)
    return _judged(
        population._replace(
            filters=filters,
            log_evidences=log_evidences,
            log_weights=jnp.where(dead, -jnp.inf, population.log_weights + gained),
            num_seen=t + 1,
            num_undefined=population.num_undefined + jnp.sum(undefined & ~dead, dtype=jnp.int32),
            num_filter_steps=population.num_filter_steps + num,
        )
    )


def _stay(key: PRNGKey, population: Population) -> tuple[Population, Array, Array]:
    del key
    return population, jnp.int32(0), jnp.full(2, jnp.nan, population.positions.dtype)


def _rejuvenate(target: Parameters, key: PRNGKey, population: Population) -> tuple[Population, Array, Array]:
    """Resample and move: as often as planned, or until the moves accepted are enough."""
    key_resample, key_moves = jax.random.split(key)
    row = population.num_seen - 1
    mean, root = _proposal(population)
    num = population.log_weights.shape[0]
    ancestors, log_weights = resampling.systematic(key_resample, population.log_weights, num)
    chosen = jax.tree.map(
        lambda leaf: leaf[ancestors],
        (population.positions, population.log_priors, population.log_evidences, population.filters),
    )
    population = population._replace(
        **dict(zip(("positions", "log_priors", "log_evidences", "filters"), chosen, strict=True)),
        log_factor=population.log_factor + log_weights[0],
        log_weights=jnp.zeros_like(population.log_weights),
    )
    planned = population.plan.num_moves[row]

    def going_on(carry: tuple) -> Array:
        _, count, accepted = carry
        learned = (jnp.sum(accepted) < _ENOUGH_ACCEPTED) & (count < _MOST_MOVES)
        return jnp.where(population.learning, learned | (count < 2), count < planned)

    def body(carry: tuple) -> tuple:
        moved, count, accepted = carry
        independent = count % 2 == 0
        moved, rate = _move(target, jax.random.fold_in(key_moves, count), moved, mean, root, independent)
        return moved, count + 1, accepted.at[count % 2].add(rate)

    start = population, jnp.int32(0), jnp.zeros(2, population.positions.dtype)
    population, count, accepted = lax.while_loop(going_on, body, start)
    of_each = jnp.stack([(count + 1) // 2, count // 2]).astype(accepted.dtype)
    plan = population.plan
    noted = Plan(
        plan.num_moves.at[row].set(count), plan.means.at[row].set(mean), plan.roots.at[row].set(root)
    )
    plan = jax.tree.map(lambda new, old: jnp.where(population.learning, new, old), noted, plan)
    return population._replace(plan=plan), count, accepted / jnp.maximum(of_each, 1)


def _proposal(population: Population) -> tuple[Array, Array]:
    """Mean and root of the covariance of a learning population, or those of the plan."""
    plan, row = population.plan, population.num_seen - 1
    mean = weights.mean(population.log_weights, population.positions)
    root = root_of(population.log_weights, population.positions)
    # Where all weight is on one particle there is no covariance: the proposals are those of the row before.
    before = jnp.where(row > 0, plan.roots[jnp.maximum(row - 1, 0)], first_root(mean.shape[0], mean.dtype))
    root = jnp.where(jnp.all(jnp.isfinite(root)), root, before)
    return jax.tree.map(
        lambda new, old: jnp.where(population.learning, new, old),
        (mean, root),
        (plan.means[row], plan.roots[row]),
    )


def _move(
    target: Parameters, key: PRNGKey, population: Population, mean: Array, root: Array, independent: Array
) -> tuple[Population, Array]:
    """One particle marginal Metropolis step of every particle, and the mean acceptance probability."""
    num = population.log_weights.shape[0]
    num_particles = population.filters.log_weights.shape[1]
    key_propose, key_filter, key_accept = jax.random.split(key, 3)
    positions, log_odds = propose(key_propose, population.positions, mean, root, independent)
    log_priors = jax.vmap(partial(log_prior, target))(positions)
    keys = jax.random.split(key_filter, num)
    filters, log_evidences, undefined = _fresh(target, population.num_seen, num_particles, keys, positions)
    old = population.log_priors + population.log_evidences
    gain = log_priors + log_evidences - old + log_odds
    gain = jnp.where(jnp.isnan(gain), -jnp.inf, gain)
    accepted = jnp.log(jax.random.uniform(key_accept, (num,), gain.dtype)) < gain
    new = population._replace(
        positions=positions, log_priors=log_priors, log_evidences=log_evidences, filters=filters
    )

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(accepted.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    fields = ("positions", "log_priors", "log_evidences", "filters")
    chosen = {name: jax.tree.map(choose, getattr(new, name), getattr(population, name)) for name in fields}
    population = population._replace(
        **chosen,
        num_undefined=population.num_undefined + jnp.sum(undefined, dtype=jnp.int32),
        num_filter_steps=population.num_filter_steps + num * population.num_seen.astype(gain.dtype),
    )
    return population, jnp.mean(jnp.exp(jnp.minimum(gain, 0)))
