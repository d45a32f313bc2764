"""A cloud seen from outside a step: its scores where it stands, and the density in its coordinates."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from probinfer.coin.cloud import table as cloud
from probinfer.coin.cloud_descent import CloudState, geometry_of
from probinfer.coin.engine.diagnostics import Judgement, judge
from probinfer.core.algorithms import Algorithm
from probinfer.core.types import Array, ArrayTree, PRNGKey

__all__ = ["Look", "judged", "logdensity_in_cloud", "look", "positions_of"]

_BATCHES = 16  # that judge a cloud where the log density is stochastic
_ERRORS = 4.0  # standard errors of these batches that a place is not blamed for


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


def judged(algorithm: Algorithm, key: PRNGKey, state: CloudState) -> tuple[Judgement, Look, int]:
    """Return the verdict on a cloud, its scores, and the gradients a particle that this took.

    Args:
        algorithm: from ``descent``.
        key: of the batches, where the log density is stochastic: the mean score of 16, and a location that is shrunk by
            four of its standard errors.
        state: of the algorithm.
    """
    rule, _ = algorithm.step.args  # type: ignore[attr-defined]
    if not rule.stochastic:
        seen = look(algorithm, key, state)
        found = judge(seen.table, seen.scores.gradients, state.z, seen.pulled, seen.scores.valid)
        return found, seen, 1
    seen = jax.lax.map(lambda key: look(algorithm, key, state), jax.random.split(key, _BATCHES))
    valid = jnp.all(seen.scores.valid, axis=0)
    means = jax.vmap(lambda scores: cloud.masked_mean(valid, scores))(seen.scores.gradients)
    one = jax.tree.map(
        lambda leaf: jnp.mean(leaf, axis=0), seen._replace(scores=seen.scores._replace(valid=valid))
    )
    one = one._replace(scores=one.scores._replace(valid=valid), table=seen.table[0])
    found = judge(one.table, one.scores.gradients, state.z, one.pulled, valid)
    centred = one.table - cloud.masked_mean(valid, one.table)
    spread = jnp.sqrt(cloud.masked_mean(valid, centred**2))
    error = jnp.std(means, axis=0, ddof=1) / jnp.sqrt(jnp.asarray(_BATCHES, means.dtype)) * spread
    sure = jnp.maximum(jnp.abs(found.location) - _ERRORS * error, 0)
    return found._replace(location=jnp.sign(found.location) * sure), one, _BATCHES


def logdensity_in_cloud(algorithm: Algorithm, state: CloudState, row: Array) -> Array:
    """Return the (exact) log density of one particle z, up to a constant; for ``jax.tree_util.Partial``."""
    _, logdensity_fn = algorithm.step.args  # type: ignore[attr-defined]
    return logdensity_fn(positions_of(algorithm, state, row[None], one=True)).astype(row.dtype)


def positions_of(algorithm: Algorithm, state: CloudState, z: Array, *, one: bool = False) -> ArrayTree:
    """Return the positions of particles z in the metric of a state; ``one``: of a single row, without its axis."""
    rule, _ = algorithm.step.args  # type: ignore[attr-defined]
    table = geometry_of(rule, state.z).from_z(state.metric, z)
    return cloud.unravel(cloud.like_one(state.positions), table[0] if one else table)
