r"""Tempered sequential Monte Carlo of one population, level by level, with a schedule that is learned or given.

Level k raises the temperature from :math:`t_{k-1}` to :math:`t_k`, multiplies the evidence by the mean of the
incremental weights :math:`e^{(t_k-t_{k-1})\Delta(u_i)}`, resamples and moves. A *learning* population chooses each
temperature so that the effective sample size of these weights is a given fraction of its size, estimates the metric and
the proposals of its moves from its weighted particles, and adapts the step size to the acceptance rate. Its choices are
a ``Schedule``. A population that follows a given schedule has an unbiased evidence, :math:`E\hat Z = Z`: the schedule
does not depend on its particles.

*Waste-free*: M = N / P particles are resampled, each is moved P - 1 times, and all N states are kept.
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
from probinfer.core.trees import map_or_vmap, select
from probinfer.core.types import Array, Bool, Float, Int, PRNGKey, field, pytree
from probinfer.numerics import weights
from probinfer.running.many.driver import batches_well
from probinfer.smc.tempered.moves.choice import move_particles
from probinfer.smc.tempered.moves.hamiltonian import MoveResult
from probinfer.smc.tempered.schedule import (
    LevelSettings,
    Schedule,
    choose_level,
    level_settings,
    log_weight_increments,
    write_level,
)

__all__ = [
    "CHAIN_LENGTH",
    "LevelInfo",
    "TemperedState",
    "TemperingSettings",
    "init_population",
    "is_finished",
    "record_info",
    "resolve_mode",
    "tempering",
]

CHAIN_LENGTH = 8  # P of waste-free: states kept of each ancestor
_NUM_MOVES = 3  # of each particle without waste-free: the last state is kept


@pytree
class TemperingSettings:
    """Settings that do not change in a run.

    Attributes:
        ess_fraction: of the particles alive, the target of a learning population.
        moves: one of ``choice.MOVES``.
        waste_free: keep all states.
        mode: "map", "vmap" or "auto" over the particles.
    """

    ess_fraction: Any
    moves: str = field(static=True)
    waste_free: bool = field(static=True, default=True)
    mode: str = field(static=True, default="auto")


class TemperedState(NamedTuple):
    r"""One population between two levels: particles of equal weight from :math:`\pi_t`.

    Attributes:
        positions: :math:`u_i`.
        log_ratios: :math:`\Delta(u_i)`; minus infinity where it is undefined.
        temperature: t.
        log_evidence: log of the estimate of :math:`\int \pi_t`.
        num_levels: levels completed.
        step_size: of the leapfrogs, in coordinates of unit covariance.
        schedule: given, or filled level by level.
        learning: whether to fill the schedule.
        status: ``DEGENERATE_WEIGHTS`` once all particles are dead.
        num_undefined: draws of the initial distribution with a log ratio of NaN.
        num_gradients: evaluations of the density with its gradient.
        num_densities: evaluations of the density alone.
        best_log_ratio: largest log ratio that any particle had so far.
        best_position: of that particle.
    """

    positions: Float[Array, "N d"]
    log_ratios: Float[Array, " N"]
    temperature: Float[Array, ""]
    log_evidence: Float[Array, ""]
    num_levels: Int[Array, ""]
    step_size: Float[Array, ""]
    schedule: Schedule
    learning: Bool[Array, ""]
    status: Int[Array, ""]
    num_undefined: Int[Array, ""]
    num_gradients: Int[Array, ""]
    num_densities: Int[Array, ""]
    best_log_ratio: Float[Array, ""]
    best_position: Float[Array, " d"]


class LevelInfo(NamedTuple):
    """Report of one level.

    Attributes:
        temperature: at its end.
        ess: effective sample size of the incremental weights.
        acceptance: mean over particles and moves; NaN if all particles died.
        step_size: after the level.
        log_evidence: after the level.
    """

    temperature: Float[Array, ""]
    ess: Float[Array, ""]
    acceptance: Float[Array, ""]
    step_size: Float[Array, ""]
    log_evidence: Float[Array, ""]


def tempering(bridge: Any, settings: TemperingSettings) -> Algorithm:
    """Return one population as an algorithm; a step is a level.

    Args:
        bridge: from the initial distribution to the target.
        settings: of the run.

    Returns:
        ``init(key, schedule, learning, num_particles)`` and ``step``; see ``init_population``.

    References:
        Del Moral, Doucet and Jasra (2006), section 3.3.2; Jasra, Stephens, Doucet and Tsagaris (2011), adaptive
        temperatures; Dau and Chopin (2022), "Waste-free sequential Monte Carlo", algorithm 2; Beskos, Jasra, Kantas
        and Thiery (2016), section 4 (a pilot makes an adaptive schedule unbiased).
    """
    return algorithm(_init, _step, bridge, settings)


@partial(jax.jit, static_argnames="num_particles")
def init_population(
    algorithm: Algorithm, key: PRNGKey, schedule: Schedule, learning: Array, *, num_particles: int
) -> TemperedState:
    """Return a population drawn from the initial distribution.

    Args:
        algorithm: of ``tempering``.
        key: random key.
        schedule: to be followed, or filled.
        learning: whether to fill it.
        num_particles: N.
    """
    return algorithm.init(key, schedule, learning, num_particles)


def is_finished(state: TemperedState, info: LevelInfo) -> Array:
    """Return whether the population reached the target or died."""
    del info
    return (state.temperature >= 1) | (state.status != Status.OK)


def record_info(state: TemperedState, info: LevelInfo) -> LevelInfo:
    """Return the record of a level."""
    del state
    return info


def _init(
    bridge: Any,
    settings: TemperingSettings,
    key: PRNGKey,
    schedule: Schedule,
    learning: Array,
    num_particles: int,
) -> TemperedState:
    positions = map_or_vmap(bridge.sample, "auto", jax.random.split(key, num_particles))
    mode = resolve_mode(settings.mode, bridge, positions[0])
    raw_log_ratios = map_or_vmap(lambda position: bridge.terms(position)[1], mode, positions)
    undefined = jnp.isnan(raw_log_ratios)
    dimension, dtype = positions.shape[1], positions.dtype
    count = jnp.zeros((), jnp.int32)
    log_ratios = jnp.where(undefined, -jnp.inf, raw_log_ratios)
    best = jnp.argmax(log_ratios)
    return TemperedState(
        positions=positions,
        log_ratios=log_ratios,
        temperature=jnp.zeros((), dtype),
        log_evidence=jnp.zeros((), dtype),
        num_levels=count,
        step_size=jnp.asarray(dimension**-0.25, dtype),
        schedule=schedule,
        learning=learning,
        status=count,
        num_undefined=jnp.sum(undefined, dtype=jnp.int32),
        num_gradients=count,
        num_densities=count + num_particles,
        best_log_ratio=log_ratios[best],
        best_position=positions[best],
    )


def _step(
    bridge, settings: TemperingSettings, key: PRNGKey, state: TemperedState
) -> tuple[TemperedState, LevelInfo]:
    key_resample, key_move = jax.random.split(key)
    num_particles = state.log_ratios.shape[0]
    # Choose or look up the temperature, and weigh
    level = lax.cond(state.learning, _choose_level, _read_level, settings, state)
    log_increments = log_weight_increments(state.log_ratios, level.temperature - state.temperature)
    log_evidence = state.log_evidence + weights.log_mean_exp(log_increments)
    # Resample
    num_ancestors = num_particles // CHAIN_LENGTH if settings.waste_free else num_particles
    ancestors, _ = resampling.systematic(key_resample, log_increments, num_ancestors)
    # Move
    result, level = move_particles(
        settings.moves,
        key_move,
        bridge,
        level,
        state.positions[ancestors],
        state.learning,
        num_moves=CHAIN_LENGTH - 1 if settings.waste_free else _NUM_MOVES,
        mode=resolve_mode(settings.mode, bridge, state.positions[0]),
    )
    positions, log_ratios = _select_particles(settings, result)
    # A log ratio of plus infinity makes the evidence NaN, so that the loop stops with the status NON_FINITE.
    log_evidence = jnp.where(jnp.any(log_ratios == jnp.inf), jnp.nan, log_evidence)
    best = jnp.argmax(log_ratios)
    improved = log_ratios[best] > state.best_log_ratio
    new_state = state._replace(
        best_log_ratio=jnp.where(improved, log_ratios[best], state.best_log_ratio),
        best_position=jnp.where(improved, positions[best], state.best_position),
        positions=positions,
        log_ratios=log_ratios,
        temperature=level.temperature,
        log_evidence=log_evidence,
        num_levels=state.num_levels + 1,
        step_size=level.step_size,
        schedule=_update_schedule(state, level),
        num_gradients=state.num_gradients + result.num_gradients,
        num_densities=state.num_densities + result.num_densities,
    )
    # If all particles died, keep the last state
    is_dead = jnp.all(log_increments == -jnp.inf)
    dead_state = state._replace(
        status=jnp.int32(Status.DEGENERATE_WEIGHTS), log_evidence=jnp.full_like(log_evidence, -jnp.inf)
    )
    new_state = select(is_dead, dead_state, new_state)
    acceptance = jnp.where(is_dead, jnp.nan, jnp.mean(result.acceptance[1:]))
    info = LevelInfo(
        temperature=level.temperature,
        ess=weights.ess(log_increments),
        acceptance=acceptance.astype(level.temperature.dtype),
        step_size=level.step_size,
        log_evidence=new_state.log_evidence,
    )
    return new_state, info


def _select_particles(settings: TemperingSettings, result: MoveResult) -> tuple[Array, Array]:
    """Return all states, those of one ancestor side by side, or (not waste-free) the last ones."""
    if not settings.waste_free:
        return result.positions[-1], result.log_ratios[-1]
    positions, log_ratios = (jnp.swapaxes(x, 0, 1) for x in (result.positions, result.log_ratios))
    return positions.reshape(-1, positions.shape[-1]), log_ratios.reshape(-1)


def _read_level(settings: TemperingSettings, state: TemperedState) -> LevelSettings:
    del settings
    return level_settings(state.schedule, state.num_levels)


def _choose_level(settings: TemperingSettings, state: TemperedState) -> LevelSettings:
    previous = level_settings(state.schedule, jnp.maximum(state.num_levels - 1, 0))
    previous = previous._replace(step_size=state.step_size)
    return choose_level(settings.ess_fraction, state.log_ratios, state.positions, state.temperature, previous)


def _update_schedule(state: TemperedState, level: LevelSettings) -> Schedule:
    """Write the level into the schedule if it is being learned."""
    filled = write_level(state.schedule, state.num_levels, level)
    return select(state.learning, filled, state.schedule)


def resolve_mode(mode: str, bridge: Any, position: Float[Array, " d"]) -> str:
    """Replace "auto" by "map" or "vmap": the faster one for the density on this device.

    Args:
        mode: chosen by the user.
        bridge: from the initial distribution to the target.
        position: any.
    """
    if mode != "auto":
        return mode
    return "vmap" if batches_well(bridge.terms, position) else "map"
