"""The choices of a tempered run: made level by level by a pilot population, then frozen."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.types import Array, Float, Int
from probinfer.numerics import weights
from probinfer.numerics.covariance_factor import first_root, root_of

__all__ = ["Plan", "Schedule", "chosen", "empty_schedule", "increments", "noted", "row"]

_HALVINGS = 60


class Plan(NamedTuple):
    """One level: ``temperature`` at its end; ``loc`` (d,) and ``root`` of the covariance of the particles there.

    ``step_size`` in coordinates of unit covariance. ``tries``: proposals in an independent move; 0: the level moves by
    trajectories.
    """

    temperature: Any
    loc: Any
    root: Any
    step_size: Any
    tries: Any


class Schedule(NamedTuple):
    """Frozen choices: the fields of ``Plan`` with a leading axis K.

    Row k is level k, rows from ``num_levels`` on are empty. ``roots`` is (K, d, d) or (K, d).
    """

    temperatures: Any
    locs: Any
    roots: Any
    step_sizes: Any
    tries: Any
    num_levels: Any


def empty_schedule(dimension: int, max_levels: int) -> Schedule:
    """Return a schedule without levels, to be learned.

    Args:
        dimension: d.
        max_levels: K, how many there is room for.
    """
    dtype = jnp.result_type(float)
    none, root = jnp.zeros(max_levels, dtype), first_root(dimension, dtype)
    return Schedule(
        none,
        jnp.zeros((max_levels, dimension), dtype),
        jnp.broadcast_to(root, (max_levels, *root.shape)),
        none,
        jnp.zeros(max_levels, jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def row(schedule: Schedule, level: Int[Array, ""]) -> Plan:
    """Return the plan of a level.

    Args:
        schedule: with this level in it.
        level: from 0.
    """
    return Plan(*(values[level] for values in schedule[:-1]))


def noted(schedule: Schedule, level: Int[Array, ""], plan: Plan) -> Schedule:
    """Return the schedule with a level written into it.

    Args:
        schedule: without it.
        level: from 0.
        plan: of the level.
    """
    columns = [values.at[level].set(one) for values, one in zip(schedule[:-1], plan, strict=True)]
    return Schedule(*columns, num_levels=level + 1)


def increments(log_ratios: Float[Array, " n"], rise: Float[Array, ""]) -> Float[Array, " n"]:
    """Return the log factors of a rise in temperature; minus infinity stays it where nothing rises.

    Args:
        log_ratios: of the particles.
        rise: zero or more.
    """
    return jnp.where(log_ratios == -jnp.inf, -jnp.inf, rise * log_ratios)


def chosen(
    ess_fraction: Float[Array, ""],
    log_ratios: Float[Array, " n"],
    positions: Float[Array, "n d"],
    temperature: Float[Array, ""],
    before: Plan,
) -> Plan:
    """Return the highest temperature whose factors keep the effective sample size, and the cloud as it is there.

    Args:
        ess_fraction: to be kept, of the particles that are not dead.
        log_ratios: of the particles, equally weighted at ``temperature``.
        positions: of the particles.
        temperature: where they are.
        before: the plan of the level before, whose cloud is kept where all weight is on one particle; step size and
            tries are copied.
    """
    alive = jnp.sum(log_ratios > -jnp.inf).astype(log_ratios.dtype)
    wanted, room = ess_fraction * alive, 1 - temperature

    def ask(_, search):
        low, high, rise = search
        good = weights.ess(increments(log_ratios, rise)) >= wanted
        low, high = jnp.where(good, rise, low), jnp.where(good, high, rise)
        return low, high, (low + high) / 2

    # Bisection that asks for the whole rise first: if that is good, it is all there is.
    low, high, _ = lax.fori_loop(0, _HALVINGS, ask, (jnp.zeros_like(room), room, room))
    rise = jnp.where(low > 0, low, high)
    following = jnp.where(low == room, 1, temperature + rise).astype(room.dtype)
    factors = increments(log_ratios, following - temperature)
    cloud = weights.mean(factors, positions), root_of(factors, positions)
    sound = jnp.all(jnp.isfinite(cloud[1]))
    loc, root = jax.tree.map(lambda a, b: jnp.where(sound, a, b), cloud, (before.loc, before.root))
    return before._replace(temperature=following, loc=loc, root=root)
