r"""A metric for more dimensions than particles: scales, and the few correlated directions that the cloud can show.

Of the eigenvalues of a correlation matrix estimated from N particles only those count that stand out of the bulk
which independent coordinates would give, :math:`\sigma^2 (1 + \sqrt{d/N})^2`, and they are corrected for their bias.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from probinfer.coin.cloud.geometry import Metric, moments
from probinfer.core.types import Array, Bool, Float, pytree

__all__ = ["LowRank", "Spikes", "spikes"]

_RANK = 16


class Spikes(NamedTuple):
    r"""``factor`` of a metric: :math:`B = \mathrm{diag}(\mathrm{scale}) (I + U (\mathrm{diag}(r) - I) U^\top)`.

    ``scale`` (d,), ``directions`` U (d, k) orthonormal, ``roots`` r (k,).
    """

    scale: Float[Array, " d"]
    directions: Float[Array, "d k"]
    roots: Float[Array, " k"]


@pytree
class LowRank:
    """Standard deviations, and at most 16 directions. Memory O(d); a refresh takes one eigenproblem of size min(N, d).

    References:
        Baik and Silverstein (2006), "Eigenvalues of large sample covariance matrices of spiked population models",
        theorem 1.1, for the bulk edge and the bias.
    """

    restarts = True

    def start(self, table: Float[Array, "N d"], keep: Bool[Array, " N"]) -> tuple[Metric, Array]:
        """Return the metric of the standard deviations of a cloud, and its coordinates z."""
        mean, spread = moments(table, keep)
        spread = jnp.where(spread > 0, spread, 1)
        rank = min(_RANK, *(n - 1 for n in table.shape))
        factor = Spikes(
            spread, jnp.eye(table.shape[1], rank, dtype=table.dtype), jnp.ones_like(table[0, :rank])
        )
        return Metric(mean, factor), (table - mean) / spread

    def refresh(
        self, metric: Metric, z: Float[Array, "N d"], keep: Bool[Array, " N"]
    ) -> tuple[Metric, Array]:
        """Take scales and directions from the particles anew; a coordinate of spread zero keeps its scale."""
        moved = _stretch(metric.factor, z) * metric.factor.scale
        mean, spread = moments(moved, keep)
        spread = jnp.where(spread > 0, spread, metric.factor.scale)
        y = (moved - mean) / spread
        directions, roots, bulk = spikes(jnp.where(keep[:, None], y, 0), len(metric.factor.roots))
        inverse = Spikes(spread * bulk, directions, 1 / roots)
        factor = Spikes(spread * bulk, directions, roots)
        return Metric(metric.centre + mean, factor), _stretch(inverse, y / bulk)

    def from_z(self, metric: Metric, z: Float[Array, "N d"]) -> Float[Array, "N d"]:
        """``x = c + B z``."""
        return metric.centre + _stretch(metric.factor, z) * metric.factor.scale

    def pull(self, metric: Metric, scores: Float[Array, "N d"]) -> Float[Array, "N d"]:
        r""":math:`B^\top s`."""
        return _stretch(metric.factor, scores * metric.factor.scale)


def _stretch(factor: Spikes, rows: Array) -> Array:
    """Rows times the symmetric part of B."""
    return rows + (rows @ factor.directions) * (factor.roots - 1) @ factor.directions.T


def spikes(y: Float[Array, "N d"], rank: int) -> tuple[Array, Array, Array]:
    r"""Return the directions that stand out of the bulk of a correlation matrix.

    Args:
        y: rows of mean 0, columns of mean square 1.
        rank: how many directions at most, below N and d.

    Returns:
        Directions (d, rank), the roots of their variances over that of the bulk (1: does not stand out), and the
        standard deviation of the bulk.
    """
    size, dims = y.shape
    ratio = dims / size
    if dims <= size:
        values, vectors = jnp.linalg.eigh(y.T @ y / size)
        values, directions = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    else:
        values, vectors = jnp.linalg.eigh(y @ y.T / size)
        values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
        directions = y.T @ vectors / jnp.sqrt(jnp.maximum(values, jnp.finfo(y.dtype).tiny) * size)
    removed = jnp.concatenate([jnp.zeros_like(values[:1]), jnp.cumsum(values)])
    rest = dims - jnp.arange(rank + 1)
    bulks = jnp.maximum(dims - removed, jnp.finfo(y.dtype).eps * dims) / rest.astype(y.dtype)
    stands = jnp.cumprod(
        values > bulks[:-1] * (1 + ratio**0.5) ** 2
    )  # against what is left without the larger ones
    bulk = bulks[jnp.sum(stands)]
    relative = values / bulk
    middle = relative + 1 - ratio
    true = 0.5 * (middle + jnp.sqrt(jnp.maximum(middle**2 - 4 * relative, 0)))
    roots = jnp.where(stands.astype(bool), jnp.sqrt(jnp.maximum(true, 1)), 1)
    return jnp.where(stands.astype(bool), directions, 0), roots, jnp.sqrt(bulk)
