"""Starting points near the typical set, still dispersed, none of them hopeless.

From each point the target gives, L-BFGS climbs the log density until half the squared Newton step falls below half
the dimension: a normal density has its typical set that far below its mode, and the point is in it. The search stops
there, short of the mode: chains from different points stay apart, as R-hat needs, and a density without a maximum
does no harm.

A climb may end in a local mode with no mass to speak of, or be lost in a region too steep to leave, and a chain would
stay there for the whole run. So four candidates are climbed for every chain, those that lag hopelessly behind the best
so far climb on as far as their gradients reach, again and again as the best rises, and those that still do are dropped:
their region would have to be a hundred times as wide as that of the best in every direction to hold e^-10 of its mass,
and the scales that L-BFGS saw do not say so. The chains start from the first candidates that are left, in the order
they were drawn, not from the best: modes that may matter keep the chains they were dealt, and R-hat can tell. Where
fewer candidates are left than chains, several chains share one and part at their first momenta.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.algorithms import as_partial
from probinfer.core.types import Array, Bool, Float, PyTree
from probinfer.inference.engine import over
from probinfer.mcmc.ensemble import flatten
from probinfer.numerics import optimization

__all__ = ["CANDIDATES", "Climb", "Starts", "choose", "climb", "hopeless", "margin"]

CANDIDATES = 4  # climbed for every chain
_NEGLIGIBLE = 10.0  # log of how much more mass the best has
_WIDER = math.log(100.0)  # log of how much wider a direction may be in which the best is narrow


class Climb(NamedTuple):
    """Where the climbs ended and what they learned.

    Attributes:
        positions: the log density is finite where it was, and not lower.
        moved: (pair, d), the last steps of all climbs; zero where there were fewer.
        bent: (pair, d), the changes of the gradient along them.
        num_gradients: spent by all climbs together.
    """

    positions: PyTree
    moved: Any
    bent: Any
    num_gradients: Any


class Starts(NamedTuple):
    """The climbs that chains start from, and what was dropped.

    Attributes:
        climb: of the chosen candidates, one a chain; the gradients are those of all candidates.
        num_dropped: candidates that were hopeless.
        num_shared: chains that start where another one does.
    """

    climb: Climb
    num_dropped: Any
    num_shared: Any


def climb(
    logdensity_fn: Callable, positions: PyTree, *, mode: str = "auto", max_evaluations: int = 100
) -> Climb:
    """Move every position towards the typical set.

    Args:
        logdensity_fn: log density of one unconstrained position.
        positions: with a leading axis for the chains.
        mode: ``"auto"``, ``"map"`` or ``"vmap"`` over the chains.
        max_evaluations: gradients spent on a chain at most.

    Returns:
        The positions, the steps that led there, and their cost.
    """
    algorithm, dimension = _algorithm(logdensity_fn, positions)
    states = over(
        lambda position: _climb(
            algorithm, algorithm.init(position), jnp.asarray(-jnp.inf), dimension, max_evaluations
        ),
        mode,
        positions,
    )
    return _ended(states)


def choose(
    logdensity_fn: Callable,
    candidates: PyTree,
    num_chains: int,
    *,
    mode: str = "auto",
    max_evaluations: int = 100,
) -> Starts:
    """Climb from all candidates and keep one a chain, none of them hopeless.

    Args:
        logdensity_fn: log density of one unconstrained position.
        candidates: with a leading axis, finite log density in one of them at least.
        num_chains: how many to keep.
        mode: ``"auto"``, ``"map"`` or ``"vmap"`` over the candidates.
        max_evaluations: gradients spent on a candidate at most.

    Returns:
        The climbs of the chosen candidates, and how many were dropped.
    """
    algorithm, dimension = _algorithm(logdensity_fn, candidates)
    states = over(algorithm.init, mode, candidates)

    def climb_on(carry):
        states, floors, *_ = carry
        higher = over(
            lambda state, floor: _climb(algorithm, state, floor, dimension, max_evaluations),
            mode,
            states,
            floors,
        )
        dropped = hopeless(-higher.value, _log_volumes(higher.memory), dimension)
        best = jnp.max(jnp.where(dropped, -jnp.inf, -higher.value))
        unfinished = jnp.isneginf(floors) | (higher.num_evaluations > states.num_evaluations)
        floors = jnp.where(dropped, best - margin(dimension), -jnp.inf)
        return higher, floors, dropped, jnp.any(dropped & unfinished)

    anywhere = jnp.full_like(states.value, -jnp.inf)
    start = states, anywhere, jnp.isnan(anywhere), jnp.asarray(True)
    # As long as any that lag behind climb on: one that stopped early may be overtaken by those that climbed on since.
    states, _, dropped, _ = jax.lax.while_loop(lambda carry: carry[-1], climb_on, start)
    num_kept = jnp.sum(~dropped)
    rows = jnp.argsort(dropped, stable=True)[jnp.arange(num_chains) % jnp.maximum(num_kept, 1)]
    kept = _ended(jax.tree.map(lambda leaf: leaf[rows], states))
    kept = kept._replace(num_gradients=jnp.sum(states.num_evaluations))
    return Starts(kept, jnp.sum(dropped), jnp.maximum(num_chains - num_kept, 0))


def hopeless(
    values: Float[Array, " n"], log_volumes: Float[Array, " n"], dimension: int
) -> Bool[Array, " n"]:
    """Say which of several points stand for a negligible mass.

    The best has the largest sum of log density and log volume: a narrow neck of high density is not the best. Hopeless
    is what lies below it by more than the margin in the log density and in the sum.

    Args:
        values: log densities; one that is not a number is hopeless.
        log_volumes: sums of the log scales of the coordinates near the points, up to a constant.
        dimension: of the position.
    """
    finite = jnp.isfinite(values)
    masses = jnp.where(finite, values + log_volumes, -jnp.inf)
    best = jnp.argmax(masses)
    lower = (values < values[best] - margin(dimension)) & (masses < masses[best] - margin(dimension))
    return ~finite | lower


def margin(dimension: int) -> float:
    """How far below the best log density the mass is negligible: 10 + d log 100.

    A region whose density is lower by this holds e^-10 of the mass of the best one if it is a hundred times as wide
    in each of the d directions. In the typical sets of the two the log density varies by the order of d / 2.

    Args:
        dimension: of the position.
    """
    return _NEGLIGIBLE + _WIDER * dimension


def _algorithm(logdensity_fn, positions):
    """L-BFGS on minus the log density, and the dimension."""
    algorithm = optimization.lbfgs(jax.tree_util.Partial(_negative, as_partial(logdensity_fn)))
    return algorithm, flatten(positions).shape[1]


def _climb(algorithm, state, floor, dimension: int, max_evaluations: int):
    """Climb to the typical set, and above a floor."""

    def unfinished(state):
        # -g.d / 2 is half the squared Newton step in the metric of L-BFGS, which needs some pairs to be right
        near = (
            (state.memory.count > min(dimension, 6))
            & (-state.line.origin.slope <= dimension)
            & (state.line.num_trials == 0)
            & (-state.value >= floor)
        )
        return ~state.done & ~near & (state.num_evaluations < max_evaluations)

    def advance(state):
        return algorithm.step(jax.random.key(0), state)[0]

    return jax.lax.while_loop(unfinished, advance, state)


def _ended(states) -> Climb:
    return Climb(states.position, *_secants(states.memory), jnp.sum(states.num_evaluations))


def _log_volumes(memory) -> Float[Array, " n"]:
    """Sum of the log scales: the fourth root of the squared steps over the squared changes of the gradient."""
    num = jax.tree.leaves(memory.diff_params_memory)[0].shape[0]
    moved, bent = (rows.reshape(num, -1, rows.shape[1]) for rows in _secants(memory))
    curvature = jnp.sum(moved * -bent, axis=2, keepdims=True)
    weight = jnp.where(curvature > 0, 1 / jnp.where(curvature > 0, curvature, 1), 0)
    moved, bent = (jnp.sum(rows**2 * weight, axis=1) for rows in (moved, bent))
    seen = (moved > 0) & (bent > 0)
    return jnp.sum(jnp.where(seen, jnp.log(moved) - jnp.log(bent), 0), axis=1, where=seen) / 4


def _secants(memory) -> tuple[Array, Array]:
    """Steps and changes of the gradient of the log density, (pair, d) each."""
    moved, bent = (
        flatten(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pairs))
        for pairs in (memory.diff_params_memory, memory.diff_updates_memory)
    )
    return moved, -bent


def _negative(logdensity_fn, position):
    return -logdensity_fn(position)
