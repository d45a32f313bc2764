"""Scores, diagnostics and log density of a cloud outside its steps, in the coordinates of its metric."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from probinfer.coin.cloud.geometry import moments
from probinfer.coin.cloud.particles import (
    ParticleScores,
    masked_mean,
    particle_template,
    ravel_particles,
    row_logdensity,
    score_particles,
    unravel_particles,
)
from probinfer.coin.cloud_descent import CloudState, geometry_of
from probinfer.coin.engine.diagnostics import CloudDiagnostics, diagnose
from probinfer.core.algorithms import Algorithm
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey

__all__ = ["ScoredCloud", "diagnose_cloud", "logdensity_in_cloud", "positions_of", "score_cloud"]

_NUM_BATCHES = 16  # for the diagnostics under a stochastic log density
_NUM_ERRORS = 4.0  # standard errors over these batches by which locations are shrunk


class ScoredCloud(NamedTuple):
    r"""A cloud with its scores.

    Attributes:
        table: particles x.
        scores: log densities and scores at x.
        scores_in_z: scores in the coordinates of the cloud, :math:`B^\top s`.
    """

    table: Float[Array, "N d"]
    scores: ParticleScores
    scores_in_z: Float[Array, "N d"]


def score_cloud(algorithm: Algorithm, key: PRNGKey, state: CloudState) -> ScoredCloud:
    """Return a cloud with its scores.

    Args:
        algorithm: from ``descent``.
        key: of the batch, if the log density is stochastic.
        state: of the algorithm.
    """
    config, logdensity_fn = algorithm.step.args  # type: ignore[attr-defined]
    table, template = ravel_particles(state.positions), particle_template(state.positions)
    scores = score_particles(logdensity_fn, template, table, key if config.stochastic else None)
    scores_in_z = geometry_of(config, state.z).pullback(
        state.metric, jnp.where(scores.valid[:, None], scores.gradients, 0)
    )
    return ScoredCloud(table, scores, scores_in_z)


def diagnose_cloud(
    algorithm: Algorithm, key: PRNGKey, state: CloudState
) -> tuple[CloudDiagnostics, ScoredCloud, int]:
    """Return the diagnostics of a cloud, the cloud with its scores, and the number of gradients per particle.

    Args:
        algorithm: from ``descent``.
        key: of the batches, if the log density is stochastic: the diagnostics are then those of the mean score of 16
            batches, with a location that is shrunk by four of its standard errors.
        state: of the algorithm.
    """
    config, _ = algorithm.step.args  # type: ignore[attr-defined]
    if not config.stochastic:
        scored = score_cloud(algorithm, key, state)
        return _diagnose(scored, state, scored.scores.valid), scored, 1
    batches = jax.lax.map(lambda key: score_cloud(algorithm, key, state), jax.random.split(key, _NUM_BATCHES))

    # Diagnostics of the mean score
    valid = jnp.all(batches.scores.valid, axis=0)
    mean_scores = jax.vmap(lambda scores: masked_mean(valid, scores))(batches.scores.gradients)
    scored = jax.tree.map(
        lambda leaf: jnp.mean(leaf, axis=0), batches._replace(scores=batches.scores._replace(valid=valid))
    )
    scored = scored._replace(scores=scored.scores._replace(valid=valid), table=batches.table[0])
    diagnostics = _diagnose(scored, state, valid)

    # Shrink the location by its standard errors over the batches
    spread = moments(scored.table, valid)[1]
    num_batches = jnp.asarray(_NUM_BATCHES, mean_scores.dtype)
    error = jnp.std(mean_scores, axis=0, ddof=1) / jnp.sqrt(num_batches) * spread
    size = jnp.maximum(jnp.abs(diagnostics.location) - _NUM_ERRORS * error, 0)
    location = jnp.sign(diagnostics.location) * size
    return diagnostics._replace(location=location), scored, _NUM_BATCHES


def _diagnose(scored: ScoredCloud, state: CloudState, valid: Array) -> CloudDiagnostics:
    return diagnose(scored.table, scored.scores.gradients, state.z, scored.scores_in_z, valid)


def logdensity_in_cloud(algorithm: Algorithm, state: CloudState, row: Array) -> Array:
    """Return the (exact) log density of one particle z, up to a constant; for ``jax.tree_util.Partial``."""
    config, logdensity_fn = algorithm.step.args  # type: ignore[attr-defined]
    table = geometry_of(config, state.z).from_z(state.metric, row[None])
    return row_logdensity(logdensity_fn, particle_template(state.positions), table[0])


def positions_of(algorithm: Algorithm, state: CloudState, z: Array) -> ArrayTree:
    """Return the positions of particles z in the metric of a state."""
    config, _ = algorithm.step.args  # type: ignore[attr-defined]
    table = geometry_of(config, state.z).from_z(state.metric, z)
    return unravel_particles(particle_template(state.positions), table)
