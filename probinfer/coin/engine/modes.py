r"""The shares of particles in separate modes, compared with the masses of the modes.

Particles seldom cross a region of low density, so each mode keeps those that came to it. For a subset of the particles
the lowest density on the straight line between each two is computed, and the best chain of such lines: two particles
are in different modes if even the best chain leads through low density. The other particles belong to the mode of the
nearest one in the subset. The mass of a mode is that of a normal density with its mean log density and covariance,

.. math:: \log Z_k \approx \frac{1}{n_k} \sum_{i \in k} \log p(x_i) + \frac12 \log\det(2\pi e\, \Sigma_k),

which is compared with :math:`\log n_k`. Particle i contributes :math:`\log p(x_i) + \frac12 m_i^2`, with its squared
Mahalanobis distance, which is the same for all in a normal mode. The variance of the contributions over n is that of
the estimate, and half of their variance is about the bias for a mode that is not normal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.coin.cloud.particles import masked_mean
from probinfer.core.types import Array, Bool, Float, Int

__all__ = ["NUM_MODES", "ModeShares", "estimate_mode_shares", "unknown_mode_shares"]

NUM_MODES = 4  # that are distinguished at most
_SUBSET_SIZE, _NUM_POINTS = 48, 5  # particles that are joined by lines, and points on each line
_MIN_DROP = 1.5  # of the log density between two modes, in nats
_MIN_PARTICLES, _PARTICLES_PER_DIM = 6, 2  # of a mode whose covariance is estimated
_NUM_ERRORS = 2.5  # standard errors


class ModeShares(NamedTuple):
    """The modes, highest first; 0 if there are fewer.

    Attributes:
        particles: the share of the particles in each mode.
        mass: the share of the mass in each mode, of what the particles of all estimated modes hold; 0 if the mode has
            too few particles for an estimate.
        log_error: bound on the error of the log mass.
    """

    particles: Float[Array, " K"]
    mass: Float[Array, " K"]
    log_error: Float[Array, " K"]


def unknown_mode_shares(dtype: Any) -> ModeShares:
    """Return the shares that stand for no estimate.

    Args:
        dtype: of the shares.
    """
    zeros = jnp.zeros(NUM_MODES, dtype)
    return ModeShares(zeros, zeros, zeros)


def estimate_mode_shares(
    logdensity_fn: Callable,
    table: Float[Array, "N d"],
    mask: Bool[Array, " N"],
    values: Float[Array, " N"],
) -> ModeShares:
    """Return the shares of particles and of mass in separate modes.

    Args:
        logdensity_fn: log density of a row of the table.
        table: particles.
        mask: which particles count.
        values: log densities of the particles.
    """
    num_particles, num_dims = table.shape

    # Modes of a subset
    subset = jnp.linspace(0, num_particles - 1, min(_SUBSET_SIZE, num_particles)).astype(jnp.int32)
    rows, heights = table[subset], jnp.where(mask[subset], values[subset], -jnp.inf)
    levels = _best_chains(_lowest_on_lines(logdensity_fn, rows, heights))
    subset_modes, exists = _assign_modes(levels, heights)

    # Modes of all particles, by the nearest one in the subset
    unit = _spread_within_modes(rows, jnp.isfinite(heights), subset_modes)
    squares = jax.vmap(lambda row: jnp.sum(((rows - row) / unit) ** 2, axis=1))(table)
    nearest = jnp.argmin(jnp.where(jnp.isfinite(heights), squares, jnp.inf), axis=1)
    modes = subset_modes[nearest]

    # Masses of the modes with enough particles
    log_masses, counts, errors = jax.lax.map(
        lambda k: _log_mass(table, values, mask & (modes == k) & exists[k]), jnp.arange(NUM_MODES)
    )
    estimated = exists & (counts >= _MIN_PARTICLES + _PARTICLES_PER_DIM * num_dims)
    max_log_mass = jnp.max(jnp.where(estimated, log_masses, -jnp.inf))
    masses = jnp.where(estimated, jnp.exp(log_masses - max_log_mass), 0)
    estimated_count = jnp.sum(jnp.where(estimated, counts, 0))
    total = jnp.maximum(jnp.sum(counts), 1)
    return ModeShares(
        particles=counts / total,
        mass=masses / jnp.maximum(jnp.sum(masses), 1e-30) * estimated_count / total,
        log_error=jnp.where(estimated, errors, 0),
    )


def _lowest_on_lines(logdensity_fn: Callable, rows: Array, heights: Array) -> Array:
    """Return (M, M), the lowest log density on the line between each two rows."""
    fractions = jnp.linspace(0, 1, _NUM_POINTS + 2, dtype=rows.dtype)[1:-1, None]

    def lines_from(row_and_height):
        row, height = row_and_height
        between = jax.vmap(lambda other: jnp.min(jax.vmap(logdensity_fn)(row + fractions * (other - row))))(
            rows
        )
        lowest = jnp.minimum(jnp.where(jnp.isnan(between), -jnp.inf, between), heights)
        return jnp.minimum(lowest, height)

    return jax.lax.map(lines_from, (rows, heights))


def _best_chains(level: Array) -> Array:
    """Return the lowest log density on the best chain between each two; squaring in (max, min) doubles its length."""

    def double(_, level):
        through = jax.lax.map(lambda row: jnp.max(jnp.minimum(row[:, None], level), axis=0), level)
        return jnp.maximum(level, through)

    return jax.lax.fori_loop(0, max((len(level) - 1).bit_length(), 1), double, level)


def _assign_modes(level: Array, heights: Array) -> tuple[Int[Array, " M"], Bool[Array, " K"]]:
    """Return the mode of each row, and which modes exist.

    The first mode is that of the highest row; each further one is that of the highest row which is separated from all
    modes before it.
    """
    tops = [jnp.argmax(heights)]
    exist = [jnp.isfinite(jnp.max(heights))]
    for _ in range(NUM_MODES - 1):
        separated = jnp.isfinite(heights)
        for top in tops:
            separated &= level[top] < jnp.minimum(heights, heights[top]) - _MIN_DROP
        tops.append(jnp.argmax(jnp.where(separated, heights, -jnp.inf)))
        exist.append(jnp.any(separated))
    exists = jnp.stack(exist)
    chains = jnp.where(exists[:, None], level[jnp.stack(tops)], -jnp.inf)
    return jnp.argmax(chains, axis=0), exists


def _spread_within_modes(rows: Array, mask: Array, modes: Array) -> Array:
    """Return the standard deviations within the modes, in whose units distances decide which mode is nearest."""
    same_mode = (modes[:, None] == modes) & mask  # (M, M)
    means = (
        same_mode @ jnp.where(mask[:, None], rows, 0) / jnp.maximum(jnp.sum(same_mode, axis=1), 1)[:, None]
    )
    spread = jnp.sqrt(masked_mean(mask, (rows - means) ** 2))
    return jnp.where(spread > 0, spread, 1)


def _log_mass(table: Array, values: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Return the log mass of the particles in the mask, their number, and a bound on the error of the log mass."""
    count = jnp.sum(mask.astype(table.dtype))
    rows = jnp.where(mask[:, None], table, 0)
    divisor = jnp.maximum(count, 1)
    centered = jnp.where(mask[:, None], table - jnp.sum(rows, axis=0) / divisor, 0)
    covariance = centered.T @ centered / divisor
    _, log_determinant = jnp.linalg.slogdet(covariance)
    distances = jnp.sum(centered * jnp.linalg.solve(covariance, centered.T).T, axis=1)
    terms = jnp.where(mask, values + 0.5 * distances, 0)
    mean = jnp.sum(terms) / divisor
    variance = jnp.sum(jnp.where(mask, (terms - mean) ** 2, 0)) / divisor
    return mean + 0.5 * log_determinant, count, _NUM_ERRORS * jnp.sqrt(variance / divisor) + 0.5 * variance
