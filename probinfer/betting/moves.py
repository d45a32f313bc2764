"""The displacement that was really made: what a bettor has won depends on where the parameters are.

A bet is a displacement from the start. Parameters that are projected, clipped or rounded after the step are somewhere
else; a bettor that believed in the bet would count gains that nobody made, and its wealth, hence its next bet, would
grow without limit. Where the parameters are given to ``update``, the displacement is therefore read from them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer.betting import groups
from probinfer.betting.groups import Norm
from probinfer.core.types import Array, ArrayTree

__all__ = ["displacements", "emitted"]

_ROUNDING = 8  # a step rounds the update, the sum and, in the comparison, both displacements


def displacements(state: Any, updates: ArrayTree, params: ArrayTree | None) -> tuple[ArrayTree, ArrayTree]:
    """The displacement from ``state.start`` that counts, and the one that the parameters show.

    They differ by rounding at most: a displacement that agrees with the last bet to the rounding of the parameters is
    the last bet, which is known to more digits. So a bet far below the rounding of its parameters is not lost.

    Args:
        state: with trees ``start`` and ``displacement``, the last bet.
        updates: the gradients, whose dtype the moves are rounded to.
        params: the parameters now, or ``None``: then the last bet is believed to have been made.
    """
    if params is None:
        return state.displacement, state.displacement

    def shown(start: Array, leaf: Any) -> Array:
        return jnp.asarray(leaf).astype(start.dtype) - start

    def counted(bet: Array, shown: Array, start: Array, leaf: Any, update: Any) -> Array:
        coarsest = max(float(jnp.finfo(jnp.result_type(part)).eps) for part in (leaf, update))
        size = jnp.abs(start) + jnp.abs(jnp.asarray(leaf).astype(start.dtype)) + jnp.abs(bet)
        return jnp.where(jnp.abs(shown - bet) <= _ROUNDING * coarsest * size, bet, shown)

    real = jax.tree.map(shown, state.start, params)
    made = jax.tree.map(counted, state.displacement, real, state.start, params, updates)
    return made, real


def emitted(norm: Norm, usable: ArrayTree, bet: ArrayTree, real: ArrayTree, like: ArrayTree) -> ArrayTree:
    """The update that leads from the parameters to the bet, zero in frozen groups, in the dtype of ``like``."""
    moves = jax.tree.map(jnp.subtract, bet, real)
    moves = groups.select(norm, usable, moves, groups.zeros(moves))
    return jax.tree.map(lambda move, leaf: move.astype(jnp.result_type(leaf)), moves, like)
