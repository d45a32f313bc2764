r"""Eigenvalues and eigenfunctions of the Langevin diffusion of a density in one or two dimensions, on a grid.

The Langevin diffusion of a density p ∝ exp(−U) relaxes by :math:`L f = -\Delta f + \nabla U \cdot \nabla f`, which is
self-adjoint under p; its eigenfunctions are the modes in which a cloud differs from p, its eigenvalues their rates of
decay. On a grid, with :math:`f = v / \sqrt p`, L becomes the symmetric matrix of a Schrödinger operator: the
off-diagonal elements are
:math:`-1/h^2` and the diagonal is :math:`\sum \sqrt{p_{j}/p_i} / h^2` over the neighbors j of i. Its null vector
:math:`\sqrt p` is exact, and only ratios of neighboring densities occur.

The known points of the grid are those whose density is at least ``exp(-DEPTH)`` of the maximum. Their edge reflects the
diffusion: beyond it eigenfunctions would be rounding errors divided by :math:`\sqrt p`. The matrix is built on the host
in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.ndimage
import scipy.sparse
import scipy.sparse.linalg

from probinfer.core.errors import NumericalError
from probinfer.core.status import Status
from probinfer.core.types import Array, Float, Int, Shaped

__all__ = ["Spectrum", "decompose", "find_spectrum"]

DEPTH = 10.0  # nats below the maximum of the log density at which points are unknown; about e^-10 of the mass is there
POINTS = {1: 1024, 2: 96}  # per axis; in two dimensions 96² known points
MAX_POINTS = 480  # per axis
_SEARCH_POINTS = {1: 4097, 2: 257}  # per axis, of the grids in the search for the mass
_MAX_ROUNDS = 60


class Spectrum(NamedTuple):
    """Eigenfunctions at the M known points of a grid in standard units, ``w = (x - center) / scale``.

    Attributes:
        center: mean of the density, in the units of the particles.
        scale: standard deviations of the density.
        origin: first grid point, in standard units.
        spacing: spacing of the grid, in standard units.
        rows: the row of each grid point in the arrays below; M if it is not known.
        rates: eigenvalues in ascending order, without zeros, in 1 / time.
        values: eigenfunctions, of unit variance under the density; the last row is zero.
        slopes: derivatives of the eigenfunctions, in standard units.
        homes: the nearest known point away from the edge for each grid point, in standard units.
    """

    center: Float[Array, " D"]
    scale: Float[Array, " D"]
    origin: Float[Array, " D"]
    spacing: Float[Array, " D"]
    rows: Int[Array, "*grid"]
    rates: Float[Array, " K"]
    values: Float[Array, "M+1 K"]
    slopes: Float[Array, "M+1 K D"]
    homes: Float[Array, "*grid D"]


def decompose(
    log_density: Shaped[np.ndarray, "*grid"], spacing: Shaped[np.ndarray, " D"], num_functions: int
) -> tuple[Shaped[np.ndarray, "*grid"], Shaped[np.ndarray, " K"], Shaped[np.ndarray, "M K"]]:
    """Return the smallest eigenvalues of the diffusion on a grid with one or two axes, and their eigenfunctions.

    Args:
        log_density: unnormalized, on the grid.
        spacing: spacing of the grid along each axis.
        num_functions: number of eigenfunctions, without the constant one; fewer if the grid has fewer points.

    Returns:
        The row of each grid point in the functions, or the number M of rows if the density is negligible; the smallest
        eigenvalues in ascending order, without those that are zero up to rounding (the share of a separate mode does
        not relax); the eigenfunctions, of mean zero and unit variance under the density on the grid.

    References:
        Chewi, Le Gouic, Lu, Maunu and Rigollet (2020), "SVGD as a kernelized Wasserstein gradient flow of the
        chi-squared divergence", section 5; Pavliotis (2014), "Stochastic processes and applications", section 4.9.
    """
    known = _without_small_pieces(log_density >= log_density.max() - DEPTH, log_density)
    rows, num_points = _number_points(known), int(known.sum())

    # Symmetric matrix of L: its diagonal, and one entry for each pair of neighbors
    diagonal, edges = np.zeros(num_points), []
    for axis, step in enumerate(spacing):
        i, j, (before, after, pairs) = _neighbors(rows, known, axis)
        half = (log_density[after][pairs] - log_density[before][pairs]) / 2
        np.add.at(diagonal, i, np.exp(half) / step**2)
        np.add.at(diagonal, j, np.exp(-half) / step**2)
        edges.append((i, j, np.full(len(i), -1 / step**2)))

    # Eigenfunctions f = v / sqrt(p), without those that do not relax
    rates, vectors = _smallest_eigenpairs(diagonal, edges, min(num_functions + 1, num_points - 1))
    positive = rates > 1e-6
    root = np.exp((log_density[known] - log_density.max()) / 2)
    return rows, rates[positive], vectors[:, positive] / (root / np.linalg.norm(root))[:, None]


def _number_points(known: np.ndarray) -> np.ndarray:
    """Return the numbers of the known points in the order of the grid, and their count elsewhere."""
    return np.where(known, np.cumsum(known).reshape(known.shape) - 1, known.sum())


def _without_small_pieces(known: np.ndarray, log_density: np.ndarray) -> np.ndarray:
    """Remove connected pieces with less than a thousandth of the mass."""
    pieces, count = scipy.ndimage.label(known)
    mass = scipy.ndimage.sum_labels(np.exp(log_density - log_density.max()), pieces, np.arange(1, count + 1))
    return known & np.isin(pieces, 1 + np.flatnonzero(mass > 1e-3 * mass.sum()))


def _neighbors(rows: np.ndarray, known: np.ndarray, axis: int) -> tuple[Any, Any, Any]:
    """Return the rows of known neighbors along an axis, and the slices of the grid that pair them."""
    before, after = (
        tuple(part if k == axis else slice(None) for k in range(rows.ndim))
        for part in (slice(None, -1), slice(1, None))
    )
    pairs = known[before] & known[after]
    return rows[before][pairs], rows[after][pairs], (before, after, pairs)


def _smallest_eigenpairs(diagonal: np.ndarray, edges: list, num: int) -> tuple[Any, Any]:
    """Return the smallest eigenvalues and their vectors, of a tridiagonal matrix in one dimension, a sparse in two."""
    i, j, entries = (np.concatenate(part) for part in zip(*edges, strict=True))
    if len(edges) == 1:
        off_diagonal = np.zeros(len(diagonal) - 1)
        off_diagonal[i] = entries
        return scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal, select="i", select_range=(0, num - 1))
    matrix = scipy.sparse.coo_matrix((entries, (i, j)), (len(diagonal),) * 2)
    matrix = (matrix + matrix.T + scipy.sparse.diags(diagonal)).tocsc()
    start = np.random.default_rng(0).normal(size=len(diagonal))  # fixed: the same vectors in every run
    # A shift just below zero makes the factorized matrix definite, and the smallest eigenvalues converge first.
    rates, vectors = scipy.sparse.linalg.eigsh(matrix, num, sigma=-0.01, v0=start)
    order = np.argsort(rates)
    return rates[order], vectors[:, order]


def find_spectrum(
    logdensity_fn: Callable[[Array], Any], positions: Float[Array, "N D"], num_functions: int
) -> Spectrum:
    """Find the mass of a density, and compute its eigenfunctions there.

    The search starts with the bounding box of the positions, which need not be near the mass: the box is doubled while
    the density at its edge is not negligible, and moves to where the density is high.

    Args:
        logdensity_fn: log density of one point ``(D,)``; may be minus infinity.
        positions: the initial particles, D of 1 or 2.
        num_functions: maximal number of eigenfunctions.

    Returns:
        Arrays in the dtype of the positions.

    Raises:
        NumericalError: No box contains the mass, as for an improper density, the log density is NaN, or an even grid
            over the box is too coarse, as under heavy tails.
    """
    dtype, num_dims = positions.dtype, positions.shape[1]
    evaluate = jax.jit(jax.vmap(logdensity_fn))

    def evaluate_grid(low, high, count):
        axes = [np.linspace(a, b, count) for a, b in zip(low, high, strict=True)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, num_dims)
        values = np.asarray(evaluate(jnp.asarray(grid, dtype)), float)
        if np.isnan(values).any() or np.isposinf(values).any():
            raise NumericalError(
                "the log density is NaN or infinite near the particles, but LAWGD evaluates it on a whole grid: check "
                "its domain, or use coin.svgd",
                Status.NON_FINITE,
            )
        return axes, values.reshape([count] * num_dims)

    # Grid over the mass
    low, high = _find_box(evaluate_grid, np.asarray(positions, float), num_dims)
    axes, log_density = evaluate_grid(low, high, POINTS[num_dims])
    if (
        num_dims == 2
    ):  # refine, so that the number of known points does not depend on the shape of the density
        share = np.mean(log_density >= log_density.max() - DEPTH)
        axes, log_density = evaluate_grid(low, high, min(int(POINTS[2] / np.sqrt(share)), MAX_POINTS))
    _check_resolved(log_density)

    # Eigenfunctions in standard units
    center, scale = _moments(axes, log_density)
    spacing = np.array([axis[1] - axis[0] for axis in axes]) / scale
    rows, rates, functions = decompose(log_density, spacing, num_functions)
    fields = {
        "center": center,
        "scale": scale,
        "origin": (low - center) / scale,
        "spacing": spacing,
        "rates": rates,
        "values": np.pad(functions, ((0, 1), (0, 0))),
        "slopes": np.pad(_slopes(functions, rows, spacing), ((0, 1), (0, 0), (0, 0))),
        "homes": (low - center) / scale + _nearest_inside(rows < len(functions), spacing) * spacing,
    }
    return Spectrum(
        **{name: jnp.asarray(x, dtype) for name, x in fields.items()}, rows=jnp.asarray(rows, jnp.int32)
    )


def _find_box(evaluate_grid: Callable, positions: np.ndarray, num_dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest box, up to a grid point, that contains all points above the depth."""
    num_points = _SEARCH_POINTS[num_dims]
    low, high = positions.min(axis=0), positions.max(axis=0)
    width = np.where(high > low, high - low, 1.0)
    low, high = low - width / 2, high + width / 2
    for _ in range(_MAX_ROUNDS):
        values = evaluate_grid(low, high, num_points)[1]
        # Double a box without any density
        if np.isneginf(values).all():
            low, high = low - (high - low) / 2, high + (high - low) / 2
            continue
        # Grow on the sides where the density is not negligible
        above = values >= values.max() - DEPTH
        spans = [
            np.flatnonzero(above.any(axis=tuple(k for k in range(num_dims) if k != d)))
            for d in range(num_dims)
        ]
        first, last = np.array([[span[0], span[-1]] for span in spans]).T
        open_below, open_above = first == 0, last == num_points - 1
        if (open_below | open_above).any():
            width = high - low
            low, high = low - width * open_below, high + width * open_above
            continue
        # Shrink to the points above the depth, until they fill a quarter of every axis
        step = (high - low) / (num_points - 1)
        low, high = low + (first - 1) * step, low + (last + 1) * step
        if (last - first > num_points / 4).all():
            return low, high
    raise NumericalError(
        f"no box contains the mass of this density: after {_MAX_ROUNDS} steps it still reaches the edge at {low} ... "
        f"{high}; is it normalizable? LAWGD needs a proper density with light enough tails, coin.svgd does not look "
        "that far",
        Status.NON_FINITE,
    )


