"""Starting points near the typical set, still dispersed.

From each point the target gives, L-BFGS climbs the log density until half the squared Newton step falls below half
the dimension: a normal density has its typical set that far below its mode, and the point is in it. The search stops
there, short of the mode: chains from different points stay apart, as R-hat needs, and a density without a maximum
does no harm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer import optimize
from probinfer.base import as_partial
from probinfer.engine import over
from probinfer.mcmc.ensemble import flatten
from probinfer.types import PyTree

__all__ = ["Climb", "climb"]


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
    dimension = flatten(positions).shape[1]
    algorithm = optimize.lbfgs(jax.tree_util.Partial(_negative, as_partial(logdensity_fn)))
    climbed, memory, spent = over(
        lambda position: _climb(algorithm, position, dimension, max_evaluations), mode, positions
    )
    moved, bent = (
        flatten(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pairs))
        for pairs in (memory.diff_params_memory, memory.diff_updates_memory)
    )
    return Climb(climbed, moved, -bent, jnp.sum(spent))


def _climb(algorithm, position, dimension: int, max_evaluations: int):
    def unfinished(state):
        # -g.d / 2 is half the squared Newton step in the metric of L-BFGS, which needs some pairs to be right
        near = (
            (state.memory.count > min(dimension, 6))
            & (-state.line.origin.slope <= dimension)
            & (state.line.num_trials == 0)
        )
        return ~state.done & ~near & (state.num_evaluations < max_evaluations)

    def advance(state):
        return algorithm.step(jax.random.key(0), state)[0]

    state = jax.lax.while_loop(unfinished, advance, algorithm.init(position))
    return state.position, state.memory, state.num_evaluations


def _negative(logdensity_fn, position):
    return -logdensity_fn(position)
