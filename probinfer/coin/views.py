"""A cloud seen from outside a step: its scores where it stands, and the density in its coordinates."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from probinfer.base import Algorithm
from probinfer.coin import cloud
from probinfer.coin.descent import CloudState, geometry_of
from probinfer.types import Array, ArrayTree, PRNGKey

__all__ = ["Look", "logdensity_in_cloud", "look", "positions_of"]


class Look(NamedTuple):
    """A cloud as its metric sees it: particles ``table`` and their ``scores``, scores ``pulled`` to z."""

    table: Array
    scores: cloud.Scores
    pulled: Array


def look(algorithm: Algorithm, key: PRNGKey, state: CloudState) -> Look:
    """Return the scores of a cloud where it stands.

    Args:
        algorithm: from ``descent``.
        key: of the batch, where the log density is stochastic.
        state: of the algorithm.
    """
    rule, logdensity_fn = algorithm.step.args  # type: ignore[attr-defined]
    table, like = cloud.ravel(state.positions), cloud.like_one(state.positions)
    scores = cloud.scores_of(logdensity_fn, like, table, key if rule.stochastic else None)
    pulled = geometry_of(rule, state.z).pull(
        state.metric, jnp.where(scores.valid[:, None], scores.gradients, 0)
    )
    return Look(table, scores, pulled)


def logdensity_in_cloud(algorithm: Algorithm, state: CloudState, row: Array) -> Array:
    """Return the (exact) log density of one particle z, up to a constant; for ``jax.tree_util.Partial``."""
    _, logdensity_fn = algorithm.step.args  # type: ignore[attr-defined]
    return logdensity_fn(positions_of(algorithm, state, row[None], one=True)).astype(row.dtype)


def positions_of(algorithm: Algorithm, state: CloudState, z: Array, *, one: bool = False) -> ArrayTree:
    """Return the positions of particles z in the metric of a state; ``one``: of a single row, without its axis."""
    rule, _ = algorithm.step.args  # type: ignore[attr-defined]
    table = geometry_of(rule, state.z).from_z(state.metric, z)
    return cloud.unravel(cloud.like_one(state.positions), table[0] if one else table)
