"""Kernel Stein discrepancy: do draws fit a log density, with no other draws to compare them with?"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.checks.discrepancy.permutation import critical_value, pvalue
from probinfer.checks.draws import FlatDraws, collect, correlation_time, gradients
from probinfer.checks.power.distances import MAX_ROWS, detectable_of_scores
from probinfer.checks.power.ranks import Detectable
from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.kernels import InverseMultiquadric
from probinfer.numerics.stein import stein_gram, stein_sums
from probinfer.plots.ranks import draw_null

__all__ = ["KSDReport", "ksd", "wild_signs"]

_SIGN_CORRELATION_TIMES = (
    8  # length of runs of one sign; the variance of the bootstrap is too low by 1/(1 + 8)
)
_MIN_SIGN_CHANGES = 20  # over all draws; with fewer, the bootstrap is unreliable
_UNDETECTED = "It does not detect wrong weights of well-separated modes, nor modes that no draw visits"


@dataclasses.dataclass(frozen=True)
class KSDReport:
    """Squared discrepancies at several scales, and one test of their sum.

    Attributes:
        scales: ``(S,)`` lengthscales of the kernels, in units of the whitened draws.
        u_statistics: ``(S,)`` unbiased squared discrepancies; may be negative.
        v_statistics: ``(S,)`` squared discrepancies of the draws as a point set; not negative.
        statistic: sum of the V-statistics, which is tested.
        pvalue: p-value of the wild bootstrap; None without a key.
        null: ``(num_bootstrap,)`` statistics under random signs.
        contributions: ``(n,)`` mean of the Stein kernels between a draw and the others; large where draws misfit.
        flip: probability that the sign changes from one draw to the next.
        level: significance level of the verdict.
        yardstick: function of the report that computes ``power``.
    """

    scales: Float[np.ndarray, " S"]
    u_statistics: Float[np.ndarray, " S"]
    v_statistics: Float[np.ndarray, " S"]
    statistic: float
    pvalue: float | None
    null: Float[np.ndarray, " m"]
    contributions: Float[np.ndarray, " n"]
    flip: float
    level: float
    yardstick: Callable[[KSDReport], Detectable | None] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    @property
    def detectable(self) -> float | None:
        """Critical value: a larger statistic counts as a misfit at the level."""
        return critical_value(self.null, self.level)

    @functools.cached_property
    def power(self) -> Detectable | None:
        """Errors of the draws that are detected with probability 0.9; None without a p-value."""
        return None if self.yardstick is None or not len(self.null) else self.yardstick(self)

    @property
    def passed(self) -> bool | None:
        """True if no misfit was detected, False if one was, None without a p-value."""
        return None if self.pvalue is None else self.pvalue > self.level

    @property
    def verdict(self) -> str:
        """The verdict in one sentence, and the errors that the test cannot detect in another."""
        summary = f"squared KSD = {self.statistic:.3g} from {len(self.contributions)} draws"
        if self.pvalue is None:
            text = f"cannot tell: {summary}, and no p-value; pass key=jax.random.key(...)"
        elif self.pvalue <= self.level:
            text = f"the draws do not fit the density: {summary} (p = {self.pvalue:.2g})"
        else:
            text = f"no misfit seen: {summary} (p = {self.pvalue:.2g}; the critical value is {self.detectable:.3g})"
            text += f"; the check {self.power}" if self.power is not None else ""
        return f"{text}. {_UNDETECTED}."

    def plot(self, axes: Any = None) -> Any:
        """Draw the bootstrap distribution and the statistic; return the axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        axes = draw_null(axes, self.null, self.statistic, null_label="random signs")
        axes.set(xlabel="squared kernel Stein discrepancy", ylabel="bootstraps")
        return axes


