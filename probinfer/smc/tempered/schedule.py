"""The settings of a tempered run: chosen level by level by a pilot population, then frozen."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from probinfer.core.trees import select
from probinfer.core.types import Array, Float, Int
from probinfer.numerics import covariance_factor, weights

__all__ = [
    "LevelSettings",
    "Schedule",
    "choose_level",
    "empty_schedule",
    "level_settings",
    "log_weight_increments",
    "write_level",
]

_NUM_BISECTIONS = 60


class LevelSettings(NamedTuple):
    """Settings of one level.

    Attributes:
        temperature: at the end of the level.
        loc: mean of the particles at that temperature.
        factor: of their covariance, (d, d) or (d,), see ``numerics.covariance_factor``.
        step_size: of the leapfrogs, in coordinates of unit covariance.
        tries: proposals in an independent move; 0: the level moves by trajectories.
    """

    temperature: Float[Array, ""]
    loc: Float[Array, " d"]
    factor: Float[Array, "..."]
    step_size: Float[Array, ""]
    tries: Int[Array, ""]


class Schedule(NamedTuple):
    """Frozen settings: the fields of ``LevelSettings`` with a leading axis K.

    Row k is level k, rows from ``num_levels`` on are empty. ``factors`` is (K, d, d) or (K, d).
    """

    temperatures: Float[Array, " K"]
    locs: Float[Array, "K d"]
    factors: Float[Array, "K ..."]
    step_sizes: Float[Array, " K"]
    tries: Int[Array, " K"]
    num_levels: Int[Array, ""] | int


def empty_schedule(dimension: int, max_levels: int) -> Schedule:
    """Return a schedule without levels, for a pilot to fill.

    Args:
        dimension: d.
        max_levels: K, the number of levels that it can store.
    """
    dtype = jnp.result_type(float)
    factor = covariance_factor.identity(dimension, dtype)
    return Schedule(
        temperatures=jnp.zeros(max_levels, dtype),
        locs=jnp.zeros((max_levels, dimension), dtype),
        factors=jnp.broadcast_to(factor, (max_levels, *factor.shape)),
        step_sizes=jnp.zeros(max_levels, dtype),
        tries=jnp.zeros(max_levels, jnp.int32),
        num_levels=jnp.zeros((), jnp.int32),
    )


def level_settings(schedule: Schedule, level: Int[Array, ""]) -> LevelSettings:
    """Return the settings of one level.

    Args:
        schedule: with this level in it.
        level: from 0.
    """
    return LevelSettings(*(column[level] for column in schedule[:-1]))


def write_level(schedule: Schedule, level: Int[Array, ""], settings: LevelSettings) -> Schedule:
    """Return the schedule with the settings of a level in it.

    Args:
        schedule: with room for the level.
        level: from 0.
        settings: of the level.
    """
    columns = [column.at[level].set(value) for column, value in zip(schedule[:-1], settings, strict=True)]
    return Schedule(*columns, num_levels=level + 1)


def log_weight_increments(
    log_ratios: Float[Array, " n"], temperature_step: Float[Array, ""]
) -> Float[Array, " n"]:
    """Return the log weights of a step in temperature; a log ratio of minus infinity stays it for a step of zero.

    Args:
        log_ratios: of the particles.
        temperature_step: zero or more.
    """
    return jnp.where(log_ratios == -jnp.inf, -jnp.inf, temperature_step * log_ratios)


def choose_level(
    ess_fraction: Float[Array, ""],
    log_ratios: Float[Array, " n"],
    positions: Float[Array, "n d"],
    temperature: Float[Array, ""],
    previous: LevelSettings,
) -> LevelSettings:
    """Return the highest temperature at which the effective sample size is large enough, and the moments there.

    Args:
        ess_fraction: least effective sample size, as a fraction of the particles with a finite log ratio.
        log_ratios: of the particles, equally weighted at ``temperature``.
        positions: of the particles.
        temperature: at the start of the level.
        previous: settings of the level before. Its moments are used again if all weight is on one particle; its step
            size and tries are copied.
    """
    num_alive = jnp.sum(log_ratios > -jnp.inf).astype(log_ratios.dtype)
    target_ess, max_step = ess_fraction * num_alive, 1 - temperature

    def bisect(_, search):
        low, high, step = search
        enough = weights.ess(log_weight_increments(log_ratios, step)) >= target_ess
        low, high = jnp.where(enough, step, low), jnp.where(enough, high, step)
        return low, high, (low + high) / 2

    # Choose the temperature: the bisection tries the largest step first, and if that is accepted it stays there.
    low, high, _ = lax.fori_loop(0, _NUM_BISECTIONS, bisect, (jnp.zeros_like(max_step), max_step, max_step))
    step = jnp.where(low > 0, low, high)
    next_temperature = jnp.where(low == max_step, 1, temperature + step).astype(max_step.dtype)
    # Estimate mean and covariance at that temperature
    log_increments = log_weight_increments(log_ratios, next_temperature - temperature)
    moments = (
        weights.mean(log_increments, positions),
        covariance_factor.estimate(log_increments, positions),
    )
    is_finite = jnp.all(jnp.isfinite(moments[1]))
    loc, factor = select(is_finite, moments, (previous.loc, previous.factor))
    return previous._replace(temperature=next_temperature, loc=loc, factor=factor)
