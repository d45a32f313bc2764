r"""The stopping rule: a cloud has settled if its last epoch changed neither its direction nor its width.

Epochs end at steps 16, 32, 64, ... of a run. At such an end the run may stop if three conditions hold: the means over
the last epoch differ from those over the epoch before by less than 0.02 in the virial of every coordinate; the
direction has become small (0.01 per coordinate, in standard deviations of the cloud) or stays at its noise level (above
half of what it was); and no metric was stale in the last 64 steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from probinfer.coin.cloud.particles import ravel_particles
from probinfer.coin.cloud_descent import CloudInfo, CloudState
from probinfer.core.algorithms import Algorithm, algorithm
from probinfer.core.types import Array, ArrayTree, Bool, Float, PRNGKey

__all__ = ["EpochStatistics", "MonitoredCloud", "has_settled", "monitor_epochs"]

_EARLY_STEP = 32  # whose cloud is stored
_FIRST_EPOCH = 16
_MIN_STEPS = 128
_MAX_VIRIAL_CHANGE = 0.02
_SMALL_DIRECTION = 0.01
_LEVEL_DIRECTION = 0.5
_MIN_AGE = 64


class EpochStatistics(NamedTuple):
    """Statistics of the current and the last epoch.

    Attributes:
        virial: sum of the virials over the current epoch.
        norm: sum of the direction norms over the current epoch.
        length: number of steps of the current epoch.
        last_virial: mean virial of the last epoch.
        last_norm: mean direction norm of the last epoch.
        settled: whether the cloud has settled.
        early: the cloud after step 32, when its particles have climbed one by one and not yet spread out.
    """

    virial: Float[Array, " d"]
    norm: Float[Array, ""]
    length: Float[Array, ""]
    last_virial: Float[Array, " d"]
    last_norm: Float[Array, ""]
    settled: Bool[Array, ""]
    early: Float[Array, "N d"]


class MonitoredCloud(NamedTuple):
    """State of a cloud, with the statistics of its epochs."""

    cloud: CloudState
    epochs: EpochStatistics


def monitor_epochs(inner: Algorithm) -> Algorithm:
    """Return the algorithm of a cloud with statistics: states are ``MonitoredCloud``, infos those of the cloud.

    Args:
        inner: from ``descent``.
    """
    return algorithm(_init, _step, inner)


def has_settled(state: MonitoredCloud, info: CloudInfo) -> Array:
    """Return whether the run may stop, for ``pi.run_until``: the cloud has settled, or cannot move."""
    return state.epochs.settled | (info.status != 0)


def _init(inner: Algorithm, positions: ArrayTree) -> MonitoredCloud:
    state = inner.init(positions)
    zeros, zero = jnp.zeros_like(state.spread), jnp.zeros((), state.z.dtype)
    statistics = EpochStatistics(
        virial=zeros,
        norm=zero,
        length=zero,
        last_virial=zeros + jnp.inf,
        last_norm=jnp.full_like(zero, jnp.inf),
        settled=jnp.zeros((), bool),
        early=ravel_particles(positions),
    )
    return MonitoredCloud(state, statistics)


def _step(inner: Algorithm, key: PRNGKey, state: MonitoredCloud) -> tuple[MonitoredCloud, CloudInfo]:
    cloud, info = inner.step(key, state.cloud)
    old = state.epochs

    # Means over the current epoch
    virial, norm, length = old.virial + info.virial, old.norm + info.direction_norm, old.length + 1
    mean_virial, mean_norm = virial / length, norm / length

    # Compare with the last epoch
    epoch_ends = (cloud.step >= _FIRST_EPOCH) & (cloud.step & (cloud.step - 1) == 0)
    steady = jnp.max(jnp.abs(mean_virial - old.last_virial)) < _MAX_VIRIAL_CHANGE
    small = mean_norm < _SMALL_DIRECTION * jnp.sqrt(jnp.asarray(virial.shape[0], norm.dtype))
    level = mean_norm > _LEVEL_DIRECTION * old.last_norm
    may_stop = epoch_ends & (cloud.step >= _MIN_STEPS) & (cloud.age >= _MIN_AGE)

    def at_end(new: Any, running: Any) -> Array:
        return jnp.where(epoch_ends, new, running)

    statistics = EpochStatistics(
        virial=at_end(jnp.zeros_like(virial), virial),
        norm=at_end(jnp.zeros_like(norm), norm),
        length=at_end(jnp.zeros_like(length), length),
        last_virial=at_end(mean_virial, old.last_virial),
        last_norm=at_end(mean_norm, old.last_norm),
        settled=may_stop & steady & (small | level),
        early=jnp.where(cloud.step == _EARLY_STEP, ravel_particles(cloud.positions), old.early),
    )
    return MonitoredCloud(cloud, statistics), info
