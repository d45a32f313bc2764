r"""Coverage of balls around random points: a check of joint posteriors that needs no density.

The test quantity is the distance to a reference point, :math:`f(\theta, x) = \lVert W(\theta - \theta_r(x))\rVert`;
the rank of the true value's distance among those of the draws is uniform if the posterior is right. The expected
coverage curve is the distribution function of these ranks at their L + 1 values, so it needs no bins, and its band is
that of any rank check. If the references ignore the data, the curve is right for every posterior that averages to the
prior, including the prior itself; a claim of accuracy needs references that depend on the data.

References:
    Lemos, Coogan, Hezaveh and Perreault-Levasseur (2023), "Sampling-based accuracy testing of posterior estimators
    for general inference", algorithm 2 and theorem 3 (references that depend on the data).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.checks.calibration.ball_centers import reference_points
from probinfer.checks.calibration.bands import Band
from probinfer.checks.calibration.rank_uniformity import UniformityReport, judge
from probinfer.checks.calibration.ranks import RankTable, check_shapes
from probinfer.checks.calibration.references import References, generator
from probinfer.checks.calibration.thinning import MAX_SIMULATIONS, needed_thinning
from probinfer.checks.calibration.whitening import columns, each_simulation
from probinfer.checks.power.coverage import detectable_in_balls, prepare_balls, select_simulations
from probinfer.core.arguments import check_key
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, PRNGKey
from probinfer.plots.ranks import axes_or_new, draw_band

__all__ = ["TARPReport", "tarp"]

_IGNORES_DATA = (
    "no claim of accuracy: the references do not depend on the data, so a posterior that ignores the data (such as "
    "the prior) passes too; leave reference=None, or pass a reference(key, x) that uses x"
)
_UNINFORMED = (
    "no claim of accuracy: the regression found no information about theta in x, so its references hardly depend on "
    "the data, and a posterior that ignores the data passes too; pass a reference(key, x) that uses the model"
)


@dataclass(frozen=True)
class TARPReport:
    """Coverage of balls around the references.

    Attributes:
        uniform: test of the ranks: p-value, band, detectable errors.
        references: reference points, and whether they depend on the data.
    """

    uniform: UniformityReport
    references: References

    @property
    def ranks(self) -> np.ndarray:
        """Number of draws closer to the reference than the true value (S,); -1 where the simulation failed."""
        return self.uniform.ranks.ranks[:, 0]

    @property
    def pvalue(self) -> float:
        """Probability of a curve at least as far from the diagonal if the posterior is right; NaN without ranks."""
        return self.uniform.pvalues.get("tarp", float("nan"))

    @property
    def band(self) -> Band:
        """Simultaneous band of the curve."""
        return self.uniform.bands

    @cached_property
    def credibility(self) -> np.ndarray:
        """Credibility levels alpha of the curve (K,), from 0 to 1."""
        return np.concatenate([[0.0], self.band.points, [1.0]])

    @cached_property
    def coverage(self) -> np.ndarray:
        """Expected coverage (K,): share of true values inside the ball of each credibility."""
        ranks = np.sort(self._valid_ranks)
        below = np.searchsorted(ranks, self.band.edges, side="left") / max(len(ranks), 1)
        return np.concatenate([[0.0], below, [1.0]])

    @property
    def _valid_ranks(self) -> np.ndarray:
        return self.ranks[self.ranks >= 0]

    @property
    def passed(self) -> bool | None:
        """True, False, or None if the check cannot tell."""
        return self.uniform.passed if self.references.uses_data or self.uniform.rejected else None

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        verdict = self.uniform.verdict
        if self.uniform.rejected:
            levels = self._valid_ranks / self.uniform.ranks.num_draws
            return f"{verdict}; {_direction(float(np.mean(levels)), float(np.std(levels)))}"
        if self.references.uses_data:
            return verdict
        return f"cannot tell: {_UNINFORMED if self.references.explained is not None else _IGNORES_DATA} ({verdict})"

    def bootstrap(self, key: PRNGKey, num: int = 1000) -> Float[np.ndarray, "num K"]:
        """Return coverage curves of resampled simulations; only the ranks are resampled.

        Args:
            key: random key.
            num: number of curves.

        Raises:
            TypeError: ``key`` is not a key.
            ValueError: ``num`` is below 1, or no simulation was ranked.
        """
        check_key(key)
        ranks = self._valid_ranks
        if num < 1 or not len(ranks):
            raise ValueError(f"a bootstrap needs ranks and num >= 1; got {len(ranks)} ranks and num = {num}")
        cells = np.searchsorted(self.band.edges, ranks, side="right")
        return _bootstrap(generator(key), cells, num, len(self.band.edges) + 1) / len(ranks)

    def plot(self, axes: Any = None) -> Any:
        """Draw coverage minus credibility, with the band.

        Args:
            axes: matplotlib axes; None: those of a new figure.

        Returns:
            The axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        axes = axes_or_new(axes)
        draw_band(axes, self.band)
        axes.plot(self.credibility, self.coverage - self.credibility, linewidth=1.4, label="TARP")
        axes.set_xlabel("credibility")
        axes.set_ylabel("coverage - credibility")
        axes.legend(frameon=False, fontsize="small", loc="upper right")
        return axes

    def __str__(self) -> str:
        return self.verdict


