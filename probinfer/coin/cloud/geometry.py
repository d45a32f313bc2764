r"""The metric of a cloud: coordinates z in which its particles have mean 0 and, along its axes, standard deviation 1.

With :math:`x = c + B z` the score in z is :math:`B^\top s(x)`. Directions and bets are computed in z, where nothing has
a unit, and particles move in x: a run is invariant to shifts and scalings of the coordinates, up to rounding. The state
of a run is z with c and B, so B is never inverted.

A metric is refreshed when it is stale, that is, when a coordinate of z has a standard deviation outside [1/2, 2] (for a
diagonal metric, when an eighth of them have, as its coordinates do not mix), and 8, 16, 32, ... steps after that: old
epochs are forgotten without a rate, as the last epoch is always half of the run. While the cloud has not settled, no
epoch is longer than 64 steps if there are more particles than dimensions. Every refresh is relative to the last metric,
so several of them reach condition numbers that one sample covariance could not resolve.

A geometry has four methods: ``start(table, mask) -> (metric, z)``, ``refresh(metric, z, mask) -> (metric, z)``,
``from_z(metric, z) -> x`` and ``pullback(metric, scores) -> scores in z``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.coin.cloud.particles import masked_mean
from probinfer.core.types import Array, Bool, Float, Int, pytree

__all__ = ["Diagonal", "Full", "Identity", "Metric", "is_due", "is_stale", "moments"]

_FIRST_RESTART = 8  # step
_STALE = 2.0  # factor by which a standard deviation of z may differ from 1
_MAX_EPOCH = 64  # steps between two restarts of a cloud that has not settled


class Metric(NamedTuple):
    """The coordinates of a cloud, ``x = c + B z``.

    Attributes:
        center: c.
        factor: B: () for the identity, ``(d,)`` for a diagonal, ``(d, d)`` for a matrix, or ``Spikes``.
    """

    center: Float[Array, " d"]
    factor: Any


@pytree
class Identity:
    """The units of the positions, ``z = x``. Never refreshed, so bets never restart: the published coin sampler."""

    restarts = False

    def start(self, table: Float[Array, "N d"], mask: Bool[Array, " N"]) -> tuple[Metric, Array]:
        """Return the identity, and the particles."""
        return Metric(jnp.zeros_like(table[0]), ()), table

    def refresh(
        self, metric: Metric, z: Float[Array, "N d"], mask: Bool[Array, " N"]
    ) -> tuple[Metric, Array]:
        """Return both unchanged."""
        return metric, z

    def from_z(self, metric: Metric, z: Float[Array, "N d"]) -> Float[Array, "N d"]:
        """``x = z``."""
        return z

    def pullback(self, metric: Metric, scores: Float[Array, "N d"]) -> Float[Array, "N d"]:
        """Return the scores unchanged."""
        return scores


@pytree
class Diagonal:
    """One scale per coordinate: B is the diagonal of the standard deviations of the cloud. Memory O(d)."""

    restarts = True
    stale_share = (
        1 / 8
    )  # a few coordinates that still move must not restart the bets of the others again and again

    def start(self, table: Float[Array, "N d"], mask: Bool[Array, " N"]) -> tuple[Metric, Array]:
        """Return the metric of a cloud, and its coordinates z."""
        return self.refresh(Metric(jnp.zeros_like(table[0]), jnp.ones_like(table[0])), table, mask)

    def refresh(
        self, metric: Metric, z: Float[Array, "N d"], mask: Bool[Array, " N"]
    ) -> tuple[Metric, Array]:
        """Scale by the standard deviations of z; a coordinate without spread keeps its scale."""
        mean, spread = moments(z, mask)
        spread = jnp.where(spread > 0, spread, 1)
        return Metric(metric.center + metric.factor * mean, metric.factor * spread), (z - mean) / spread

    def from_z(self, metric: Metric, z: Float[Array, "N d"]) -> Float[Array, "N d"]:
        """``x = c + B z``."""
        return metric.center + metric.factor * z

    def pullback(self, metric: Metric, scores: Float[Array, "N d"]) -> Float[Array, "N d"]:
        """``B s``."""
        return metric.factor * scores


@pytree
class Full:
    r"""A lower triangular B, :math:`B \leftarrow B\, \mathrm{chol}((1 - \lambda) C + \lambda\, \mathrm{diag}\, C)`.

    C is the covariance of z and :math:`\lambda = \min(1, d/N)`: if there are no more particles than dimensions, B is
    diagonal. Memory O(d²), and one Cholesky factorization per refresh.
    """

    restarts = True

    def start(self, table: Float[Array, "N d"], mask: Bool[Array, " N"]) -> tuple[Metric, Array]:
        """Return the metric of the standard deviations of a cloud, and its coordinates z."""
        metric, z = Diagonal().start(table, mask)
        return Metric(metric.center, jnp.diag(metric.factor)), z

    def refresh(
        self, metric: Metric, z: Float[Array, "N d"], mask: Bool[Array, " N"]
    ) -> tuple[Metric, Array]:
        """Multiply B by the Cholesky factor of the shrunk covariance, or by standard deviations if that fails."""
        num_particles, num_dims = z.shape
        mean, spread = moments(z, mask)
        unit = jnp.where(spread > 0, spread, 1)
        standardized = jnp.where(mask[:, None], (z - mean) / unit, 0)
        covariance = standardized.T @ standardized / jnp.maximum(jnp.sum(mask.astype(z.dtype)), 1)
        shrinkage = min(1.0, num_dims / num_particles)
        correlation = jnp.where(jnp.eye(num_dims, dtype=bool), 1, (1 - shrinkage) * covariance)
        chol = jnp.linalg.cholesky(correlation)
        chol = jnp.where(jnp.all(jnp.isfinite(chol)), chol, jnp.eye(num_dims, dtype=z.dtype))
        whitened = jax.scipy.linalg.solve_triangular(chol, ((z - mean) / unit).T, lower=True).T
        factor = (metric.factor * unit) @ chol
        return Metric(metric.center + metric.factor @ mean, factor), whitened

    def from_z(self, metric: Metric, z: Float[Array, "N d"]) -> Float[Array, "N d"]:
        """``x = c + B z``."""
        return metric.center + z @ metric.factor.T

    def pullback(self, metric: Metric, scores: Float[Array, "N d"]) -> Float[Array, "N d"]:
        r""":math:`B^\top s`."""
        return scores @ metric.factor


def moments(z: Float[Array, "N d"], mask: Bool[Array, " N"]) -> tuple[Array, Array]:
    """Return the means and standard deviations of the coordinates over the rows in the mask."""
    mean = masked_mean(mask, z)
    return mean, jnp.sqrt(masked_mean(mask, (z - mean) ** 2))


def is_stale(
    z: Float[Array, "N d"], mask: Bool[Array, " N"], factor: float = _STALE, share: float = 0.0
) -> Bool[Array, ""]:
    """Return whether the metric no longer fits the cloud.

    Args:
        z: the cloud.
        mask: which particles count.
        factor: a coordinate is stale if its standard deviation is outside [1 / factor, factor] and not zero.
        share: share of the coordinates that must be stale; at least one must be.
    """
    spread = moments(z, mask)[1]
    stale = (spread > 0) & ((spread > factor) | (spread < 1 / factor))
    return jnp.sum(stale) >= max(1.0, share * z.shape[1])


def is_due(age: Int[Array, ""], settled: Bool[Array, ""] | bool = True) -> Bool[Array, ""]:
    """Return whether a restart is due: at ages 8, 16, 32, 64, 128, ..., and until the cloud has settled every 64 steps.

    Args:
        age: steps since the metric was last stale.
        settled: whether the cloud has settled.
    """
    doubled = (age >= _FIRST_RESTART) & (age & (age - 1) == 0)
    return doubled | (jnp.logical_not(settled) & (age > 0) & (age % _MAX_EPOCH == 0))
