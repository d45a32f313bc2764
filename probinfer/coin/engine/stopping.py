r"""When has a cloud settled? Where its last epoch changed neither the force on it nor its width.

Epochs end at steps 16, 32, 64, ... of a run. At such an end the run may stop if the means over the last epoch differ
from those over the epoch before by less than 0.02 in the virial of every coordinate, and the direction has either
become small (0.01 a coordinate, in standard deviations of the cloud) or stays at the level that noise gives it
(above half of what it was), and no metric was stale in the last 64 steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from probinfer.coin.cloud import table as cloud
from probinfer.coin.cloud_descent import CloudInfo, CloudState
from probinfer.core.algorithms import Algorithm, algorithm
from probinfer.core.types import Array, ArrayTree, PRNGKey

__all__ = ["Watch", "Watched", "has_settled", "watched"]

_EARLY = 32
_FIRST = 128  # the first step that may be the last
_VIRIAL = 0.02
_SMALL = 0.01
_LEVEL = 0.5
_AGE = 64


class Watch(NamedTuple):
    """Sums over the running epoch and its length, means over the last, and whether the cloud has settled.

    ``early`` (N, d) is the cloud after step 32, when its particles have climbed one by one and not yet spread out.
    """

    virial: Array
    norm: Array
    length: Array
    last_virial: Array
    last_norm: Array
    settled: Array
    early: Array


class Watched(NamedTuple):
    """A cloud and its watch."""

    cloud: CloudState
    watch: Watch


def watched(inner: Algorithm) -> Algorithm:
    """Return the algorithm of a cloud with a watch: states are ``Watched``, infos those of the cloud.

    Args:
        inner: from ``descent``.
    """
    return algorithm(_init, _step, inner)


def has_settled(state: Watched, info: CloudInfo) -> Array:
    """Whether the rule is met, for ``pi.run_until``; a cloud that cannot move has also come to its end."""
    return state.watch.settled | (info.status != 0)


def _init(inner: Algorithm, positions: ArrayTree) -> Watched:
    state = inner.init(positions)
    zeros, none = jnp.zeros_like(state.spread), jnp.zeros((), state.z.dtype)
    far = jnp.full_like(none, jnp.inf)
    table = cloud.ravel(positions)
    return Watched(state, Watch(zeros, none, none, zeros + jnp.inf, far, jnp.zeros((), bool), table))


def _step(inner: Algorithm, key: PRNGKey, state: Watched) -> tuple[Watched, CloudInfo]:
    moved, info = inner.step(key, state.cloud)
    old = state.watch
    virial, norm, length = old.virial + info.virial, old.norm + info.direction_norm, old.length + 1
    step = moved.step
    ends = (step >= 16) & (step & (step - 1) == 0)
    mean_virial, mean_norm = virial / length, norm / length
    still = jnp.max(jnp.abs(mean_virial - old.last_virial)) < _VIRIAL
    small = mean_norm < _SMALL * jnp.sqrt(jnp.asarray(virial.shape[0], norm.dtype))
    settled = (
        ends & (step >= _FIRST) & (moved.age >= _AGE) & still & (small | (mean_norm > _LEVEL * old.last_norm))
    )

    def at_end(new: Any, running: Any) -> Array:
        return jnp.where(ends, new, running)

    watch = Watch(
        at_end(jnp.zeros_like(virial), virial),
        at_end(jnp.zeros_like(norm), norm),
        at_end(jnp.zeros_like(length), length),
        at_end(mean_virial, old.last_virial),
        at_end(mean_norm, old.last_norm),
        settled,
        jnp.where(step == _EARLY, cloud.ravel(moved.positions), old.early),
    )
    return Watched(moved, watch), info
