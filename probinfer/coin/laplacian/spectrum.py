r"""The slow functions of a density in one or two dimensions: eigenfunctions of its diffusion, on a grid.

The Langevin diffusion of a density p ∝ exp(−U) relaxes by :math:`L f = -\Delta f + \nabla U \cdot \nabla f`, which is
self-adjoint under p; its eigenfunctions say in which shapes, and how slowly, a cloud differs from p. On a grid, with
:math:`f = v / \sqrt p`, L becomes the symmetric matrix of a Schrödinger operator: the off-diagonal elements are
:math:`-1/h^2` and the diagonal is :math:`\sum \sqrt{p_{j}/p_i} / h^2` over the neighbors j of i. Its null vector
:math:`\sqrt p` is exact, and only ratios of neighboring densities occur.

The grid covers the places whose density is at least ``exp(-DEPTH)`` of the highest. Nothing flows through its edge:
beyond it eigenfunctions would be rounding errors divided by :math:`\sqrt p`. It is built on the host in float64.
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
from probinfer.core.types import Array, Float, Shaped

__all__ = ["Spectrum", "decompose", "find_spectrum"]

DEPTH = 10.0  # of the log density under its maximum where the grid ends; e^-10 of the mass is beyond
POINTS = {1: 1024, 2: 96}  # along an axis; in two dimensions if all of the grid were known
MOST_POINTS = 480
_PROBE = {1: 4097, 2: 257}  # points along an axis of the grids that look for the mass
_ROUNDS = 60


class Spectrum(NamedTuple):
    """Eigenfunctions at the M known points of a grid in standard units, ``w = (x - center) / scale``.

    Attributes:
        center: mean of the density, ``(D,)``, in the units of the particles.
        scale: its standard deviations, ``(D,)``.
        origin: first grid point in standard units, ``(D,)``.
        spacing: of the grid in standard units, ``(D,)``.
        rows: for each grid point its row in the arrays below, ``(*grid,)``; M where nothing is known.
        rates: eigenvalues in ascending order without zeros, ``(K,)``, in 1 / time.
        values: eigenfunctions, of unit variance under the density, ``(M + 1, K)``; the last row is zero.
        slopes: their derivatives in standard units, ``(M + 1, K, D)``.
        homes: for each grid point the nearest known one away from the edge, in standard units, ``(*grid, D)``.
    """

    center: Array
    scale: Array
    origin: Array
    spacing: Array
    rows: Array
    rates: Array
    values: Array
    slopes: Array
    homes: Array


def decompose(
    log_density: Shaped[np.ndarray, "*grid"], spacing: Shaped[np.ndarray, " D"], num: int
) -> tuple[Shaped[np.ndarray, "*grid"], Shaped[np.ndarray, " K"], Shaped[np.ndarray, "M K"]]:
    """Eigenvalues and eigenfunctions of the diffusion on a grid of one or two axes.

    Args:
        log_density: unnormalized, on the grid.
        spacing: of the grid along each axis.
        num: how many, the constant function apart; fewer where the grid has fewer points.

    Returns:
        For each grid point its row in the functions, or their number M where the density is negligible; the smallest
        eigenvalues, ascending, those that are zero to rounding left out (the share of a separate mode does not relax);
        functions of mean zero and unit variance under the density on the grid.

    References:
        Chewi, Le Gouic, Lu, Maunu and Rigollet (2020), "SVGD as a kernelized Wasserstein gradient flow of the
        chi-squared divergence", section 5; Pavliotis (2014), "Stochastic processes and applications", section 4.9.
    """
    known = _without_specks(log_density >= log_density.max() - DEPTH, log_density)
    rows, size = _number(known), int(known.sum())
    diagonal, edges = np.zeros(size), []
    for axis, step in enumerate(spacing):
        i, j, (before, after, joined) = _neighbors(rows, known, axis)
        half = (log_density[after][joined] - log_density[before][joined]) / 2
        np.add.at(diagonal, i, np.exp(half) / step**2)
        np.add.at(diagonal, j, np.exp(-half) / step**2)
        edges.append((i, j, np.full(len(i), -1 / step**2)))
    rates, vectors = _smallest(diagonal, edges, min(num + 1, size - 1))
    moving = rates > 1e-6
    root = np.exp((log_density[known] - log_density.max()) / 2)
    return rows, rates[moving], vectors[:, moving] / (root / np.linalg.norm(root))[:, None]


def _number(known: np.ndarray) -> np.ndarray:
    """Rows of the known points in the order of the grid, their number elsewhere."""
    return np.where(known, np.cumsum(known).reshape(known.shape) - 1, known.sum())


def _without_specks(known: np.ndarray, log_density: np.ndarray) -> np.ndarray:
    """Leave out connected pieces with less than a thousandth of the mass."""
    pieces, count = scipy.ndimage.label(known)
    mass = scipy.ndimage.sum_labels(np.exp(log_density - log_density.max()), pieces, np.arange(1, count + 1))
    return known & np.isin(pieces, 1 + np.flatnonzero(mass > 1e-3 * mass.sum()))


def _neighbors(rows: np.ndarray, known: np.ndarray, axis: int) -> tuple[Any, Any, Any]:
    """Rows of known neighbors along an axis, and the slices of the grid that pair them."""
    before, after = (
        tuple(part if k == axis else slice(None) for k in range(rows.ndim))
        for part in (slice(None, -1), slice(1, None))
    )
    joined = known[before] & known[after]
    return rows[before][joined], rows[after][joined], (before, after, joined)


def _smallest(diagonal: np.ndarray, edges: list, num: int) -> tuple[Any, Any]:
    """Eigenpairs of the smallest eigenvalues: tridiagonal in one dimension, sparse in two."""
    i, j, w = (np.concatenate(part) for part in zip(*edges, strict=True))
    if len(edges) == 1:
        below = np.zeros(len(diagonal) - 1)
        below[i] = w
        return scipy.linalg.eigh_tridiagonal(diagonal, below, select="i", select_range=(0, num - 1))
    matrix = scipy.sparse.coo_matrix((w, (i, j)), (len(diagonal),) * 2)
    matrix = (matrix + matrix.T + scipy.sparse.diags(diagonal)).tocsc()
    start = np.random.default_rng(0).normal(size=len(diagonal))  # the same vectors in every run
    # Shifted just below zero: the factorized matrix is positive definite, the smallest eigenvalues converge first.
    rates, vectors = scipy.sparse.linalg.eigsh(matrix, num, sigma=-0.01, v0=start)
    order = np.argsort(rates)
    return rates[order], vectors[:, order]


def find_spectrum(
    logdensity_fn: Callable[[Array], Any], positions: Float[Array, "N D"], num: int
) -> Spectrum:
    """Find where a density has its mass, and its slow functions there.

    The search starts at the box of the positions, which need not be near the mass: the box is doubled while the
    density at its edge is not negligible, or moves to where the density is.

    Args:
        logdensity_fn: log density of one point ``(D,)``; may be minus infinity.
        positions: the start of the particles, D of 1 or 2.
        num: how many functions, at most.

    Returns:
        Arrays in the dtype of the positions.

    Raises:
        NumericalError: no box was found that holds the mass, as when the density is improper; its log is NaN; an
            even grid over the box is too coarse, as under heavy tails.
    """
    dtype, dims = positions.dtype, positions.shape[1]
    evaluate = jax.jit(jax.vmap(logdensity_fn))

    def density(low, high, count):
        axes = [np.linspace(a, b, count) for a, b in zip(low, high, strict=True)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, dims)
        values = np.asarray(evaluate(jnp.asarray(grid, dtype)), float)
        if np.isnan(values).any() or np.isposinf(values).any():
            raise NumericalError(
                "the log density is NaN or infinite near the particles; LAWGD needs it on a whole grid: check its "
                "domain, or use coin.svgd",
                Status.NON_FINITE,
            )
        return axes, values.reshape([count] * dims)

    low, high = _box_of_mass(density, np.asarray(positions, float), dims)
    axes, log_density = density(low, high, POINTS[dims])
    if dims == 2:  # as many points where the mass is, whatever the shape of the density
        share = np.mean(log_density >= log_density.max() - DEPTH)
        axes, log_density = density(low, high, min(int(POINTS[2] / np.sqrt(share)), MOST_POINTS))
    _check_resolved(log_density)
    center, scale = _moments(axes, log_density)
    spacing = np.array([axis[1] - axis[0] for axis in axes]) / scale
    rows, rates, functions = decompose(log_density, spacing, num)
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


def _box_of_mass(density_fn: Callable, positions: np.ndarray, dims: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest box, to a grid point, of the densities above the depth; grown or moved until they are inside."""
    low, high = positions.min(axis=0), positions.max(axis=0)
    width = np.where(high > low, high - low, 1.0)
    low, high = low - width / 2, high + width / 2
    for _ in range(_ROUNDS):
        values = density_fn(low, high, _PROBE[dims])[1]
        if np.isneginf(values).all():
            low, high = low - (high - low) / 2, high + (high - low) / 2
            continue
        inside = values >= values.max() - DEPTH
        spans = [
            np.flatnonzero(inside.any(axis=tuple(k for k in range(dims) if k != d))) for d in range(dims)
        ]
        first, last = np.array([[span[0], span[-1]] for span in spans]).T
        open_below, open_above = first == 0, last == _PROBE[dims] - 1
        if (open_below | open_above).any():
            width = high - low
            low, high = low - width * open_below, high + width * open_above
            continue
        step = (high - low) / (_PROBE[dims] - 1)
        low, high = low + (first - 1) * step, low + (last + 1) * step
        if (last - first > _PROBE[dims] / 4).all():
            return low, high
    raise NumericalError(
        f"no box holds the mass of this density: after {_ROUNDS} steps it still reaches the edge at {low} ... {high}; "
        "is it normalizable? LAWGD needs a proper density with light enough tails, coin.svgd does not look that far",
        Status.NON_FINITE,
    )


