r"""Power of TARP: the smallest error that the ranks of distances detect with a given probability.

A distance is not a normal quantity: near the center of a posterior a bias changes it to second order only, and less in
more dimensions. So the power is computed with the draws and references at hand. A draw of a posterior replaces the true
value, and the draws are shifted or scaled; its rank among the others has the distribution that true values would have
if the draws were biased or too wide. The rest is exact, as for any rank check: the probability that such ranks leave
their band.

Before that, the draws are shifted by the average offset between their means and the true values, so that the power is
that for a correct posterior.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from probinfer.checks.calibration.bands import ecdf_band
from probinfer.checks.power.ranks import (
    MAX_ERRORS,
    Detectable,
    leaving_probability,
    min_simulations,
    smallest_detected,
)

__all__ = ["Balls", "detectable_in_balls", "prepare_balls", "select_simulations"]

_MAX_SIMULATIONS = 256  # simulations that are used
_MAX_MEMBERS = 1 << 14  # draws that replace a true value, over all simulations
_DIRECTION_SIMULATIONS = 32  # simulations on which directions are compared
_MAX_DIRECTIONS = 8
_MAX_BIAS = 32.0  # posterior standard deviations
_PER_SIMULATION = ("squares", "offsets", "scales", "products", "deviations")
_WHERE = "the bias in one direction, the width in all, of the posteriors at hand"


class Balls(NamedTuple):
    """Moments of the draws about their references, from which those of shifted and scaled draws follow.

    Attributes:
        squares: squared distances of the draws from the reference (S, L).
        offsets: offsets of the draws from the reference along A coordinates (S, L, A).
        scales: posterior standard deviations of these coordinates (S, A).
        products: inner products of the offsets with the deviations from the posterior mean (S, L).
        deviations: squared deviations from the posterior mean (S, L).
        members: indices of the draws that replace the true value (T,).
        dims: number of coordinates.
    """

    squares: Float[np.ndarray, "S L"]
    offsets: Float[np.ndarray, "S L A"]
    scales: Float[np.ndarray, "S A"]
    products: Float[np.ndarray, "S L"]
    deviations: Float[np.ndarray, "S L"]
    members: Int[np.ndarray, " T"]
    dims: int


def select_simulations(simulations: Int[np.ndarray, " S"]) -> Int[np.ndarray, " subset"]:
    """Return an evenly spaced subset of at most 256 simulations."""
    count = min(len(simulations), _MAX_SIMULATIONS)
    return simulations[np.linspace(0, len(simulations) - 1, count).astype(int)] if count else simulations


def prepare_balls(
    draws: Shaped[Any, "S L D"],
    true_values: Shaped[Any, "S D"],
    points: Float[np.ndarray, "S D"],
    matrix: Shaped[Any, "D D"],
) -> Balls | None:
    """Compute the moments of draws about references, all finite; None if there are no simulations.

    Args:
        draws: posterior draws.
        true_values: true values.
        points: references, in whitened coordinates.
        matrix: from a value to its whitened coordinates.
    """
    if not len(true_values):
        return None
    draws, true_values = (np.asarray(values @ matrix.T, float) for values in (draws, true_values))
    mean, deviation = draws.mean(axis=1), draws.std(axis=1)
    scale = np.where(deviation > 0, deviation, np.inf)
    # Remove the average bias of the posterior means
    centers = mean - np.mean((mean - true_values) / scale, axis=0) * deviation
    distances = (centers - points) / scale
    # The true values determine the centers to one standard deviation over √S. A common offset that is not far above
    # this error is replaced by the error, on the side where it hides a bias (both signs of a bias are tried).
    error = np.sqrt((1 + np.var(distances, axis=0)) / len(distances))
    offset = np.mean(distances, axis=0)
    centers = centers - np.where(np.abs(offset) < 4 * error, offset - error, 0.0) * deviation
    # Moments of the draws about mean and reference
    deviations = draws - mean[:, None]
    offsets = deviations + (centers - points)[:, None]
    dims = draws.shape[2]
    axes = np.unique(np.linspace(0, dims - 1, min(dims, _MAX_DIRECTIONS)).astype(int))
    num_members = min(draws.shape[1], max(_MAX_MEMBERS // len(draws), 1))
    return Balls(
        squares=np.sum(offsets**2, axis=2),
        offsets=offsets[:, :, axes],
        scales=deviation[:, axes],
        products=np.sum(offsets * deviations, axis=2),
        deviations=np.sum(deviations**2, axis=2),
        members=np.linspace(0, draws.shape[1] - 1, num_members).astype(int),
        dims=dims,
    )


def detectable_in_balls(
    balls: Balls | None, num_samples: int, level: float, *, power: float = 0.9
) -> tuple[Detectable, int | None]:
    """Return the smallest errors that the ranks of distances detect, and the simulations needed if these are too large.

    The bias is in the direction, and of the sign, that is hardest to detect, among at most eight whitened coordinates.
    It is small enough at one standard deviation in every coordinate at once, √D in one direction.

    Args:
        balls: from ``prepare_balls``.
        num_samples: number S of simulations.
        level: probability of a false alarm.
        power: probability of detecting each error.

    Raises:
        ValueError: as ``ecdf_band``.
    """
    assert balls is not None, "there is no power without simulations"
    num_cells = balls.squares.shape[1] + 1
    max_bias = MAX_ERRORS["bias"] * balls.dims**0.5

    def detected(cumulative: np.ndarray, num: int = num_samples) -> bool:
        return leaving_probability(num, num_cells, level, cumulative) >= power

    def biased(size: float) -> np.ndarray:
        return _hardest_bias(balls, size)

    def scaled(factor: float) -> np.ndarray:
        return _cumulative(balls, scale=factor)

    errors = Detectable(
        bias=smallest_detected(lambda size: detected(biased(size)), _MAX_BIAS),
        too_narrow=float(np.exp(-smallest_detected(lambda size: detected(scaled(np.exp(-size))), 8.0))),
        too_wide=float(np.exp(smallest_detected(lambda size: detected(scaled(np.exp(size))), 8.0))),
        power=power,
        level=level,
        where=_WHERE,
        largest_bias=max_bias,
    )
    if errors.enough:
        return errors, None
    required = [biased(max_bias), scaled(MAX_ERRORS["too_narrow"]), scaled(MAX_ERRORS["too_wide"])]
    return errors, min_simulations(lambda num: all(detected(cumulative, num) for cumulative in required))


def _hardest_bias(balls: Balls, size: float) -> np.ndarray:
    """Return P(rank < m) under a bias in the direction in which it differs least from uniform."""
    num_cells = balls.squares.shape[1] + 1
    uniform = ecdf_band(1, num_cells).edges / num_cells
    stride = -(-len(balls.squares) // _DIRECTION_SIMULATIONS)
    subset = balls._replace(**{name: getattr(balls, name)[::stride] for name in _PER_SIMULATION})

    def deviation(direction: tuple[float, int]) -> float:
        bias, axis = direction
        return float(np.max(np.abs(_cumulative(subset, bias=bias, axis=axis) - uniform)))

    bias, axis = min(itertools.product((-size, size), range(balls.scales.shape[1])), key=deviation)
    return _cumulative(balls, bias=bias, axis=axis)


def _cumulative(balls: Balls, *, bias: float = 0.0, axis: int = 0, scale: float = 1.0) -> np.ndarray:
    """Return P(rank < m) at the edges m if the draws are biased along an axis or scaled by a factor."""
    shift = bias * balls.scales[:, None, axis]
    squares = balls.squares + 2 * shift * balls.offsets[:, :, axis] + shift**2
    if scale != 1:
        squares = balls.squares + 2 * (scale - 1) * balls.products + (scale - 1) ** 2 * balls.deviations
    num_cells = balls.squares.shape[1] + 1
    edges = ecdf_band(1, num_cells).edges
    # Control variate: among the unchanged draws, the ranks of members are uniform.
    return edges / num_cells + (_rank_cdf(balls, squares) - _rank_cdf(balls, balls.squares))[edges - 1]


def _rank_cdf(balls: Balls, squares: np.ndarray) -> np.ndarray:
    """Return the distribution function (L + 1,) of the ranks of members among the others at changed distances."""
    num_others = squares.shape[1] - 1
    members = balls.squares[:, balls.members]
    ranks = np.stack(
        [row.searchsorted(member) for row, member in zip(np.sort(squares, axis=1), members, strict=True)]
    )
    ranks -= squares[:, balls.members] < members  # a member does not count itself
    counts = np.bincount(ranks.ravel(), minlength=num_others + 1) / ranks.size
    # With one more draw a rank k becomes k + 1 with probability (k + 1)/(num_others + 2): uniform ranks stay uniform.
    increased = counts * np.arange(1, num_others + 2) / (num_others + 2)
    return np.cumsum(np.append(counts - increased, 0.0) + np.append(0.0, increased))