def tarp(
    key: PRNGKey,
    draws: ArrayTree,
    theta: ArrayTree,
    x: ArrayTree,
    *,
    reference: Any = None,
    whiten: str | None = "pooled",
    level: float = 0.05,
) -> TARPReport:
    """Test the coverage of balls around reference points by the ranks of distances.

    Args:
        key: random key (references, ties).
        draws: posterior draws, leaves (S, L, ...); autocorrelated draws are thinned.
        theta: true values, leaves (S, ...).
        x: data, leaves (S, ...); None allows no claim of accuracy.
        reference: ``(key, x)`` -> a point with the structure and coordinates of one ``theta``. None: the prediction of
            a regression of theta on x, fitted to other simulations.
        whiten: coordinates of the distance: "pooled" posterior covariance, "prior" scales or None.
        level: probability of a false alarm.

    Returns:
        The report. A curve inside its band is a pass only if the references depend on the data, and if a bias of one
        standard deviation in every coordinate at once and widths wrong by a factor of two would have been detected with
        probability 0.9. A bias in one of many directions changes distances little: the verdict reports how large it
        must be; ranks of parameters and projections (``sbc``) detect smaller biases.

    Raises:
        TypeError: ``key`` is not a key, or ``reference`` is not a function.
        ValueError: trees or leading axes differ, ``reference`` returns a wrong structure or shape, or ``whiten`` is
            unknown.

    References:
        Lemos et al. (2023), algorithm 2.
    """
    check_key(key)
    check_shapes(draws, theta, x, 2)
    key_reference, key_ties = jax.random.split(key)
    references, matrix = reference_points(key_reference, draws, theta, x, reference, whiten)
    flat, true = columns(draws, 2), columns(theta, 1)
    true = true.astype(flat.dtype)
    # Rank the distances, after thinning by their autocorrelation
    arrays = (flat, true, jnp.asarray(references.points, flat.dtype))
    distances = _distances(matrix, *(array[:MAX_SIMULATIONS] for array in arrays))
    thin = needed_thinning(distances[:, None, :, None])
    ranks, ties, finite = jax.device_get(_ranks(key_ties, matrix, *arrays, thin))
    table = _table(ranks, ties, finite, np.asarray(true), flat.shape[1] // thin, references, thin)
    # Judge, with the power computed on some of the valid simulations
    valid = np.flatnonzero(table.ranks[:, 0] >= 0)
    subset = select_simulations(valid)
    balls = prepare_balls(flat[subset, thin - 1 :: thin], true[subset], references.points[subset], matrix)
    return TARPReport(judge(table, level, partial(detectable_in_balls, balls)), references)


@jax.jit
def _distances(
    matrix: Float[Array, "D D"],
    draws: Float[Array, "S L D"],
    true_values: Float[Array, "S D"],
    points: Float[Array, "S D"],
) -> Float[Array, "S L"]:
    """Compute the squared distances of the draws."""
    return each_simulation(partial(_squared_distances, matrix), draws, true_values, points)[:, 1:]


def _squared_distances(matrix: Array, draws: Array, true: Array, point: Array) -> Array:
    """Compute the squared distances of the true value and the draws of one simulation (1 + L,)."""
    values = jnp.concatenate([true[None], draws])
    # As (D, 1 + L): the product is faster with long rows.
    return jnp.sum(jnp.square(matrix @ values.T - point[:, None]), axis=0)


@partial(jax.jit, static_argnames="thin")
def _ranks(
    key: PRNGKey,
    matrix: Float[Array, "D D"],
    draws: Float[Array, "S L D"],
    true_values: Float[Array, "S D"],
    points: Float[Array, "S D"],
    thin: int,
) -> tuple[Int[Array, " S"], Int[Array, " S"], Bool[Array, " S"]]:
    """Rank the distances, with ties broken at random; return ranks, numbers of ties, and whether draws are finite."""

    def rank_one(one_draws, true, point):
        squares = _squared_distances(matrix, one_draws[thin - 1 :: thin], true, point)
        below, ties = jnp.sum(squares[1:] < squares[0]), jnp.sum(squares[1:] == squares[0])
        return below, ties, jnp.all(jnp.isfinite(one_draws))

    below, ties, finite = each_simulation(rank_one, draws, true_values, points)
    return below + jax.random.randint(key, ties.shape, 0, ties + 1), ties, finite


def _table(
    ranks: np.ndarray,
    ties: np.ndarray,
    finite: np.ndarray,
    true_values: np.ndarray,
    num_draws: int,
    references: References,
    thin: int,
) -> RankTable:
    failures = {
        "a draw is NaN or infinite": ~finite,
        "the true value is NaN or infinite": ~np.isfinite(true_values).all(axis=1),
        "the reference is NaN or infinite": ~np.isfinite(references.points).all(axis=1),
    }
    failed = np.any(list(failures.values()), axis=0)
    constant = bool(np.all((ties == num_draws) | failed) and not failed.all())
    return RankTable(
        ranks=np.where(failed, -1, ranks)[:, None],
        names=("tarp",),
        num_draws=num_draws,
        thin=thin,
        failures=tuple((reason, int(rows.sum())) for reason, rows in failures.items() if rows.any()),
        constant=("tarp",) if constant else (),
        uses_data=(references.uses_data,),
    )


def _direction(mean: float, deviation: float) -> str:
    """Describe the error that ranks of distances, divided by L, show; uniform ranks have mean 1/2 and sd 0.29."""
    if mean > 0.53:
        return "the true values lie further from the references than the draws: too narrow, or biased"
    if mean < 0.47:
        return "the true values lie closer to the references than the draws: too wide, or biased"
    return "too many extreme ranks" if deviation > 0.289 else "too few extreme ranks"


def _bootstrap(rng: np.random.Generator, cells: np.ndarray, num: int, num_cells: int) -> np.ndarray:
    """Return cumulative numbers of resampled simulations in the first 0 ... num_cells cells (num, num_cells + 1)."""
    resampled = cells[rng.integers(len(cells), size=(num, len(cells)), dtype=np.int32)]
    # One bincount for all rows: each row has its own range of bins.
    bins = resampled + (num_cells + 1) * np.arange(num)[:, None] + 1
    counts = np.bincount(bins.ravel(), minlength=num * (num_cells + 1))
    return np.cumsum(counts.reshape(num, num_cells + 1), axis=1)
