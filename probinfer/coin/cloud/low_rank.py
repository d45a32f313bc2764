r"""A metric for more dimensions than particles: scales, and the few correlated directions that the cloud can resolve.

Of the eigenvalues of a correlation matrix estimated from N particles, only those above the bulk edge of independent
coordinates, :math:`\sigma^2 (1 + \sqrt{d/N})^2`, are significant; they are corrected for their bias.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from probinfer.coin.cloud.geometry import Metric, moments
from probinfer.core.types import Array, Bool, Float, pytree

__all__ = ["LowRank", "Spikes", "spikes"]

_MAX_RANK = 16


class Spikes(NamedTuple):
    r"""The factor of a metric, :math:`B = \mathrm{diag}(\mathrm{scale}) (I + U (\mathrm{diag}(r) - I) U^\top)`.

    Attributes:
        scale: standard deviations of the coordinates.
        directions: U, orthonormal columns.
        roots: r, standard deviations along the directions.
    """

    scale: Float[Array, " d"]
    directions: Float[Array, "d k"]
    roots: Float[Array, " k"]


@pytree
class LowRank:
    """Standard deviations and at most 16 directions. Memory O(d); a refresh solves an eigenproblem of size min(N, d).

    References:
        Baik and Silverstein (2006), "Eigenvalues of large sample covariance matrices of spiked population models",
        theorem 1.1, for the bulk edge and the bias.
    """

    restarts = True

    def start(self, table: Float[Array, "N d"], mask: Bool[Array, " N"]) -> tuple[Metric, Array]:
        """Return the metric of the standard deviations of a cloud, and its coordinates z."""
        mean, spread = moments(table, mask)
        spread = jnp.where(spread > 0, spread, 1)
        rank = min(_MAX_RANK, *(n - 1 for n in table.shape))
        directions = jnp.eye(table.shape[1], rank, dtype=table.dtype)
        factor = Spikes(spread, directions, jnp.ones_like(table[0, :rank]))
        return Metric(mean, factor), (table - mean) / spread

    def refresh(
        self, metric: Metric, z: Float[Array, "N d"], mask: Bool[Array, " N"]
    ) -> tuple[Metric, Array]:
        """Estimate scales and directions again; a coordinate without spread keeps its scale."""
        offsets = _stretch(metric.factor, z) * metric.factor.scale  # x - c
        mean, spread = moments(offsets, mask)
        spread = jnp.where(spread > 0, spread, metric.factor.scale)
        y = (offsets - mean) / spread
        directions, roots, bulk = spikes(jnp.where(mask[:, None], y, 0), len(metric.factor.roots))
        inverse = Spikes(spread * bulk, directions, 1 / roots)
        factor = Spikes(spread * bulk, directions, roots)
        return Metric(metric.center + mean, factor), _stretch(inverse, y / bulk)

    def from_z(self, metric: Metric, z: Float[Array, "N d"]) -> Float[Array, "N d"]:
        """``x = c + B z``."""
        return metric.center + _stretch(metric.factor, z) * metric.factor.scale

    def pullback(self, metric: Metric, scores: Float[Array, "N d"]) -> Float[Array, "N d"]:
        r""":math:`B^\top s`."""
        return _stretch(metric.factor, scores * metric.factor.scale)


def _stretch(factor: Spikes, rows: Array) -> Array:
    """Multiply rows by the symmetric factor of B, I + U (diag(r) - I) Uᵀ."""
    return rows + (rows @ factor.directions) * (factor.roots - 1) @ factor.directions.T


def spikes(y: Float[Array, "N d"], rank: int) -> tuple[Array, Array, Array]:
    r"""Return the directions of a correlation matrix whose eigenvalues are above the bulk.

    Args:
        y: rows of mean 0, columns of mean square 1.
        rank: maximal number of directions, below N and d.

    Returns:
        Directions (d, rank), their standard deviations relative to the bulk (1 for directions in the bulk), and the
        standard deviation of the bulk.
    """
    num_particles, num_dims = y.shape
    ratio = num_dims / num_particles

    # Leading eigenpairs, of the smaller of the covariance and the Gram matrix
    if num_dims <= num_particles:
        values, vectors = jnp.linalg.eigh(y.T @ y / num_particles)
        values, directions = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    else:
        values, vectors = jnp.linalg.eigh(y @ y.T / num_particles)
        values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
        directions = y.T @ vectors / jnp.sqrt(jnp.maximum(values, jnp.finfo(y.dtype).tiny) * num_particles)

    # Variance of the bulk without the k largest eigenvalues, k = 0, ..., rank
    removed = jnp.concatenate([jnp.zeros_like(values[:1]), jnp.cumsum(values)])
    num_rest = num_dims - jnp.arange(rank + 1)
    bulks = jnp.maximum(num_dims - removed, jnp.finfo(y.dtype).eps * num_dims) / num_rest.astype(y.dtype)

    # Significant: above the bulk edge of the eigenvalues that are not larger
    significant = jnp.cumprod(values > bulks[:-1] * (1 + ratio**0.5) ** 2)
    bulk = bulks[jnp.sum(significant)]

    # Correct the bias: solve value / bulk = true + ratio * true / (true - 1) for the true variance
    relative = values / bulk
    middle = relative + 1 - ratio
    true = 0.5 * (middle + jnp.sqrt(jnp.maximum(middle**2 - 4 * relative, 0)))
    roots = jnp.where(significant.astype(bool), jnp.sqrt(jnp.maximum(true, 1)), 1)
    return jnp.where(significant.astype(bool), directions, 0), roots, jnp.sqrt(bulk)
