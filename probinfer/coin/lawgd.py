r"""The direction of Laplacian-adjusted Wasserstein gradient descent: steepest descent of the chi-squared divergence.

In place of a kernel that somebody chose, the direction has the one that belongs to the density: the inverse of its
diffusion operator, :math:`K(x, y) = \sum_{k \ge 1} \varphi_k(x) \varphi_k(y) / \lambda_k`. The cloud then relaxes at
one rate in every shape, fast or slow. The functions must be computed on a grid, so the particles have one or two
coordinates.
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp

from probinfer.coin.lawgd_spectrum import Spectrum
from probinfer.types import Array, Bool, Float

__all__ = ["evaluate_spectrum", "lawgd_direction"]


def lawgd_direction(
    spectrum: Spectrum, particles: Float[Array, "N D"], scores: Float[Array, "N D"]
) -> Float[Array, "N D"]:
    r"""Return :math:`-\frac1N \sum_j \nabla_1 K(x_i, x_j)` for every particle, in its own units.

    Particles outside the grid do not know the eigenfunctions: they follow the score towards the mass, at no more than
    one standard deviation in a unit of time, and are not counted by the others.

    Args:
        spectrum: of the density, from ``find_spectrum``.
        particles: the cloud x.
        scores: gradients of the log density at the particles.

    Returns:
        The direction, in the units of the particles: the move in one unit of the time of the flow. Memory
        O(N K), K eigenfunctions.

    References:
        Chewi, Le Gouic, Lu, Maunu and Rigollet (2020), "SVGD as a kernelized Wasserstein gradient flow of the
        chi-squared divergence", equation LAWGD, section 4.
    """
    values, slopes, known = evaluate_spectrum(spectrum, particles)
    count = jnp.maximum(jnp.sum(known), 1)
    excess = jnp.sum(values, axis=0) / (count * spectrum.rates)
    along = -jnp.einsum("k,nkd->nd", excess, slopes)
    pull = spectrum.scale * scores
    pull = pull / jnp.maximum(jnp.linalg.norm(pull, axis=1, keepdims=True), 1)
    return spectrum.scale * jnp.where(known[:, None], along, pull)


def evaluate_spectrum(
    spectrum: Spectrum, particles: Float[Array, "N D"]
) -> tuple[Float[Array, "N K"], Float[Array, "N K D"], Bool[Array, " N"]]:
    """Eigenfunctions and their slopes at the particles, linear between grid points.

    Args:
        spectrum: on its grid.
        particles: anywhere.

    Returns:
        Values, zero outside the grid; slopes in standard units, zero outside; whether all grid points around a
        particle are known.
    """
    w = (particles - spectrum.centre) / spectrum.scale
    place = (w - spectrum.origin) / spectrum.spacing
    cell = jnp.clip(jnp.floor(place), 0, jnp.asarray(spectrum.rows.shape) - 2)
    share = place - cell
    inside = jnp.all((share >= 0) & (share <= 1), axis=1)
    cell = cell.astype(jnp.int32)
    values, slopes = (jnp.zeros((), particles.dtype) for _ in range(2))
    for corner in itertools.product((0, 1), repeat=particles.shape[1]):
        row = spectrum.rows[tuple((cell + jnp.asarray(corner)).T)]
        weight = jnp.prod(jnp.where(jnp.asarray(corner) == 1, share, 1 - share), axis=1)
        values = values + weight[:, None] * spectrum.values[row]
        slopes = slopes + weight[:, None, None] * spectrum.slopes[row]
        inside = inside & (row < spectrum.values.shape[0] - 1)
    return jnp.where(inside[:, None], values, 0), jnp.where(inside[:, None, None], slopes, 0), inside
