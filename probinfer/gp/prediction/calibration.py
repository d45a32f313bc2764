"""Calibration: whether events happen as often as predicted.

``reliability`` is for classes, ``pit`` for outputs of any kind. Both need predictions of held-out outputs: on the
training data every fit looks better than it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtri

from probinfer.core.types import PRNGKey
from probinfer.gp.prediction import BernoulliMixture

__all__ = ["PITReport", "Reliability", "pit", "reliability"]


class Reliability(NamedTuple):
    """Predicted probabilities against observed frequencies, in B bins of about equal numbers of points.

    Attributes:
        probability: mean predicted probability of class 1 in each bin ``(B,)``, ascending.
        frequency: fraction of class 1 in each bin ``(B,)``.
        lower: lower end of the interval of the frequency ``(B,)``.
        upper: upper end ``(B,)``.
        num_points: number of points in each bin ``(B,)``.
        calibration_error: the expected calibration error, the mean over points of |frequency − probability| of their
            bin. It is positive even for perfect probabilities, and grows with the number of bins: compare it with
            ``calibration_error_by_chance``, not with 0.
        calibration_error_by_chance: its mean if the probabilities are the true ones (normal approximation).
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


class PITReport(NamedTuple):
    """Probability integral transforms: uniform on [0, 1] if the predictions are calibrated.

    Attributes:
        values: P(Y_i <= y_i), drawn uniformly from the jump of a discrete output, shape ``(N,)``.
        statistic: the Kolmogorov-Smirnov distance from the uniform distribution.
        pvalue: its p-value for independent values. Predictions from one data set are not independent, so a small
            p-value is a reason to look closer and no proof.
    """

    values: np.ndarray
    statistic: float
    pvalue: float


def reliability(probabilities: Any, labels: Any, num_bins: int = 10, *, level: float = 0.95) -> Reliability:
    """Compare binned predicted probabilities with observed frequencies.

    Bins have about equal numbers of points; equal probabilities are in one bin, so there may be fewer bins.

    Args:
        probabilities: predicted probabilities of class 1 ``(N,)``.
        labels: observed labels ``(N,)``, 0 or 1 (or −1 and 1), of any dtype.
        num_bins: maximum number of bins.
        level: probability content of the intervals (Wilson's, for a binomial proportion).

    Returns:
        The comparison, as NumPy arrays.

    Raises:
        ValueError: shapes differ, there are no points, a probability is outside [0, 1], a label is not 0 or 1,
            ``num_bins`` is not positive or ``level`` is not inside (0, 1).

    References:
        Wilson (1927), the score interval. Bröcker and Smith (2007), on reading such diagrams.
    """
    p, y = _check(probabilities, labels)
    if num_bins < 1 or not 0 < level < 1:
        raise ValueError(f"num_bins must be at least 1 and 0 < level < 1, got {num_bins} and {level}")
    order = np.argsort(p, kind="stable")
    p, y = p[order], y[order]
    starts = _bin_starts(p, num_bins)
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


def pit(predictive: Any, y: Any, key: PRNGKey | None = None) -> PITReport:
    """Probability integral transforms of held-out outputs, and a test of their uniformity.

    Args:
        predictive: a predictive distribution of N points with a ``cdf``, from ``fit.predict_y``.
        y: held-out outputs ``(N,)``.
        key: random key, needed for discrete outputs only: u = F(y − 1) + V (F(y) − F(y − 1)), V uniform.

    Returns:
        The values, and the Kolmogorov-Smirnov test.

    Raises:
        ValueError: the output is discrete and there is no key, or y does not have one entry per point.

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
        raise ValueError(
            f"y must be a vector with one entry per predicted point, got {y.shape}, {upper.shape}"
        )
    values = upper
    if getattr(predictive, "discrete", False):
        if key is None:
            raise ValueError(
                "the outputs are discrete: pass a key, pit(predictive, y, key=jax.random.key(0))"
            )
        below = np.asarray(predictive.cdf(y - 1), float)
        values = below + np.asarray(jax.random.uniform(key, y.shape), float) * (upper - below)
    test = kstest(values, "uniform")
    return PITReport(values=values, statistic=float(test.statistic), pvalue=float(test.pvalue))


def _check(probabilities, labels):
    p, y = np.asarray(probabilities, float), np.asarray(labels, float)
    if p.shape != y.shape or p.ndim != 1 or p.size == 0:
        raise ValueError(
            f"probabilities and labels must be vectors of equal length, got {p.shape} and {y.shape}"
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


def _bin_starts(p, num_bins):
    """First indices of the bins of sorted probabilities, each moved right to the end of a tie."""
    equal_starts = np.arange(1, num_bins) * len(p) // num_bins
    starts = np.searchsorted(p, p[equal_starts - 1], side="right")[equal_starts > 0]
    return np.unique(np.concatenate([[0], starts[starts < len(p)]]))


def _wilson(frequency, count, level):
    z = ndtri(0.5 + 0.5 * level)
    shrink = 1 + z**2 / count
    center = (frequency + 0.5 * z**2 / count) / shrink
    half = z / shrink * np.sqrt(frequency * (1 - frequency) / count + 0.25 * z**2 / count**2)
    return np.maximum(center - half, 0.0), np.minimum(center + half, 1.0)
