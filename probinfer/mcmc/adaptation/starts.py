"""Starting points near the typical set, still dispersed, none of them in a region of negligible mass.

From each point that the target gives, L-BFGS ascends the log density until half the squared Newton step falls below
half the dimension: a normal density has its typical set that far below its mode, and the point is in it. The search
stops there, short of the mode: chains from different points stay apart, as R-hat needs, and a density without a maximum
does no harm.

An ascent may end in a local mode of negligible mass, or be lost in a region too steep to leave, and a chain would stay
there for the whole run. So four candidates ascend for every chain. Those far below the best ascend further, as long as
their gradients lead upwards, and again when the best rises; those that remain below are dropped: their region would
have to be a hundred times as wide as that of the best in every direction to hold e^-10 of its mass, and the scales that
L-BFGS found exclude this. The chains start from the first candidates that remain, in the order in which they were
drawn, not from the best: modes that may matter keep their chains, and R-hat can tell. If fewer candidates than chains
remain, several chains share one and separate at their first momenta.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.algorithms import as_partial
from probinfer.core.trees import map_or_vmap
from probinfer.core.types import Array, Bool, Float, Int, PyTree
from probinfer.mcmc.ensemble import flatten
from probinfer.numerics import optimization

__all__ = [
    "CANDIDATES",
    "Ascent",
    "Starts",
    "ascend",
    "choose",
    "has_negligible_mass",
    "margin",
]

CANDIDATES = 4  # per chain
_NEGLIGIBLE = 10.0  # log of the ratio of the mass of the best candidate to a negligible one
_WIDER = math.log(100.0)  # log of how much wider than the best a region may be in each direction


class Ascent(NamedTuple):
    """Where the ascents ended, and their secant pairs.

    Attributes:
        positions: leaves (chain, ...); the log density at each is no lower than before, and finite if it was.
        position_differences: the last steps of all ascents; zero if an ascent took fewer.
        gradient_differences: of the log density, along these steps.
        num_gradients: of all ascents together.
    """

    positions: PyTree
    position_differences: Float[Array, "pair d"]
    gradient_differences: Float[Array, "pair d"]
    num_gradients: Int[Array, ""]


class Starts(NamedTuple):
    """The starting points of the chains.

    Attributes:
        ascent: of the chosen candidates, one per chain; ``num_gradients`` counts those of all candidates.
        num_dropped: candidates of negligible mass.
        num_shared: chains that start where another one does.
    """

    ascent: Ascent
    num_dropped: Int[Array, ""]
    num_shared: Int[Array, ""]


def ascend(
    logdensity_fn: Callable, positions: PyTree, *, mode: str = "auto", max_evaluations: int = 100
) -> Ascent:
    """Move every position towards the typical set.

    Args:
        logdensity_fn: log density of one unconstrained position.
        positions: with a leading axis for the chains.
        mode: ``"auto"``, ``"map"`` or ``"vmap"`` over the chains.
        max_evaluations: maximum number of gradients per chain.

    Returns:
        The positions, the secant pairs of the last steps, and the number of gradients.
    """
    algorithm, dimension = _algorithm(logdensity_fn, positions)
    states = map_or_vmap(
        lambda position: _ascend(
            algorithm, algorithm.init(position), jnp.asarray(-jnp.inf), dimension, max_evaluations
        ),
        mode,
        positions,
    )
    return _as_ascent(states)


def choose(
    logdensity_fn: Callable,
    candidates: PyTree,
    num_chains: int,
    *,
    mode: str = "auto",
    max_evaluations: int = 100,
) -> Starts:
    """Ascend from all candidates and choose one per chain, none of them of negligible mass.

    Args:
        logdensity_fn: log density of one unconstrained position.
        candidates: with a leading axis; the log density is finite in at least one of them.
        num_chains: number of starting points.
        mode: ``"auto"``, ``"map"`` or ``"vmap"`` over the candidates.
        max_evaluations: maximum number of gradients per candidate.

    Returns:
        The ascents of the chosen candidates, and the number of candidates dropped.
    """
    algorithm, dimension = _algorithm(logdensity_fn, candidates)
    states = map_or_vmap(algorithm.init, mode, candidates)

    def ascend_further(carry):
        states, floors, *_ = carry
        # Ascend
        ascended = map_or_vmap(
            lambda state, floor: _ascend(algorithm, state, floor, dimension, max_evaluations),
            mode,
            states,
            floors,
        )
        # Judge
        dropped = has_negligible_mass(-ascended.value, _log_volumes(ascended.memory), dimension)
        best = jnp.max(jnp.where(dropped, -jnp.inf, -ascended.value))
        # A candidate that had a floor to reach and took no further step is finished
        unfinished = jnp.isneginf(floors) | (ascended.num_evaluations > states.num_evaluations)
        floors = jnp.where(dropped, best - margin(dimension), -jnp.inf)
        return ascended, floors, dropped, jnp.any(dropped & unfinished)

    no_floors = jnp.full_like(states.value, -jnp.inf)
    carry = states, no_floors, jnp.isnan(no_floors), jnp.asarray(True)
    # Repeat while any low candidate still ascends: the best so far may be overtaken by one of them.
    states, _, dropped, _ = jax.lax.while_loop(lambda carry: carry[-1], ascend_further, carry)
    # Choose
    num_remaining = jnp.sum(~dropped)
    rows = jnp.argsort(dropped, stable=True)[jnp.arange(num_chains) % jnp.maximum(num_remaining, 1)]
    chosen = _as_ascent(jax.tree.map(lambda leaf: leaf[rows], states))
    chosen = chosen._replace(num_gradients=jnp.sum(states.num_evaluations))
    return Starts(chosen, jnp.sum(dropped), jnp.maximum(num_chains - num_remaining, 0))


def has_negligible_mass(
    values: Float[Array, " n"], log_volumes: Float[Array, " n"], dimension: int
) -> Bool[Array, " n"]:
    """Return which of several points represent a negligible mass.

    The best point has the largest log mass, the sum of log density and log volume: a narrow neck of high density is not
    the best. A mass is negligible if both its log density and its log mass lie below the best by more than the margin.

    Args:
        values: log densities; the mass of a NaN is negligible.
        log_volumes: sums of the log scales of the coordinates near the points, up to a constant.
        dimension: of the position.
    """
    finite = jnp.isfinite(values)
    log_masses = jnp.where(finite, values + log_volumes, -jnp.inf)
    best = jnp.argmax(log_masses)
    lower = (values < values[best] - margin(dimension)) & (log_masses < log_masses[best] - margin(dimension))
    return ~finite | lower


def margin(dimension: int) -> float:
    """Return how far below the best log density the mass is negligible: 10 + d log 100.

    A region whose density is lower by this holds e^-10 of the mass of the best one if it is a hundred times as wide
    in each of the d directions. Within their typical sets the log density varies by the order of d / 2.

    Args:
        dimension: of the position.
    """
    return _NEGLIGIBLE + _WIDER * dimension


def _algorithm(logdensity_fn, positions):
    """Return L-BFGS on minus the log density, and the dimension."""
    algorithm = optimization.lbfgs(jax.tree_util.Partial(_negative, as_partial(logdensity_fn)))
    return algorithm, flatten(positions).shape[1]


def _ascend(algorithm, state, floor, dimension: int, max_evaluations: int):
    """Ascend to the typical set, and above a floor."""

    def unfinished(state):
        # -g.d / 2 is half the squared Newton step in the metric of L-BFGS, which needs some pairs to be accurate
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


def _as_ascent(states) -> Ascent:
    return Ascent(states.position, *_secants(states.memory), jnp.sum(states.num_evaluations))


def _log_volumes(memory) -> Float[Array, " n"]:
    """Sum of the log scales: (sum dx^2 w / sum dg^2 w)^(1/4) with the weights w = 1 / (-dg . dx) of the pairs."""
    num_points = jax.tree.leaves(memory.diff_params_memory)[0].shape[0]
    dx, dg = (rows.reshape(num_points, -1, rows.shape[1]) for rows in _secants(memory))
    curvature = jnp.sum(dx * -dg, axis=2, keepdims=True)
    weight = jnp.where(curvature > 0, 1 / jnp.where(curvature > 0, curvature, 1), 0)
    dx, dg = (jnp.sum(rows**2 * weight, axis=1) for rows in (dx, dg))
    changed = (dx > 0) & (dg > 0)
    return jnp.sum(jnp.where(changed, jnp.log(dx) - jnp.log(dg), 0), axis=1, where=changed) / 4


def _secants(memory) -> tuple[Array, Array]:
    """Return the differences of positions and of gradients of the log density, (pair, d) each."""
    dx, minus_dg = (
        flatten(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pairs))
        for pairs in (memory.diff_params_memory, memory.diff_updates_memory)
    )
    return dx, -minus_dg  # L-BFGS minimizes minus the log density


def _negative(logdensity_fn, position):
    return -logdensity_fn(position)
