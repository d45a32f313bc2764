"""The actual displacement of the parameters, from which a bettor's winnings are computed.

A bet is a displacement from the start, but parameters may be projected, clipped or rounded after the step. A bettor
that assumed its bet would count winnings that it never made, and its wealth, and so its next bet, would grow without
limit. If the parameters are passed to ``update``, the displacement is therefore computed from them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer.betting import groups
from probinfer.betting.groups import Norm
from probinfer.core.types import Array, ArrayTree

__all__ = ["displacements", "updates_to_bet"]

_ROUNDING = (
    8  # in units of eps: a step rounds the update and the sum, and the comparison rounds both displacements
)


def displacements(state: Any, updates: ArrayTree, params: ArrayTree | None) -> tuple[ArrayTree, ArrayTree]:
    """Return the displacement from ``state.start`` that is credited to the bettor, and that of the parameters.

    They differ at most by rounding: where the parameters agree with the last bet up to their rounding, the credited
    displacement is the last bet, which has more digits. So a bet far below the rounding of its parameters is not lost.

    Args:
        state: with trees ``start`` and ``displacement``, the last bet.
        updates: the gradients, to whose dtype the moves are rounded.
        params: the current parameters. None: the last bet is assumed to have been applied.
    """
    if params is None:
        return state.displacement, state.displacement

    def displacement_of(start: Array, leaf: Any) -> Array:
        return jnp.asarray(leaf).astype(start.dtype) - start

    def credit(bet: Array, displacement: Array, start: Array, leaf: Any, update: Any) -> Array:
        eps = max(float(jnp.finfo(jnp.result_type(part)).eps) for part in (leaf, update))
        magnitude = jnp.abs(start) + jnp.abs(jnp.asarray(leaf).astype(start.dtype)) + jnp.abs(bet)
        return jnp.where(jnp.abs(displacement - bet) <= _ROUNDING * eps * magnitude, bet, displacement)

    actual = jax.tree.map(displacement_of, state.start, params)
    credited = jax.tree.map(credit, state.displacement, actual, state.start, params, updates)
    return credited, actual


def updates_to_bet(
    norm: Norm, usable: ArrayTree, bet: ArrayTree, actual: ArrayTree, template: ArrayTree
) -> ArrayTree:
    """Return the updates that lead from the parameters to the bet, zero in frozen groups, in ``template``'s dtypes."""
    updates = jax.tree.map(jnp.subtract, bet, actual)
    updates = groups.select_leaves(norm, usable, updates, groups.zeros(updates))
    return jax.tree.map(lambda update, leaf: update.astype(jnp.result_type(leaf)), updates, template)
