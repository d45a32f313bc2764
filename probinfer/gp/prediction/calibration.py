"""Calibration: do predicted probabilities happen as often as they say?

``reliability`` for classes, ``pit`` for outputs of any kind. Both take predictions of held-out outputs; on the training
data every fit looks better than it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtri

from probinfer.core.types import PRNGKey
from probinfer.gp.prediction import BernoulliMixture

__all__ = ["Pit", "Reliability", "pit", "reliability"]


class Reliability(NamedTuple):
    """Predicted probabilities against observed frequencies, in B bins of about equal numbers of points.

    Attributes:
        probability: mean predicted probability of class 1 in each bin ``(B,)``, ascending.
        frequency: fraction of class 1 in each bin ``(B,)``.
        lower: lower end of the interval of the frequency ``(B,)``.
        upper: upper end ``(B,)``.
        num_points: number of points in each bin ``(B,)``.
        calibration_error: the expected calibration error, the mean over points of |frequency − probability| of their
            bin. It is positive even where the probabilities are perfect, and grows with the number of bins: compare
            it with ``calibration_error_by_chance``, not with 0.
        calibration_error_by_chance: its mean if the probabilities were the true ones (normal approximation).
        log_loss: mean of −log of the probability of the label.
        brier: mean of (probability − label)².
    """

    probability: np.ndarray
    frequency: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    num_points: np.ndarray
    calibration_error: float
    calibration_error_by_chance: float
    log_loss: float
    brier: float


class Pit(NamedTuple):
    """Probability integral transforms: uniform on [0, 1] where the predictions are calibrated.

    Attributes:
        values: P(Y_i <= y_i), spread at random over the jump of a discrete output, shape ``(N,)``.
        statistic: the Kolmogorov-Smirnov distance from the uniform distribution.
        pvalue: its p-value for independent values; predictions from one data set share its accidents, so read a small
            one as a question, not as a verdict.
    """

    values: np.ndarray
    statistic: float
    pvalue: float


def reliability(probabilities: Any, labels: Any, num_bins: int = 10, *, level: float = 0.95) -> Reliability:
    """Bin predicted probabilities and compare them with what happened.

    Bins hold about equal numbers of points; equal probabilities are never parted, so there may be fewer bins.

    Args:
        probabilities: predicted probabilities of class 1 ``(N,)``.
        labels: what happened ``(N,)``, 0 or 1 (or −1 and 1), of any dtype.
        num_bins: the most bins.
        level: probability content of the intervals (Wilson's, for a binomial proportion).

    Returns:
        The comparison, as NumPy arrays.

    Raises:
        ValueError: shapes differ, there are no points, a probability is outside [0, 1], a label is not 0 or 1,
            ``num_bins`` is not positive or ``level`` is not inside (0, 1).

    References:
        Wilson (1927), the score interval. Bröcker and Smith (2007), on the reading of such diagrams.
    """
    p, y = _check(probabilities, labels)
    if num_bins < 1 or not 0 < level < 1:
        raise ValueError(f"num_bins must be at least 1 and 0 < level < 1, got {num_bins} and {level}")
    order = np.argsort(p, kind="stable")
    p, y = p[order], y[order]
    starts = _starts(p, num_bins)
    count = np.diff(np.append(starts, len(p)))
    probability, frequency, noise = (np.add.reduceat(a, starts) / count for a in (p, y, p * (1 - p)))
    lower, upper = _wilson(frequency, count, level)
    with np.errstate(divide="ignore"):
        log_loss = -np.where(y == 1, np.log(p), np.log1p(-p)).mean()
    return Reliability(
        probability=probability,
        frequency=frequency,
        lower=lower,
        upper=upper,
        num_points=count,
        calibration_error=float(count @ np.abs(frequency - probability) / len(p)),
        # E|N(0, s²)| = s √(2/π), s² = mean of p (1 − p) over the count
        calibration_error_by_chance=float(count @ np.sqrt(2 / np.pi * noise / count) / len(p)),
        log_loss=float(log_loss),
        brier=float(np.mean((p - y) ** 2)),
    )


def pit(predictive: Any, y: Any, key: PRNGKey | None = None) -> Pit:
    """Probability integral transforms of held-out outputs, and a test of their uniformity.

    Args:
        predictive: a predictive distribution of N points with a ``cdf``, from ``fit.predict_y``.
        y: the outputs ``(N,)``, not used in the fit.
        key: random key, for discrete outputs only: u = F(y − 1) + V (F(y) − F(y − 1)), V uniform.

    Returns:
        The values, and the Kolmogorov-Smirnov test.

    Raises:
        ValueError: the output is discrete and there is no key, or y has not one entry a point.

    References:
        Czado, Gneiting and Held (2009), Predictive model assessment for count data, section 2.1.
    """
    from scipy.stats import kstest

    y = jnp.asarray(y)
    y = y if jnp.issubdtype(y.dtype, jnp.floating) else y.astype(float)
    if isinstance(predictive, BernoulliMixture):
        y = jnp.where(y == -1, 0, y)  # another name of class 0
    upper = np.asarray(predictive.cdf(y), float)
    if upper.shape != y.shape or y.ndim != 1:
        raise ValueError(f"y must be a vector with one entry a predicted point, got {y.shape}, {upper.shape}")
    values = upper
    if getattr(predictive, "discrete", False):
        if key is None:
            raise ValueError(
                "the outputs are discrete: pass a key, pit(predictive, y, key=jax.random.key(0))"
            )
        below = np.asarray(predictive.cdf(y - 1), float)
        values = below + np.asarray(jax.random.uniform(key, y.shape), float) * (upper - below)
    test = kstest(values, "uniform")
    return Pit(values, float(test.statistic), float(test.pvalue))


def _check(probabilities, labels):
    p, y = np.asarray(probabilities, float), np.asarray(labels, float)
    if p.shape != y.shape or p.ndim != 1 or p.size == 0:
        raise ValueError(
            f"probabilities and labels must be vectors of one length, got {p.shape} and {y.shape}"
        )
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(
            "probabilities must be within [0, 1]; pass predictive.probability, not a log or a latent mean"
        )
    if np.isin(y, (-1, 1)).all():
        y = (y + 1) / 2
    if not np.isin(y, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    return p, y


def _starts(p, num_bins):
    """Where the bins of sorted probabilities start, each moved right to the end of its tie."""
    wanted = np.arange(1, num_bins) * len(p) // num_bins
    moved = np.searchsorted(p, p[wanted - 1], side="right")[wanted > 0]
    return np.unique(np.concatenate([[0], moved[moved < len(p)]]))


def _wilson(frequency, count, level):
    z = ndtri(0.5 + 0.5 * level)
    shrink = 1 + z**2 / count
    center = (frequency + 0.5 * z**2 / count) / shrink
    half = z / shrink * np.sqrt(frequency * (1 - frequency) / count + 0.25 * z**2 / count**2)
    return np.maximum(center - half, 0.0), np.minimum(center + half, 1.0)
