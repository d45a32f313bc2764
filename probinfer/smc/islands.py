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
    """Return the standard error of the log of the mean, by the delta method; NaN where all are dead.

    Args:
        log_evidences: (R,).
    """
    if not np.any(np.isfinite(log_evidences)):
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
    """Return an interval for the log evidence: Student's t with R - 1 degrees of freedom.

    Args:
        log_evidences: (R,).
        level: of the interval.
    """
    half = log_mean_error(log_evidences) * float(stats.t.ppf((1 + level) / 2, len(log_evidences) - 1))
    return log_mean(log_evidences) - half, log_mean(log_evidences) + half
