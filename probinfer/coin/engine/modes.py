r"""Do modes far apart hold the shares of particles that their densities ask for?

Particles seldom cross a gorge, so each mode keeps those that came to it. Straight lines between some particles show the
lowest density between any two, over every chain of them: two of these stand in different modes where the best chain
leads through a gorge. The others belong to the mode of the nearest. The mass of a mode is that of a normal density with
its mean log density and covariance,

.. math:: \log Z_k \approx \frac{1}{n_k} \sum_{i \in k} \log p(x_i) + \frac12 \log\det(2\pi e\, \Sigma_k),

which compares with :math:`\log n_k`. What particle i adds to it is :math:`\log p(x_i) + \frac12 m_i^2` with its squared
Mahalanobis distance: the same for all in a normal mode. Its variance over n is that of the estimate, and half of it
is about what a mode that is not normal looks larger than it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.coin.cloud import table as cloud
from probinfer.core.types import Array, Bool, Float, Int

__all__ = ["MODES", "Shares", "shares_of_modes", "unseen"]

MODES = 4  # that are told apart
_SOME, _POINTS = 48, 5  # particles that are joined by lines, places on each
_GORGE = 1.5  # nats between two modes
_FEW, _A_DIMENSION = 6, 2  # particles that tell a covariance: 6 and 2 a dimension
_ERRORS = 2.5  # standard errors


class Shares(NamedTuple):
    """Modes that were told apart, highest first; 0 where there are fewer.

    Attributes:
        found: (MODES,) the part of the particles that each holds.
        asked: (MODES,) the part that its density asks for; 0 where too few particles tell.
        error: (MODES,) how wrong the log mass behind ``asked`` may be.
    """

    found: Float[Array, " K"]
    asked: Float[Array, " K"]
    error: Float[Array, " K"]


def unseen(dtype: Any) -> Shares:
    """Return the shares where nothing was looked at.

    Args:
        dtype: of them.
    """
    nothing = jnp.zeros(MODES, dtype)
    return Shares(nothing, nothing, nothing)


def shares_of_modes(
    density: Callable,
    table: Float[Array, "N d"],
    keep: Bool[Array, " N"],
    values: Float[Array, " N"],
) -> Shares:
    """Tell modes apart and weigh them.

    Args:
        density: log density of a row of the table.
        table: particles.
        keep: which of them count.
        values: their log densities.

    Returns:
        What the modes hold and what they should.
    """
    size, dims = table.shape
    some = jnp.linspace(0, size - 1, min(_SOME, size)).astype(jnp.int32)
    rows, heights = table[some], jnp.where(keep[some], values[some], -jnp.inf)
    level = _best_chains(_lowest_between(density, rows, heights))
    of_some, known = _modes(level, heights)
    unit = _within(rows, jnp.isfinite(heights), of_some)
    squares = jax.vmap(lambda row: jnp.sum(((rows - row) / unit) ** 2, axis=1))(table)
    nearest = jnp.argmin(jnp.where(jnp.isfinite(heights), squares, jnp.inf), axis=1)
    mode = of_some[nearest]
    masses, counts, errors = jax.lax.map(
        lambda k: _mass(table, values, keep & (mode == k) & known[k]), jnp.arange(MODES)
    )
    sure = known & (counts >= _FEW + _A_DIMENSION * dims)
    highest = jnp.max(jnp.where(sure, masses, -jnp.inf))
    asked = jnp.where(sure, jnp.exp(masses - highest), 0)
    held = jnp.sum(jnp.where(sure, counts, 0))  # of the modes that can be compared
    total = jnp.maximum(jnp.sum(counts), 1)
    return Shares(
        counts / total, asked / jnp.maximum(jnp.sum(asked), 1e-30) * held / total, jnp.where(sure, errors, 0)
    )


def _lowest_between(density: Callable, rows: Array, heights: Array) -> Array:
    """(M, M) the lowest log density on the line between each two."""
    along = jnp.linspace(0, 1, _POINTS + 2, dtype=rows.dtype)[1:-1, None]

    def from_one(pack):
        row, height = pack
        between = jax.vmap(lambda other: jnp.min(jax.vmap(density)(row + along * (other - row))))(rows)
        lowest = jnp.minimum(jnp.where(jnp.isnan(between), -jnp.inf, between), heights)
        return jnp.minimum(lowest, height)

    return jax.lax.map(from_one, (rows, heights))


def _best_chains(level: Array) -> Array:
    """The lowest place on the best chain between each two: squaring in (max, min) doubles the length of chains."""

    def double(_, level):
        through = jax.lax.map(lambda row: jnp.max(jnp.minimum(row[:, None], level), axis=0), level)
        return jnp.maximum(level, through)

    return jax.lax.fori_loop(0, max((len(level) - 1).bit_length(), 1), double, level)


def _modes(level: Array, heights: Array) -> tuple[Int[Array, " M"], Bool[Array, " K"]]:
    """The mode of each, and which of the modes exist: the highest of those that a gorge parts from all before."""
    tops = [jnp.argmax(heights)]
    known = [jnp.isfinite(jnp.max(heights))]
    for _ in range(MODES - 1):
        apart = jnp.isfinite(heights)
        for top in tops:
            apart &= level[top] < jnp.minimum(heights, heights[top]) - _GORGE
        tops.append(jnp.argmax(jnp.where(apart, heights, -jnp.inf)))
        known.append(jnp.any(apart))
    exists = jnp.stack(known)
    chains = jnp.where(exists[:, None], level[jnp.stack(tops)], -jnp.inf)
    return jnp.argmax(chains, axis=0), exists


def _within(rows: Array, counts: Array, of_some: Array) -> Array:
    """Standard deviations within the modes: a distance in these tells which mode is near."""
    ours = (of_some[:, None] == of_some) & counts  # (M, M) rows of the same mode
    means = ours @ jnp.where(counts[:, None], rows, 0) / jnp.maximum(jnp.sum(ours, axis=1), 1)[:, None]
    spread = jnp.sqrt(cloud.masked_mean(counts, (rows - means) ** 2))
    return jnp.where(spread > 0, spread, 1)


def _mass(table: Array, values: Array, inside: Array) -> tuple[Array, Array, Array]:
    """Log mass, number of particles, and how wrong the log mass may be."""
    count = jnp.sum(inside.astype(table.dtype))
    rows = jnp.where(inside[:, None], table, 0)
    few = jnp.maximum(count, 1)
    centred = jnp.where(inside[:, None], table - jnp.sum(rows, axis=0) / few, 0)
    covariance = centred.T @ centred / few
    _, log_determinant = jnp.linalg.slogdet(covariance)
    distances = jnp.sum(centred * jnp.linalg.solve(covariance, centred.T).T, axis=1)
    parts = jnp.where(inside, values + 0.5 * distances, 0)
    mean = jnp.sum(parts) / few
    variance = jnp.sum(jnp.where(inside, (parts - mean) ** 2, 0)) / few
    return mean + 0.5 * log_determinant, count, _ERRORS * jnp.sqrt(variance / few) + 0.5 * variance
