r"""What could TARP have seen? The smallest error that the ranks of distances find with given power.

A distance is no normal quantity: near the middle of a posterior a bias changes it to second order only, and the less
the more dimensions there are. So the yardstick is made of the draws and references at hand. A member of a posterior
takes the place of the true value, and the draws are shifted or stretched; its rank among the others has the law that
true values would have if the draws were biased or too wide. The rest is exact, as for any rank check: the probability
that such ranks leave their band.

Before that the draws are moved by what separates their means from the true values on average, so that the yardstick is
that of a posterior that is right.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from probinfer.checks.calibration.bands import ecdf_band
from probinfer.checks.power.ranks import LARGEST, Detectable, fewest, leaving_probability, smallest

__all__ = ["Balls", "balls", "detectable_in_balls", "some_of"]

_SIMULATIONS = 256  # that are looked at
_MEMBERS = 1 << 14  # that take the place of a true value, over all of them
_LOOKED_AT = 32  # simulations on which directions are compared
_DIRECTIONS = 8
_FARTHEST = 32.0  # posterior standard deviations
_BY_SIMULATION = ("squares", "along", "spread", "inward", "deviations")
_WHERE = "the bias in one direction, the width in all, of the posteriors at hand"


class Balls(NamedTuple):
    """Draws seen from their references, for errors to be planted in.

    Attributes:
        squares: squared distances of the draws from the reference (S, L).
        along: offsets of the draws from it along some coordinates (S, L, A).
        spread: posterior standard deviations of these (S, A).
        inward: products of the offsets with the deviations from the posterior mean (S, L).
        deviations: squared deviations from the posterior mean (S, L).
        members: numbers of the draws that take the place of the true value (T,).
        dims: number of coordinates.
    """

    squares: Float[np.ndarray, "S L"]
    along: Float[np.ndarray, "S L A"]
    spread: Float[np.ndarray, "S A"]
    inward: Float[np.ndarray, "S L"]
    deviations: Float[np.ndarray, "S L"]
    members: Int[np.ndarray, " T"]
    dims: int


def some_of(simulations: Int[np.ndarray, " S"]) -> Int[np.ndarray, " some"]:
    """Return the simulations that are looked at, evenly chosen."""
    number = min(len(simulations), _SIMULATIONS)
    return simulations[np.linspace(0, len(simulations) - 1, number).astype(int)] if number else simulations


def balls(
    draws: Shaped[Any, "S L D"],
    theta: Shaped[Any, "S D"],
    points: Float[np.ndarray, "S D"],
    matrix: Shaped[Any, "D D"],
) -> Balls | None:
    """Prepare draws, true values and references, all finite; None if there are no simulations.

    Args:
        draws: posterior draws.
        theta: true values.
        points: references, in whitened coordinates.
        matrix: from a value to its whitened coordinates.
    """
    if not len(theta):
        return None
    draws, theta = (np.asarray(each @ matrix.T, float) for each in (draws, theta))
    middle, spread = draws.mean(axis=1), draws.std(axis=1)
    scale = np.where(spread > 0, spread, np.inf)
    centres = middle - np.mean((middle - theta) / scale, axis=0) * spread
    apart = (centres - points) / scale
    # The true values know the centres to one standard deviation over √S: an offset common to all that is not far above
    # that is taken to be that large, on the side where it hides a bias (both signs of a bias are tried).
    error = np.sqrt((1 + np.var(apart, axis=0)) / len(apart))
    common = np.mean(apart, axis=0)
    centres = centres - np.where(np.abs(common) < 4 * error, common - error, 0.0) * spread
    around = draws - middle[:, None]
    offsets = around + (centres - points)[:, None]
    dims = draws.shape[2]
    axes = np.unique(np.linspace(0, dims - 1, min(dims, _DIRECTIONS)).astype(int))
    number = min(draws.shape[1], max(_MEMBERS // len(draws), 1))
    return Balls(
        np.sum(offsets**2, axis=2),
        offsets[:, :, axes],
        spread[:, axes],
        np.sum(offsets * around, axis=2),
        np.sum(around**2, axis=2),
        np.linspace(0, draws.shape[1] - 1, number).astype(int),
        dims,
    )


def detectable_in_balls(
    seen: Balls | None, num_samples: int, level: float, *, power: float = 0.9
) -> tuple[Detectable, int | None]:
    """Return the smallest errors that the ranks of distances find, and if too large, how many simulations are enough.

    The bias is that in the direction, and with the sign, in which it is hardest to see: of eight whitened coordinates
    at most. Enough is one standard deviation in every coordinate at once, √D in one direction.

    Args:
        seen: from ``balls``.
        num_samples: number S of simulations.
        level: probability of a false alarm.
        power: probability of finding each error.

    Raises:
        ValueError: as ``ecdf_band``.
    """
    assert seen is not None, "there is nothing to see without simulations"
    num_cells = seen.squares.shape[1] + 1
    largest = LARGEST["bias"] * seen.dims**0.5

    def found(cumulative: np.ndarray, num: int = num_samples) -> bool:
        return leaving_probability(num, num_cells, level, cumulative) >= power

    def bias(size: float) -> np.ndarray:
        return _least_visible_bias(seen, size)

    def width(factor: float) -> np.ndarray:
        return _cumulative(seen, scale=factor)

    errors = Detectable(
        smallest(lambda size: found(bias(size)), _FARTHEST),
        float(np.exp(-smallest(lambda size: found(width(np.exp(-size))), 8.0))),
        float(np.exp(smallest(lambda size: found(width(np.exp(size))), 8.0))),
        power,
        level,
        _WHERE,
        largest,
    )
    if errors.enough:
        return errors, None
    needed = [bias(largest), width(LARGEST["too_narrow"]), width(LARGEST["too_wide"])]
    return errors, fewest(lambda num: all(found(cumulative, num) for cumulative in needed))


def _least_visible_bias(seen: Balls, size: float) -> np.ndarray:
    """The law of ranks under a bias in the direction in which it strays least from uniform."""
    num_cells = seen.squares.shape[1] + 1
    uniform = ecdf_band(1, num_cells).edges / num_cells
    step = -(-len(seen.squares) // _LOOKED_AT)
    few = seen._replace(**{name: getattr(seen, name)[::step] for name in _BY_SIMULATION})

    def visible(which: tuple[float, int]) -> float:
        return float(np.max(np.abs(_cumulative(few, bias=which[0], axis=which[1]) - uniform)))

    least = min(itertools.product((-size, size), range(seen.spread.shape[1])), key=visible)
    return _cumulative(seen, bias=least[0], axis=least[1])


def _cumulative(seen: Balls, *, bias: float = 0.0, axis: int = 0, scale: float = 1.0) -> np.ndarray:
    """P(rank < m) at the edges m if the draws are biased along an axis, or their widths are wrong by a factor."""
    step = bias * seen.spread[:, None, axis]
    moved = seen.squares + 2 * step * seen.along[:, :, axis] + step**2
    if scale != 1:
        moved = seen.squares + 2 * (scale - 1) * seen.inward + (scale - 1) ** 2 * seen.deviations
    num_cells = seen.squares.shape[1] + 1
    edges = ecdf_band(1, num_cells).edges
    # Paired with the draws as they are, among which the ranks of members are uniform.
    return edges / num_cells + (_below(seen, moved) - _below(seen, seen.squares))[edges - 1]


def _below(seen: Balls, moved: np.ndarray) -> np.ndarray:
    """Distribution function of the ranks of members among the others, moved to these squared distances (L + 1,)."""
    others = moved.shape[1] - 1
    own = seen.squares[:, seen.members]
    ranks = np.stack([row.searchsorted(one) for row, one in zip(np.sort(moved, axis=1), own, strict=True)])
    ranks -= moved[:, seen.members] < own  # the member itself is none of the others
    counts = np.bincount(ranks.ravel(), minlength=others + 1) / ranks.size
    # Among one draw more a rank k becomes k + 1 with probability (k + 1)/(others + 2): uniform ranks stay uniform.
    up = counts * np.arange(1, others + 2) / (others + 2)
    return np.cumsum(np.append(counts - up, 0.0) + np.append(0.0, up))