def _check_resolved(log_density: np.ndarray) -> None:
    """Refuse a grid with fewer than 8 points along an axis where the density is high."""
    high = log_density >= log_density.max() - 2
    min_points = min(
        int(high.any(axis=tuple(k for k in range(high.ndim) if k != d)).sum()) for d in range(high.ndim)
    )
    if min_points < 8:
        raise NumericalError(
            f"an even grid over the whole density has {min_points} points where the density is high: its tails are too "
            "heavy or its modes too narrow and too far apart for LAWGD; use coin.svgd",
            Status.POOR_APPROXIMATION,
        )


def _moments(axes: list[np.ndarray], log_density: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weights = np.exp(log_density - log_density.max())
    weights /= weights.sum()
    mean, sd = [], []
    for d, axis in enumerate(axes):
        marginal = weights.sum(axis=tuple(k for k in range(len(axes)) if k != d))
        mean.append(marginal @ axis)
        sd.append(np.sqrt(marginal @ (axis - mean[-1]) ** 2))
    return np.array(mean), np.array(sd)


def _nearest_inside(known: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Return for each grid point the indices (*grid, D) of the nearest known point whose neighbors are also known."""
    neighborhood = np.ones((3,) * known.ndim)
    inside = scipy.ndimage.binary_erosion(known, neighborhood, iterations=2)
    inside = inside if inside.any() else known
    indices = scipy.ndimage.distance_transform_edt(
        ~inside, sampling=spacing, return_distances=False, return_indices=True
    )
    return np.moveaxis(indices, 0, -1)


def _slopes(functions: np.ndarray, rows: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Return the derivatives (M, K, D) by central differences of known neighbors, one-sided at the edge."""
    derivatives = []
    for axis, step in enumerate(spacing):
        i, j, _ = _neighbors(rows, rows < len(functions), axis)
        change = (functions[j] - functions[i]) / step
        total, count = np.zeros_like(functions), np.zeros(len(functions))
        for end in (i, j):  # each contains a point at most once, so fancy indexing adds correctly
            total[end] += change
            count[end] += 1
        derivatives.append(total / np.maximum(count, 1)[:, None])
    return np.stack(derivatives, axis=-1)