def ksd(
    draws: Any,
    logdensity_fn: Any,
    *,
    key: PRNGKey | None = None,
    scales: tuple[float, ...] = (0.5, 1.0, 2.0),
    whiten: Any = "covariance",
    num_bootstrap: int = 499,
    level: float = 0.05,
) -> KSDReport:
    r"""Estimate the kernel Stein discrepancy between draws and a log density, and test it by a wild bootstrap.

    The kernels are inverse multiquadrics :math:`(1 + |z - z'|^2/c^2)^{-1/2}` of whitened draws z with ``c = scale √d``
    (√2 √d is the typical distance between two draws), so the result is the same in all linear coordinates. Time
    O(n² (d + num_bootstrap)), memory O(n (d + num_bootstrap)).

    Args:
        draws: positions: ``(n, d)`` independent, ``(chain, draw, d)``, or a tree with leaves (chain, draw, ...); best
            unconstrained.
        logdensity_fn: position -> scalar, unnormalized; a position has the form of one draw.
        key: random key of the bootstrap; None: no p-value.
        scales: lengthscales of the kernels in units of √d.
        whiten: "covariance" or "diagonal" of the draws, a ``(d, d)`` covariance, or None.
        num_bootstrap: number of sign sequences. Signs are independent for independent draws; along a chain a sign lasts
            eight correlation times on average (with one, as first proposed, the null would be too narrow by half).
        level: significance level of the verdict.

    Returns:
        The U- and V-statistics by scale, the p-value and null distribution, the contribution of each draw, and the
        verdict.

    Raises:
        TypeError: the draws are not floating point, or JAX cannot differentiate the log density.
        ValueError: ``collect`` refuses the draws, gradients are not finite or all zero, the covariance is singular, a
            scale is not positive, there are fewer than 19 bootstraps, or the chains are too short for their
            correlation.

    References:
        Gorham and Mackey (2017), "Measuring sample quality with kernels", section 3.2 (kernel); Chwialkowski,
        Strathmann and Gretton (2016), "A kernel test of goodness of fit", section 2.2 and algorithm 1 (bootstrap).
    """
    if num_bootstrap < 19 or not scales or min(scales) <= 0:
        raise ValueError(
            f"num_bootstrap must be at least 19 and scales positive, got {num_bootstrap} and {scales}"
        )
    flat = collect("draws", draws)
    flip = _flip_probability(flat, required=key is not None)
    points, scores = _whiten(flat, gradients(logdensity_fn, flat), whiten)
    size, dims = points.shape
    lengthscales = jnp.asarray(scales, points.dtype) * math.sqrt(dims)
    kernels = tuple(InverseMultiquadric(1.0, c, 0.5) for c in lengthscales)
    chains, length, _ = flat.values.shape
    signs = None if key is None else wild_signs(key, (chains, length), flip, num_bootstrap)
    # V-statistics and their wild bootstrap; with signs the diagonal does not change
    sums = stein_sums(kernels, points, scores, signs)
    trace = float(jnp.sum(sums.traces))
    statistic = (float(jnp.sum(sums.totals)) + trace) / size**2
    null = (np.asarray(sums.forms) + trace) / size**2
    return KSDReport(
        scales=np.asarray(lengthscales),
        u_statistics=np.asarray(sums.totals) / (size * (size - 1.0)),
        v_statistics=np.asarray(sums.totals + sums.traces) / float(size) ** 2,
        statistic=statistic,
        pvalue=pvalue(statistic, null),
        null=null,
        contributions=np.asarray(sums.row_sums) / (size - 1.0),
        flip=flip,
        level=float(level),
        yardstick=partial(_yardstick, flat, logdensity_fn, whiten, kernels, trace / size**2),
    )


