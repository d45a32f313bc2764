r"""Tempered sequential Monte Carlo of one population, level by level, learning its schedule or keeping it.

Level k raises the temperature from :math:`t_{k-1}` to :math:`t_k`, multiplies the evidence by the mean of
:math:`e^{(t_k-t_{k-1})\Delta(u_i)}`, resamples and moves. A *learning* population chooses each temperature so that the
effective sample size of these factors is half its size, takes metric and proposals of its moves from its weighted
particles, and lets the step size follow the acceptance rate. What it chose is a ``Schedule``. A population that keeps a
given schedule has an unbiased evidence, :math:`E\hat Z = Z`: the schedule does not depend on its particles.

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
from probinfer.core.types import Array, Float, PRNGKey, field, pytree
from probinfer.inference.engine import over
from probinfer.numerics import weights
from probinfer.running.many.driver import batches_well
from probinfer.smc.tempered.moves.choice import move_all
from probinfer.smc.tempered.schedule import Plan, Schedule, chosen, increments, noted, row

__all__ = [
    "CHAIN_LENGTH",
    "Level",
    "Settings",
    "TemperedState",
    "begin",
    "is_over",
    "record",
    "resolved",
    "tempering",
]

CHAIN_LENGTH = 8  # P of waste-free: states kept of each ancestor
_NUM_MOVES = 3  # without: moves of each particle, of which the last state is kept


@pytree
class Settings:
    """What does not change in a run.

    Attributes:
        ess_fraction: of the particles alive, that a learning population aims at.
        moves: one of ``choice.MOVES``.
        waste_free: keep all states.
        mode: "map", "vmap" or "auto" over the particles.
    """

    ess_fraction: Any
    moves: str = field(static=True)
    waste_free: bool = field(static=True, default=True)
    mode: str = field(static=True, default="auto")


class TemperedState(NamedTuple):
    """One population between two levels: particles of equal weight from the density at ``temperature``."""

    positions: Any  # (N, d)
    log_ratios: Any  # (N,), minus infinity where undefined
    temperature: Any
    log_evidence: Any
    level: Any
    step_size: Any
    schedule: Schedule
    learning: Any
    status: Any
    num_undefined: Any
    num_gradients: Any
    num_densities: Any
    best_ratio: Any  # the largest that any particle had so far
    best_position: Any  # (d,), its place


class Level(NamedTuple):
    """What one level did."""

    temperature: Any
    ess: Any
    acceptance: Any
    step_size: Any
    log_evidence: Any


def tempering(path: Any, settings: Settings) -> Algorithm:
    """Return one population as an algorithm; a step is a level.

    Args:
        path: from base to target.
        settings: of the run.

    Returns:
        ``init(key, schedule, learning, num_particles)`` and ``step``; see ``begin``.

    References:
        Del Moral, Doucet and Jasra (2006), section 3.3.2; Jasra, Stephens, Doucet and Tsagaris (2011), adaptive
        temperatures; Dau and Chopin (2022), "Waste-free sequential Monte Carlo", algorithm 2; Beskos, Jasra, Kantas
        and Thiery (2016), section 4 (a pilot makes an adaptive schedule unbiased).
    """
    return algorithm(_init, _step, path, settings)


@partial(jax.jit, static_argnames="num_particles")
def begin(
    algorithm: Algorithm, key: PRNGKey, schedule: Schedule, learning: Array, *, num_particles: int
) -> TemperedState:
    """Return a population drawn from the base law.

    Args:
        algorithm: of ``tempering``.
        key: random key.
        schedule: to be kept, or filled.
        learning: whether to fill it.
        num_particles: N.
    """
    return algorithm.init(key, schedule, learning, num_particles)


def is_over(state: TemperedState, info: Level) -> Array:
    """Whether the target is reached, or the population dead."""
    del info
    return (state.temperature >= 1) | (state.status != Status.OK)


def record(state: TemperedState, info: Level) -> Level:
    """What is kept of a level."""
    del state
    return info


def _init(path, settings, key, schedule: Schedule, learning, num_particles: int) -> TemperedState:
    positions = over(path.sample, "auto", jax.random.split(key, num_particles))
    mode = resolved(settings.mode, path, positions[0])
    raw = over(lambda position: path.terms(position)[1], mode, positions)
    undefined = jnp.isnan(raw)
    dimension, dtype = positions.shape[1], positions.dtype
    zero, count = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
    log_ratios = jnp.where(undefined, -jnp.inf, raw)
    best = jnp.argmax(log_ratios)
    return TemperedState(
        positions=positions,
        log_ratios=log_ratios,
        temperature=zero,
        log_evidence=zero,
        level=count,
        step_size=jnp.asarray(dimension**-0.25, dtype),
        schedule=schedule,
        learning=learning,
        status=count,
        num_undefined=jnp.sum(undefined, dtype=jnp.int32),
        num_gradients=count,
        num_densities=count + num_particles,
        best_ratio=log_ratios[best],
        best_position=positions[best],
    )


def _step(path, settings: Settings, key: PRNGKey, state: TemperedState) -> tuple[TemperedState, Level]:
    key_resample, key_move = jax.random.split(key)
    num = state.log_ratios.shape[0]
    plan = lax.cond(state.learning, _plan, _look_up, settings, state)
    factors = increments(state.log_ratios, plan.temperature - state.temperature)
    num_ancestors = num // CHAIN_LENGTH if settings.waste_free else num
    ancestors, _ = resampling.systematic(key_resample, factors, num_ancestors)
    moved, plan = move_all(
        settings.moves,
        key_move,
        path,
        plan,
        state.positions[ancestors],
        state.learning,
        num_moves=CHAIN_LENGTH - 1 if settings.waste_free else _NUM_MOVES,
        mode=resolved(settings.mode, path, state.positions[0]),
    )
    positions, log_ratios = _kept(settings, moved)
    log_evidence = state.log_evidence + weights.log_mean_exp(factors)
    # A ratio of plus infinity makes the evidence NaN, which the loop takes for what it is.
    log_evidence = jnp.where(jnp.any(log_ratios == jnp.inf), jnp.nan, log_evidence)
    best = jnp.argmax(log_ratios)
    better = log_ratios[best] > state.best_ratio
    new = state._replace(
        best_ratio=jnp.where(better, log_ratios[best], state.best_ratio),
        best_position=jnp.where(better, positions[best], state.best_position),
        positions=positions,
        log_ratios=log_ratios,
        temperature=plan.temperature,
        log_evidence=log_evidence,
        level=state.level + 1,
        step_size=plan.step_size,
        schedule=_noted(state, plan),
        num_gradients=state.num_gradients + moved.num_gradients,
        num_densities=state.num_densities + moved.num_densities,
    )
    dead = jnp.all(factors == -jnp.inf)
    last = state._replace(
        status=jnp.int32(Status.DEGENERATE_WEIGHTS), log_evidence=jnp.full_like(log_evidence, -jnp.inf)
    )
    new = jax.tree.map(lambda a, b: jnp.where(dead, a, b), last, new)
    rate = jnp.where(dead, jnp.nan, jnp.mean(moved.acceptance[1:])).astype(plan.temperature.dtype)
    return new, Level(plan.temperature, weights.ess(factors), rate, plan.step_size, new.log_evidence)


def _kept(settings: Settings, moved) -> tuple[Array, Array]:
    """All states of an ancestor in a row, or the last ones."""
    if not settings.waste_free:
        return moved.positions[-1], moved.log_ratios[-1]
    positions, log_ratios = (jnp.swapaxes(x, 0, 1) for x in (moved.positions, moved.log_ratios))
    return positions.reshape(-1, positions.shape[-1]), log_ratios.reshape(-1)


def _look_up(settings: Settings, state: TemperedState) -> Plan:
    del settings
    return row(state.schedule, state.level)


def _plan(settings: Settings, state: TemperedState) -> Plan:
    before = row(state.schedule, jnp.maximum(state.level - 1, 0))._replace(step_size=state.step_size)
    return chosen(settings.ess_fraction, state.log_ratios, state.positions, state.temperature, before)


def _noted(state: TemperedState, plan: Plan) -> Schedule:
    """The schedule with this level in it, if it is learned."""
    new = noted(state.schedule, state.level, plan)
    return jax.tree.map(lambda a, b: jnp.where(state.learning, a, b), new, state.schedule)


def resolved(mode: str, path: Any, position: Float[Array, " d"]) -> str:
    """Return "map" or "vmap" for "auto": what the density of this path gains on this device.

    Args:
        mode: as the user has it.
        path: from base to target.
        position: any.
    """
    if mode != "auto":
        return mode
    return "vmap" if batches_well(path.terms, position) else "map"
