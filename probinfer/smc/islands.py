"""Independent populations that share a frozen schedule: the mean of their evidences and its error."""

from __future__ import annotations

import numpy as np
from scipy import special, stats

__all__ = ["interval", "log_mean", "log_mean_error", "shares"]


def log_mean(log_evidences: np.ndarray) -> float:
    """Return the log of the mean evidence.

    Args:
        log_evidences: (R,).
    """
    return float(special.logsumexp(log_evidences) - np.log(len(log_evidences)))


def log_mean_error(log_evidences: np.ndarray) -> float:
    """Return the standard error of the log of the mean, by the delta method; NaN where all are dead, or of one.

    Args:
        log_evidences: (R,).
    """
    if not np.any(np.isfinite(log_evidences)) or len(log_evidences) == 1:
        return float("nan")
    relative = np.exp(log_evidences - log_mean(log_evidences))
    return float(np.std(relative, ddof=1) / np.sqrt(len(relative)))


def shares(log_evidences: np.ndarray) -> float:
    """Return how many islands carry the evidence: the effective sample size of their evidences, 1 to R.

    Args:
        log_evidences: (R,).
    """
    return float(np.exp(2 * special.logsumexp(log_evidences) - special.logsumexp(2 * log_evidences)))


def interval(log_evidences: np.ndarray, level: float) -> tuple[float, float]:
    r"""Return an interval for the log evidence: both readings of the islands, from the lower to the upper end.

    The first is Student's t with R - 1 degrees of freedom around the log of the mean. Evidences of particle methods
    are nearly lognormal, and where their logs spread by more than a half the mean of a few is mostly too low and its
    error too small. So the second reads them as lognormal: the log of the mean is :math:`m + s^2/2`, its variance
    :math:`s^2/R + s^4/(2(R-1))`. Where the spread is small they are the same. One island has no interval: NaN.

    Args:
        log_evidences: (R,).
        level: of the interval.

    References:
        Bérard, Del Moral and Doucet (2014), "A lognormal central limit theorem for particle approximations of
        normalizing constants"; Zhou and Gao (1997), Cox's method for the mean of a lognormal, equation 6.
    """
    num = len(log_evidences)
    if num == 1:
        return float("nan"), float("nan")
    quantile = float(stats.t.ppf((1 + level) / 2, num - 1))
    middle, half = log_mean(log_evidences), quantile * log_mean_error(log_evidences)
    if not np.all(np.isfinite(log_evidences)):  # an island died
        return middle - half, middle + half
    variance = float(np.var(log_evidences, ddof=1))
    centre = float(np.mean(log_evidences)) + variance / 2
    width = quantile * float(np.sqrt(variance / num + variance**2 / (2 * (num - 1))))
    return min(middle - half, centre - width), max(middle + half, centre + width)