def _yardstick(
    draws: FlatDraws, logdensity_fn: Any, whiten: Any, kernels: tuple, trace: float, report: KSDReport
) -> Detectable | None:
    """Compute the detectable errors by shifting and scaling some draws; None if the density has no gradient there."""

    def values(rows: Array) -> Array:
        changed = draws._replace(values=rows[None])
        return _stein_values(kernels, *_whiten(changed, gradients(logdensity_fn, changed), whiten))

    rows = draws.rows[:: -(-len(draws.rows) // MAX_ROWS)]
    share = 1.0 if draws.independent else min(1.0, _SIGN_CORRELATION_TIMES * report.flip)
    num_independent = len(draws.rows) * share
    critical = float(report.detectable or 0.0) - trace
    try:
        return detectable_of_scores(
            values, rows, num_independent, report.null - trace, critical, report.level
        )
    except ValueError:
        return None


@jax.jit
def _stein_values(kernels: tuple, points: Array, scores: Array) -> Array:
    return jnp.sum(jnp.stack([stein_gram(kernel, points, scores) for kernel in kernels]), axis=0)


def _flip_probability(draws: FlatDraws, *, required: bool) -> float:
    """Return the probability of a change of sign; 0.5 for independent draws. Refuse chains too short for a p-value."""
    if draws.independent:
        return 0.5
    time = correlation_time(draws)
    flip = min(0.5, 1 / (_SIGN_CORRELATION_TIMES * time))
    if required and (size := len(draws.rows)) * flip < _MIN_SIGN_CHANGES:
        raise ValueError(
            f"cannot tell: one draw in {time:.0f} is independent, and {size} draws are too few; a p-value needs "
            f"{math.ceil(_MIN_SIGN_CHANGES / flip)}"
        )
    return flip


def wild_signs(key: PRNGKey, shape: tuple[int, int], flip: float, num: int) -> Int[Array, "n m"]:
    """Return ``num`` sequences of signs along every chain, which change from draw to draw with probability ``flip``.

    Args:
        key: random key.
        shape: (chain, draw).
        flip: probability of a change; 0.5 makes the signs independent.
        num: number of sequences.

    References:
        Leucht and Neumann (2013); Chwialkowski, Strathmann and Gretton (2016), equation 7.
    """
    return _wild_signs(key, jnp.asarray(flip, jnp.float32), shape=tuple(shape), num=num)


@partial(jax.jit, static_argnames=("shape", "num"))
def _wild_signs(key: PRNGKey, flip: Array, *, shape: tuple[int, int], num: int) -> Array:
    probability = jnp.where(jnp.arange(shape[1]) == 0, 0.5, flip)

    def sequence(key):
        changes = jax.random.bernoulli(key, probability, shape).astype(jnp.int32)
        return (1 - 2 * (jnp.cumsum(changes, axis=1) % 2)).astype(jnp.int8).ravel()

    return jax.lax.map(sequence, jax.random.split(key, num)).T


def _whiten(draws: FlatDraws, scores: Array, whiten: Any) -> tuple[Array, Array]:
    """Transform draws and scores to coordinates z = L⁻¹ (x − mean), where the score is Lᵀ s."""
    rows = draws.rows
    centered = rows - jnp.mean(rows, axis=0)
    dims = rows.shape[1]
    if whiten is None:
        return centered, scores
    if isinstance(whiten, str):
        if whiten not in ("covariance", "diagonal"):
            raise ValueError(f"whiten must be 'covariance', 'diagonal', a covariance or None, got {whiten!r}")
        covariance = centered.T @ centered / (len(rows) - 1)
        covariance = covariance if whiten == "covariance" else jnp.diag(jnp.diag(covariance))
    else:
        covariance = jnp.asarray(whiten, rows.dtype)
        if covariance.shape != (dims, dims):
            raise ValueError(f"whiten must be a ({dims}, {dims}) covariance, got shape {covariance.shape}")
    # The factor of the correlation matrix, so that the test of singularity does not depend on units.
    deviation = jnp.sqrt(jnp.diag(covariance))
    chol = jnp.linalg.cholesky(covariance / jnp.outer(deviation, deviation))
    exponent = 1 if len(rows) > dims else 0
    tolerance = 10 * dims * float(jnp.sqrt(jnp.finfo(rows.dtype).eps)) ** exponent
    if not float(jnp.min(jnp.diag(chol))) > tolerance:
        raise ValueError(
            f"the covariance of {dims} coordinates from {len(rows)} draws is singular: use whiten='diagonal', leave "
            "redundant coordinates out, or pass a covariance"
        )
    chol = deviation[:, None] * chol
    return jax.scipy.linalg.solve_triangular(chol, centered.T, lower=True).T, scores @ chol
