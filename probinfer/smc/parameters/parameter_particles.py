r"""A population of parameters, each with a particle filter of its own: SMC^2, one observation a step.

After each observation the parameters are weighed by its predictive density. If their effective sample size is below
half their number, or after the last observation, they are resampled and moved by particle marginal Metropolis steps:
alternately independent draws from a Student-t with mean and covariance of the population, and local ones.

A *learning* population decides when to move, how often, and how to propose; its choices are a ``MoveSchedule``. If too
few proposals are accepted, its filters are too noisy: it stops, to be given twice as many state particles
(``attach_filters``). A population that follows a given schedule has an unbiased evidence, :math:`E\hat Z = Z`.

References:
    Chopin, Jacob and Papaspiliopoulos (2013), "SMC^2", algorithm 1 and sections 3.5 (moves), 3.6 (more particles).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer import resampling
from probinfer.core.algorithms import Algorithm, algorithm
from probinfer.core.status import Status
from probinfer.core.types import Array, Bool, Float, Int, PRNGKey, PyTree
from probinfer.numerics import covariance_factor, weights
from probinfer.smc.parameters.likelihood import extend_filter, filter_log_evidence, run_filter
from probinfer.smc.parameters.model import Parameters, draw_prior, log_prior
from probinfer.smc.parameters.proposals import propose

__all__ = [
    "MoveSchedule",
    "ParameterPopulation",
    "SMC2StepInfo",
    "attach_filters",
    "empty_schedule",
    "init_population",
    "is_finished",
    "record_info",
    "smc2_steps",
]

_TARGET_ACCEPTED_MOVES = 2.0  # mean number of accepted moves of a particle
_MAX_MOVES = 30


class MoveSchedule(NamedTuple):
    """When and how to move; row t - 1 is for the moves after observation t.

    Attributes:
        num_moves: 0: no move.
        means: of the proposals.
        factors: of the covariances of the proposals, (T, d, d) or (T, d).
    """

    num_moves: Int[Array, " T"]
    means: Float[Array, "T d"]
    factors: Float[Array, "T ..."]


class ParameterPopulation(NamedTuple):
    r"""M parameters after some observations.

    Attributes:
        positions: :math:`\theta_i`, unconstrained.
        log_priors: :math:`\log p(\theta_i)`.
        log_evidences: :math:`\log\hat Z(\theta_i)` of their filters.
        log_weights: of the parameters.
        log_factor: the evidence is exp(log_factor) times the mean weight.
        filters: states of the filters, leaves (M, ...); None before ``attach_filters``.
        num_observed: observations used.
        schedule: of the moves, given, or filled step by step.
        learning: whether to fill the schedule.
        needs_more_state_particles: whether too few proposals were accepted.
        finished: whether all observations are used and the last moves made.
        status: ``DEGENERATE_WEIGHTS`` once all parameters are dead.
        num_undefined: filters with a log weight of NaN or plus infinity.
        num_filter_steps: observations times filters.
    """

    positions: Float[Array, "M d"]
    log_priors: Float[Array, " M"]
    log_evidences: Float[Array, " M"]
    log_weights: Float[Array, " M"]
    log_factor: Float[Array, ""]
    filters: PyTree
    num_observed: Int[Array, ""]
    schedule: MoveSchedule
    learning: Bool[Array, ""]
    needs_more_state_particles: Bool[Array, ""]
    finished: Bool[Array, ""]
    status: Int[Array, ""]
    num_undefined: Int[Array, ""]
    num_filter_steps: Float[Array, ""]


class SMC2StepInfo(NamedTuple):
    """Report of one step.

    Attributes:
        ess: effective sample size of the parameters before the moves.
        num_moves: of each parameter.
        acceptance: shares of independent and of local proposals accepted; NaN if there were none.
        log_evidence: after the step.
    """

    ess: Float[Array, ""]
    num_moves: Int[Array, ""]
    acceptance: Float[Array, "2"]
    log_evidence: Float[Array, ""]


def smc2_steps(target: Parameters, min_acceptance: Array) -> Algorithm:
    """Return a population as an algorithm; a step moves if it is time to, and uses one observation.

    Args:
        target: parameters and models.
        min_acceptance: a learning population stops if a smaller share of the proposals is accepted.
    """
    return algorithm(_given_population, _step, target, min_acceptance)


def _given_population(
    target: Parameters, min_acceptance: Array, population: ParameterPopulation
) -> ParameterPopulation:
    return population


def empty_schedule(num_steps: int, dimension: int) -> MoveSchedule:
    """Return a schedule without moves, for a learning population to fill; T d^2 numbers.

    Args:
        num_steps: T.
        dimension: d.
    """
    dtype = jnp.result_type(float)
    factor = covariance_factor.identity(dimension, dtype)
    return MoveSchedule(
        num_moves=jnp.zeros(num_steps, jnp.int32),
        means=jnp.zeros((num_steps, dimension), dtype),
        factors=jnp.broadcast_to(factor, (num_steps, *factor.shape)),
    )


@partial(jax.jit, static_argnames="num_parameters")
def init_population(
    key: PRNGKey, target: Parameters, schedule: MoveSchedule, learning: Array, *, num_parameters: int
) -> ParameterPopulation:
    """Draw parameters from the prior; ``attach_filters`` gives them filters and the first observation.

    Args:
        key: random key.
        target: parameters and models.
        schedule: to be followed, or filled.
        learning: whether to fill it.
        num_parameters: M.
    """
    positions = jax.vmap(partial(draw_prior, target))(jax.random.split(key, num_parameters))
    log_priors = jax.vmap(partial(log_prior, target))(positions)
    return ParameterPopulation(
        positions=positions,
        log_priors=log_priors,
        log_evidences=jnp.zeros_like(log_priors),
        log_weights=jnp.zeros_like(log_priors),
        log_factor=jnp.zeros((), positions.dtype),
        filters=None,
        num_observed=jnp.ones((), jnp.int32),
        schedule=schedule,
        learning=learning,
        needs_more_state_particles=jnp.zeros((), bool),
        finished=jnp.zeros((), bool),
        status=jnp.zeros((), jnp.int32),
        num_undefined=jnp.zeros((), jnp.int32),
        num_filter_steps=jnp.zeros((), positions.dtype),
    )


@partial(jax.jit, static_argnames="num_particles")
def attach_filters(
    key: PRNGKey, target: Parameters, population: ParameterPopulation, *, num_particles: int
) -> ParameterPopulation:
    r"""Give every parameter a new filter, and the weight :math:`\hat Z_{new} / \hat Z_{old}`.

    At the start the old evidence is that of no observation, 1. Later this is the exchange step of Chopin et al.
    (2013), section 3.6.1.

    Args:
        key: random key.
        target: parameters and models.
        population: its old filters are not used.
        num_particles: N of each filter.
    """
    num_parameters = population.log_weights.shape[0]
    filters, log_evidences, undefined = _run_filters(
        target,
        population.num_observed,
        num_particles,
        jax.random.split(key, num_parameters),
        population.positions,
    )
    dead = population.log_weights == -jnp.inf
    log_increments = jnp.where(dead, 0, log_evidences - jnp.where(dead, 0, population.log_evidences))
    num_observed = population.num_observed.astype(population.log_factor.dtype)
    return _with_status(
        population._replace(
            filters=filters,
            log_evidences=log_evidences,
            log_weights=population.log_weights + log_increments,
            needs_more_state_particles=jnp.zeros((), bool),
            num_undefined=population.num_undefined + jnp.sum(undefined, dtype=jnp.int32),
            num_filter_steps=population.num_filter_steps + num_parameters * num_observed,
        )
    )


def is_finished(population: ParameterPopulation, info: SMC2StepInfo) -> Array:
    """Return whether all observations are used, the filters are too noisy, or all parameters are dead."""
    del info
    is_dead = population.status != int(Status.OK)
    return population.finished | population.needs_more_state_particles | is_dead


def record_info(population: ParameterPopulation, info: SMC2StepInfo) -> SMC2StepInfo:
    """Return the record of a step."""
    del population
    return info


def _run_filters(
    target: Parameters, num_observed: Array, num_particles: int, keys: Array, positions: Array
) -> tuple:
    """Return filters (M,) over the observations so far, their log evidences, and whether these are undefined."""
    run = partial(run_filter, target=target, num_observed=num_observed, num_particles=num_particles)
    filters = jax.vmap(lambda key, position: run(key, position=position))(keys, positions)
    return filters, *_log_evidences(filters, positions.dtype)


def _log_evidences(filters: PyTree, dtype: jnp.dtype) -> tuple[Array, Array]:
    log_evidences, undefined = jax.vmap(filter_log_evidence)(filters)
    return log_evidences.astype(dtype), undefined


def _with_status(population: ParameterPopulation) -> ParameterPopulation:
    is_dead = jnp.all(population.log_weights == -jnp.inf)
    return population._replace(
        status=jnp.where(is_dead, int(Status.DEGENERATE_WEIGHTS), int(Status.OK)).astype(jnp.int32)
    )


def _step(
    target: Parameters, min_acceptance: Array, key: PRNGKey, population: ParameterPopulation
) -> tuple[ParameterPopulation, SMC2StepInfo]:
    key_move, key_extend = jax.random.split(key)
    num_parameters = population.log_weights.shape[0]
    # Resample and move
    ess = weights.ess(population.log_weights)
    is_last = population.num_observed == target.num_steps
    learned = (ess < 0.5 * num_parameters) | is_last
    scheduled = population.schedule.num_moves[population.num_observed - 1] > 0
    move_now = jnp.where(population.learning, learned, scheduled)
    population, num_moves, acceptance = lax.cond(
        move_now, partial(_resample_and_move, target), _skip_moves, key_move, population
    )
    # Propagate and weigh
    needs_more = population.learning & move_now & (jnp.max(acceptance) < min_acceptance)
    population = lax.cond(
        is_last | needs_more,
        lambda key, population: population,
        partial(_observe, target),
        key_extend,
        population,
    )
    population = population._replace(needs_more_state_particles=needs_more, finished=is_last & ~needs_more)
    log_evidence = population.log_factor + weights.log_mean_exp(population.log_weights)
    return population, SMC2StepInfo(ess, num_moves, acceptance, log_evidence)


def _observe(target: Parameters, key: PRNGKey, population: ParameterPopulation) -> ParameterPopulation:
    """Extend the filters by one observation and weigh the parameters by its predictive density."""
    num_parameters, t = population.log_weights.shape[0], population.num_observed
    filters = jax.vmap(lambda key, position, state: extend_filter(key, target, position, state, t))(
        jax.random.split(key, num_parameters), population.positions, population.filters
    )
    log_evidences, undefined = _log_evidences(filters, population.positions.dtype)
    # A dead filter has log evidence minus infinity: the difference would be NaN.
    dead = population.log_evidences == -jnp.inf
    log_increments = log_evidences - jnp.where(dead, 0, population.log_evidences)
    return _with_status(
        population._replace(
            filters=filters,
            log_evidences=log_evidences,
            log_weights=jnp.where(dead, -jnp.inf, population.log_weights + log_increments),
            num_observed=t + 1,
            num_undefined=population.num_undefined + jnp.sum(undefined & ~dead, dtype=jnp.int32),
            num_filter_steps=population.num_filter_steps + num_parameters,
        )
    )


def _skip_moves(key: PRNGKey, population: ParameterPopulation) -> tuple[ParameterPopulation, Array, Array]:
    del key
    return population, jnp.int32(0), jnp.full(2, jnp.nan, population.positions.dtype)


def _resample_and_move(
    target: Parameters, key: PRNGKey, population: ParameterPopulation
) -> tuple[ParameterPopulation, Array, Array]:
    """Resample, then move as often as scheduled, or until enough moves are accepted."""
    key_resample, key_moves = jax.random.split(key)
    row = population.num_observed - 1
    mean, factor = _proposal_moments(population)
    # Resample
    num_parameters = population.log_weights.shape[0]
    ancestors, log_weights = resampling.systematic(key_resample, population.log_weights, num_parameters)
    resampled = jax.tree.map(
        lambda leaf: leaf[ancestors],
        (population.positions, population.log_priors, population.log_evidences, population.filters),
    )
    population = population._replace(
        **dict(zip(("positions", "log_priors", "log_evidences", "filters"), resampled, strict=True)),
        log_factor=population.log_factor + log_weights[0],
        log_weights=jnp.zeros_like(population.log_weights),
    )
    scheduled = population.schedule.num_moves[row]

    # Move
    def needs_another_move(carry: tuple) -> Array:
        _, num_moves, accepted = carry
        learned = (jnp.sum(accepted) < _TARGET_ACCEPTED_MOVES) & (num_moves < _MAX_MOVES)
        # A learning population makes a move of either kind at least
        return jnp.where(population.learning, learned | (num_moves < 2), num_moves < scheduled)

    def move(carry: tuple) -> tuple:
        moved, num_moves, accepted = carry
        independent = num_moves % 2 == 0
        moved, rate = _move(
            target, jax.random.fold_in(key_moves, num_moves), moved, mean, factor, independent
        )
        return moved, num_moves + 1, accepted.at[num_moves % 2].add(rate)

    start = population, jnp.int32(0), jnp.zeros(2, population.positions.dtype)
    population, num_moves, accepted = lax.while_loop(needs_another_move, move, start)
    moves_of_kind = jnp.stack([(num_moves + 1) // 2, num_moves // 2]).astype(accepted.dtype)
    # Write the schedule
    schedule = population.schedule
    filled = MoveSchedule(
        num_moves=schedule.num_moves.at[row].set(num_moves),
        means=schedule.means.at[row].set(mean),
        factors=schedule.factors.at[row].set(factor),
    )
    schedule = jax.tree.map(lambda new, old: jnp.where(population.learning, new, old), filled, schedule)
    return population._replace(schedule=schedule), num_moves, accepted / jnp.maximum(moves_of_kind, 1)


def _proposal_moments(population: ParameterPopulation) -> tuple[Array, Array]:
    """Return mean and covariance factor of a learning population, or those of the schedule."""
    schedule, row = population.schedule, population.num_observed - 1
    mean = weights.mean(population.log_weights, population.positions)
    factor = covariance_factor.estimate(population.log_weights, population.positions)
    # If all weight is on one particle, there is no covariance: use the one of the row before.
    previous = jnp.where(
        row > 0,
        schedule.factors[jnp.maximum(row - 1, 0)],
        covariance_factor.identity(mean.shape[0], mean.dtype),
    )
    factor = jnp.where(jnp.all(jnp.isfinite(factor)), factor, previous)
    return jax.tree.map(
        lambda new, old: jnp.where(population.learning, new, old),
        (mean, factor),
        (schedule.means[row], schedule.factors[row]),
    )


def _move(
    target: Parameters,
    key: PRNGKey,
    population: ParameterPopulation,
    mean: Array,
    factor: Array,
    independent: Array,
) -> tuple[ParameterPopulation, Array]:
    """Move every parameter by a particle marginal Metropolis step; return the mean acceptance probability too."""
    num_parameters = population.log_weights.shape[0]
    num_particles = population.filters.log_weights.shape[1]
    key_propose, key_filter, key_accept = jax.random.split(key, 3)
    # Propose, with a new filter for each proposal
    positions, log_proposal_ratio = propose(key_propose, population.positions, mean, factor, independent)
    log_priors = jax.vmap(partial(log_prior, target))(positions)
    filters, log_evidences, undefined = _run_filters(
        target,
        population.num_observed,
        num_particles,
        jax.random.split(key_filter, num_parameters),
        positions,
    )
    # Accept or reject
    log_current = population.log_priors + population.log_evidences
    log_acceptance_ratio = log_priors + log_evidences - log_current + log_proposal_ratio
    log_acceptance_ratio = jnp.where(jnp.isnan(log_acceptance_ratio), -jnp.inf, log_acceptance_ratio)
    uniforms = jax.random.uniform(key_accept, (num_parameters,), log_acceptance_ratio.dtype)
    accepted = jnp.log(uniforms) < log_acceptance_ratio
    proposals = population._replace(
        positions=positions, log_priors=log_priors, log_evidences=log_evidences, filters=filters
    )

    def select(new: Array, old: Array) -> Array:
        return jnp.where(accepted.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    fields = ("positions", "log_priors", "log_evidences", "filters")
    selected = {
        name: jax.tree.map(select, getattr(proposals, name), getattr(population, name)) for name in fields
    }
    num_observed = population.num_observed.astype(log_acceptance_ratio.dtype)
    population = population._replace(
        **selected,
        num_undefined=population.num_undefined + jnp.sum(undefined, dtype=jnp.int32),
        num_filter_steps=population.num_filter_steps + num_parameters * num_observed,
    )
    return population, jnp.mean(jnp.exp(jnp.minimum(log_acceptance_ratio, 0)))
