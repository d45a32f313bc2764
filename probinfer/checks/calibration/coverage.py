r"""Coverage of balls around random points: a check of joint posteriors that needs no density.

The test quantity is the distance to a reference point, :math:`f(\theta, x) = \lVert W(\theta - \theta_r(x))\rVert`;
the rank of the true value's distance among those of the draws is uniform if the posterior is right. The expected
coverage curve is the distribution function of these ranks, at their own L + 1 values, so there is nothing to bin, and
its band is that of any rank check. A curve for references that ignore the data is right for every
posterior that averages to the prior, the prior itself among them; a claim of accuracy needs references that depend
on the data.

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
from probinfer.checks.calibration.thinning import LOOKED_AT, needed_thinning
from probinfer.checks.calibration.whitening import columns, each_simulation
from probinfer.checks.power.coverage import balls, detectable_in_balls, some_of
from probinfer.core.errors import check_key
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, PRNGKey
from probinfer.plots.ranks import axes_or_new, draw_band

__all__ = ["TARPReport", "tarp"]

_X_FREE = (
    "no claim of accuracy: the references do not depend on the data, so a posterior that ignores the data (the prior "
    "itself) passes too; leave reference=None, or pass a reference(key, x) that uses x"
)
_UNINFORMED = (
    "no claim of accuracy: the regression found nothing about theta in x, so its references hardly depend on the "
    "data, and a posterior that ignores the data passes too; pass a reference(key, x) that knows more of the model"
)


@dataclass(frozen=True)
class TARPReport:
    """Coverage of balls around the references.

    Attributes:
        uniform: the test of the ranks: p-value, band, what it could have found.
        references: the reference points and what is known of them.
    """

    uniform: UniformityReport
    references: References

    @property
    def ranks(self) -> np.ndarray:
        """Number of draws nearer to the reference than the true value (S,); -1 where the simulation failed."""
        return self.uniform.ranks.ranks[:, 0]

    @property
    def pvalue(self) -> float:
        """Probability of a curve that strays as far, or further, if the posterior is right; NaN if none was ranked."""
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
        good = np.sort(self.ranks[self.ranks >= 0])
        below = np.searchsorted(good, self.band.edges, side="left") / max(len(good), 1)
        return np.concatenate([[0.0], below, [1.0]])

    @property
    def passed(self) -> bool | None:
        """True, False, or None where nothing may be claimed."""
        return self.uniform.passed if self.references.uses_data or self.uniform.rejected else None

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        words = self.uniform.verdict
        if self.uniform.rejected:
            good = self.ranks[self.ranks >= 0] / self.uniform.ranks.num_draws
            return f"{words}; {_direction(float(np.mean(good)), float(np.std(good)))}"
        if self.references.uses_data:
            return words
        return f"cannot tell: {_UNINFORMED if self.references.explained is not None else _X_FREE} ({words})"

    def bootstrap(self, key: PRNGKey, num: int = 1000) -> Float[np.ndarray, "num K"]:
        """Return coverage curves of resampled simulations; only ranks are resampled, no distance is computed again.

        Args:
            key: random key.
            num: number of curves.

        Raises:
            TypeError: ``key`` is not a key.
            ValueError: no curves are asked for, or no simulation was ranked.
        """
        check_key(key)
        good = self.ranks[self.ranks >= 0]
        if num < 1 or not len(good):
            raise ValueError(f"a bootstrap needs ranks and num >= 1; got {len(good)} ranks and num = {num}")
        cells = np.searchsorted(self.band.edges, good, side="right")
        return _bootstrap(generator(key), cells, num, len(self.band.edges) + 1) / len(good)

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
        draws: posterior draws, leaves (S, L, ...); autocorrelated ones are thinned.
        theta: true values, leaves (S, ...).
        x: data, leaves (S, ...); None allows no claim of accuracy.
        reference: ``(key, x)`` -> a point like one ``theta``, in its own coordinates. None: what a regression of
            theta on x predicts, fitted to other simulations.
        whiten: coordinates of the distance: "pooled" posterior covariance, "prior" scales or None.
        level: probability of a false alarm.

    Returns:
        The report. A curve that does not leave its band is a pass only if the references depend on the data, and if a
        bias of one standard deviation in every coordinate at once and widths wrong by a factor of two would have been
        found with probability 0.9. A bias in one direction of many changes distances little: the verdict says how
        large it must be; ranks of parameters and projections (``sbc``) see smaller ones.

    Raises:
        TypeError: ``key`` is not a key, or ``reference`` is not a function.
        ValueError: trees or leading axes differ, ``reference`` returns another structure or shape, or an unknown
            ``whiten``.

    References:
        Lemos et al. (2023), algorithm 2.
    """
    check_key(key)
    check_shapes(draws, theta, x, 2)
    key_reference, key_ties = jax.random.split(key)
    points, matrix = reference_points(key_reference, draws, theta, x, reference, whiten)
    flat, true = columns(draws, 2), columns(theta, 1)
    true = true.astype(flat.dtype)
    arrays = (flat, true, jnp.asarray(points.points, flat.dtype))
    thin = needed_thinning(_distances(matrix, *(array[:LOOKED_AT] for array in arrays))[:, None, :, None])
    ranks, ties, finite = jax.device_get(_ranks(key_ties, matrix, *arrays, thin))
    table = _table(ranks, ties, finite, np.asarray(true), flat.shape[1] // thin, points, thin)
    good = np.flatnonzero(table.ranks[:, 0] >= 0)
    some = some_of(good)
    seen = balls(flat[some, thin - 1 :: thin], true[some], points.points[some], matrix)
    return TARPReport(judge(table, level, partial(detectable_in_balls, seen)), points)


@jax.jit
def _distances(
    matrix: Float[Array, "D D"],
    draws: Float[Array, "S L D"],
    theta: Float[Array, "S D"],
    points: Float[Array, "S D"],
) -> Float[Array, "S L"]:
    """Squared distances of the draws."""
    return each_simulation(partial(_squares, matrix), draws, theta, points)[:, 1:]


def _squares(matrix: Array, draws: Array, theta: Array, point: Array) -> Array:
    """Squared distances of the true value and the draws of one simulation (1 + L,)."""
    both = jnp.concatenate([theta[None], draws])
    return jnp.sum(jnp.square(matrix @ both.T - point[:, None]), axis=0)  # long rows are multiplied faster


@partial(jax.jit, static_argnames="thin")
def _ranks(
    key: PRNGKey,
    matrix: Float[Array, "D D"],
    draws: Float[Array, "S L D"],
    theta: Float[Array, "S D"],
    points: Float[Array, "S D"],
    thin: int,
) -> tuple[Int[Array, " S"], Int[Array, " S"], Bool[Array, " S"]]:
    """Number of draws nearer than the true value, ties at random; the numbers of ties; whether all draws are finite."""

    def one(some, true, point):
        squares = _squares(matrix, some[thin - 1 :: thin], true, point)
        below, ties = jnp.sum(squares[1:] < squares[0]), jnp.sum(squares[1:] == squares[0])
        return below, ties, jnp.all(jnp.isfinite(some))

    below, ties, finite = each_simulation(one, draws, theta, points)
    return below + jax.random.randint(key, ties.shape, 0, ties + 1), ties, finite


def _table(
    ranks: np.ndarray,
    ties: np.ndarray,
    finite: np.ndarray,
    theta: np.ndarray,
    num_draws: int,
    points: References,
    thin: int,
) -> RankTable:
    bad = {
        "a draw is NaN or infinite": ~finite,
        "the true value is NaN or infinite": ~np.isfinite(theta).all(axis=1),
        "the reference is NaN or infinite": ~np.isfinite(points.points).all(axis=1),
    }
    failed = np.any(list(bad.values()), axis=0)
    constant = bool(np.all((ties == num_draws) | failed) and not failed.all())
    return RankTable(
        np.where(failed, -1, ranks)[:, None],
        ("tarp",),
        num_draws,
        thin,
        tuple((reason, int(rows.sum())) for reason, rows in bad.items() if rows.any()),
        ("tarp",) if constant else (),
        (points.uses_data,),
    )


def _direction(mean: float, spread: float) -> str:
    """What the ranks of distances, divided by L, look like; uniform ones have mean 1/2 and sd 0.29."""
    if mean > 0.53:
        return "the true values lie further from the references than the draws: too narrow, or biased"
    if mean < 0.47:
        return "the true values lie nearer to the references than the draws: too wide, or biased"
    return "too many extreme ranks" if spread > 0.289 else "too few extreme ranks"


def _bootstrap(rng: np.random.Generator, cells: np.ndarray, num: int, num_cells: int) -> np.ndarray:
    """Cumulative numbers of resampled simulations in cells 0, 0 ... 1, up to all cells (num, num_cells + 1)."""
    drawn = cells[rng.integers(len(cells), size=(num, len(cells)), dtype=np.int32)]
    places = drawn + (num_cells + 1) * np.arange(num)[:, None] + 1
    counts = np.bincount(places.ravel(), minlength=num * (num_cells + 1))
    return np.cumsum(counts.reshape(num, num_cells + 1), axis=1)