def _check_resolved(log_density: np.ndarray) -> None:
    high = log_density >= log_density.max() - 2
    fewest = min(
        int(high.any(axis=tuple(k for k in range(high.ndim) if k != d)).sum()) for d in range(high.ndim)
    )
    if fewest < 8:
        raise NumericalError(
            f"an even grid over the whole density has {fewest} points where the density is high: its tails are too "
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
    """For each grid point the indices (*grid, D) of the nearest known point whose neighbors are known as well."""
    around = np.ones((3,) * known.ndim)
    inside = scipy.ndimage.binary_erosion(known, around, iterations=2)
    inside = inside if inside.any() else known
    indices = scipy.ndimage.distance_transform_edt(
        ~inside, sampling=spacing, return_distances=False, return_indices=True
    )
    return np.moveaxis(indices, 0, -1)


def _slopes(functions: np.ndarray, rows: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Derivatives (M, K, D) by central differences of known neighbors, one-sided at the edge."""
    parts = []
    for axis, step in enumerate(spacing):
        i, j, _ = _neighbors(rows, rows < len(functions), axis)
        change = (functions[j] - functions[i]) / step
        total, count = np.zeros_like(functions), np.zeros(len(functions))
        for end in (i, j):  # every point at most once in either
            total[end] += change
            count[end] += 1
        parts.append(total / np.maximum(count, 1)[:, None])
    return np.stack(parts, axis=-1)
