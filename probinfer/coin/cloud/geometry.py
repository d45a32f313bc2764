r"""The metric of a cloud: coordinates z in which its particles have mean 0, and spread 1 where the metric looks.

With :math:`x = c + B z` the score in z is :math:`B^\top s(x)`. Directions and bets live in z, where nothing has a
unit, and particles move in x: every shift and every scaling of the coordinates leaves a run unchanged, up to rounding.
The state of a run is z with c and B, so B is never inverted.

A metric is refreshed when it is stale, that is, some coordinate of z has a standard deviation outside [1/2, 2] (of a
diagonal metric an eighth of them, as its coordinates do not mix), and 8, 16, 32, ... steps after that: forgetting
without a rate, as the last epoch is always half of the run. While the cloud has not settled no epoch is longer than 64
steps, if there are more particles than dimensions. Every refresh is relative to the last metric, so condition numbers
that one sample covariance could not resolve are reached in several.

A geometry has four functions: ``start(table, keep) -> (metric, z)``, ``refresh(metric, z, keep) -> (metric, z)``,
``from_z(metric, z) -> x`` and ``pull(metric, scores) -> scores in z``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.coin.cloud.table import masked_mean
from probinfer.core.types import Array, Bool, Float, Int, pytree

__all__ = ["Diagonal", "Full", "Identity", "Metric", "is_due", "is_stale", "moments"]

_FIRST = 8  # step of the first restart
_STALE = 2.0
_LONGEST = 64  # between two restarts of a cloud that has not settled


class Metric(NamedTuple):
    """``x = centre + factor z``; the factor is () for one, ``(d,)`` for a diagonal, ``(d, d)`` for a matrix."""

    centre: Float[Array, " d"]
    factor: Any


@pytree
class Identity:
    """The units of the positions: ``z = x``. Never refreshed, so a bet never restarts: the published coin."""

    restarts = False

    def start(self, table: Float[Array, "N d"], keep: Bool[Array, " N"]) -> tuple[Metric, Array]:
        """Return a metric of nothing, and the particles."""
        return Metric(jnp.zeros_like(table[0]), ()), table

    def refresh(
        self, metric: Metric, z: Float[Array, "N d"], keep: Bool[Array, " N"]
    ) -> tuple[Metric, Array]:
        """Return both as they are."""
        return metric, z

    def from_z(self, metric: Metric, z: Float[Array, "N d"]) -> Float[Array, "N d"]:
        """``x = z``."""
        return z

    def pull(self, metric: Metric, scores: Float[Array, "N d"]) -> Float[Array, "N d"]:
        """Return the scores."""
        return scores


@pytree
class Diagonal:
    """One scale a coordinate: B holds the standard deviations of the cloud. Memory O(d)."""

    restarts = True
    stale_share = (
        1 / 8
    )  # one coordinate of many that is still on its way must not stop the others again and again

    def start(self, table: Float[Array, "N d"], keep: Bool[Array, " N"]) -> tuple[Metric, Array]:
        """Return the metric of a cloud, and its coordinates z."""
        return self.refresh(Metric(jnp.zeros_like(table[0]), jnp.ones_like(table[0])), table, keep)

    def refresh(
        self, metric: Metric, z: Float[Array, "N d"], keep: Bool[Array, " N"]
    ) -> tuple[Metric, Array]:
        """Scale by the standard deviations of z; a coordinate of spread zero keeps its scale."""
        mean, spread = moments(z, keep)
        spread = jnp.where(spread > 0, spread, 1)
        return Metric(metric.centre + metric.factor * mean, metric.factor * spread), (z - mean) / spread

    def from_z(self, metric: Metric, z: Float[Array, "N d"]) -> Float[Array, "N d"]:
        """``x = c + B z``."""
        return metric.centre + metric.factor * z

    def pull(self, metric: Metric, scores: Float[Array, "N d"]) -> Float[Array, "N d"]:
        """``B s``."""
        return metric.factor * scores


@pytree
class Full:
    r"""A lower triangle, :math:`B \leftarrow B\, \mathrm{chol}((1 - \lambda) C + \lambda\, \mathrm{diag}\, C)`.

    C is the covariance of z and :math:`\lambda = \min(1, d/N)`: with no more particles than dimensions B is diagonal.
    Memory O(d²), and one Cholesky factorisation a refresh.
    """

    restarts = True

    def start(self, table: Float[Array, "N d"], keep: Bool[Array, " N"]) -> tuple[Metric, Array]:
        """Return the metric of the standard deviations of a cloud, and its coordinates z."""
        metric, z = Diagonal().start(table, keep)
        return Metric(metric.centre, jnp.diag(metric.factor)), z

    def refresh(
        self, metric: Metric, z: Float[Array, "N d"], keep: Bool[Array, " N"]
    ) -> tuple[Metric, Array]:
        """Multiply by the factor of the shrunk covariance; where it has none, by standard deviations alone."""
        size, dims = z.shape
        mean, spread = moments(z, keep)
        unit = jnp.where(spread > 0, spread, 1)
        centred = jnp.where(keep[:, None], (z - mean) / unit, 0)
        covariance = centred.T @ centred / jnp.maximum(jnp.sum(keep.astype(z.dtype)), 1)
        shrinkage = min(1.0, dims / size)
        correlation = jnp.where(jnp.eye(dims, dtype=bool), 1, (1 - shrinkage) * covariance)
        chol = jnp.linalg.cholesky(correlation)
        chol = jnp.where(jnp.all(jnp.isfinite(chol)), chol, jnp.eye(dims, dtype=z.dtype))
        turned = jax.scipy.linalg.solve_triangular(chol, ((z - mean) / unit).T, lower=True).T
        factor = (metric.factor * unit) @ chol
        return Metric(metric.centre + metric.factor @ mean, factor), turned

    def from_z(self, metric: Metric, z: Float[Array, "N d"]) -> Float[Array, "N d"]:
        """``x = c + B z``."""
        return metric.centre + z @ metric.factor.T

    def pull(self, metric: Metric, scores: Float[Array, "N d"]) -> Float[Array, "N d"]:
        r""":math:`B^\top s`."""
        return scores @ metric.factor


def moments(z: Float[Array, "N d"], keep: Bool[Array, " N"]) -> tuple[Array, Array]:
    """Return means and standard deviations of the coordinates over the rows that are kept."""
    mean = masked_mean(keep, z)
    return mean, jnp.sqrt(masked_mean(keep, (z - mean) ** 2))


def is_stale(
    z: Float[Array, "N d"], keep: Bool[Array, " N"], factor: float = _STALE, share: float = 0.0
) -> Bool[Array, ""]:
    """Say whether coordinates have left the metric.

    Args:
        z: the cloud.
        keep: which particles count.
        factor: stale is a standard deviation outside [1 / factor, factor], but zero never is.
        share: of the coordinates, that must be stale; at least one.
    """
    spread = moments(z, keep)[1]
    stale = (spread > 0) & ((spread > factor) | (spread < 1 / factor))
    return jnp.sum(stale) >= max(1.0, share * z.shape[1])


def is_due(age: Int[Array, ""], settled: Bool[Array, ""] | bool = True) -> Bool[Array, ""]:
    """Say whether a restart is due: at ages 8, 16, 32, 64, 128, ..., until the cloud has settled at every 64.

    Args:
        age: steps since the metric was last stale.
        settled: whether the cloud has settled.
    """
    doubled = (age >= _FIRST) & (age & (age - 1) == 0)
    return doubled | (jnp.logical_not(settled) & (age > 0) & (age % _LONGEST == 0))
