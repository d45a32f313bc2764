"""Independent populations that share frozen settings: the mean of their evidences, its error, and how they agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special, stats

from probinfer.core.status import Status
from probinfer.core.types import Array
from probinfer.inference.findings import Finding
from probinfer.mcmc import report

__all__ = [
    "broadcast_log_weights",
    "disagreement",
    "evidence_ess",
    "interval",
    "log_mean",
    "log_mean_error",
    "stack_padded",
]


def log_mean(log_evidences: np.ndarray) -> float:
    """Return the log of the mean evidence.

    Args:
        log_evidences: (R,).
    """
    return float(special.logsumexp(log_evidences) - np.log(len(log_evidences)))


def log_mean_error(log_evidences: np.ndarray) -> float:
    """Return the standard error of the log of the mean, by the delta method; NaN if all died, or for one island.

    Args:
        log_evidences: (R,).
    """
    if not np.any(np.isfinite(log_evidences)) or len(log_evidences) == 1:
        return float("nan")
    relative = np.exp(log_evidences - log_mean(log_evidences))
    return float(np.std(relative, ddof=1) / np.sqrt(len(relative)))


def evidence_ess(log_evidences: np.ndarray) -> float:
    """Return the effective sample size of the evidences, 1 to R.

    Args:
        log_evidences: (R,).
    """
    return float(np.exp(2 * special.logsumexp(log_evidences) - special.logsumexp(2 * log_evidences)))


def interval(log_evidences: np.ndarray, level: float) -> tuple[float, float]:
    r"""Return an interval for the log evidence: the union of two intervals.

    The first is Student's t with R - 1 degrees of freedom around the log of the mean. Evidences of particle methods
    are nearly lognormal, and if the standard deviation s of their logs exceeds a half, the mean of a few is mostly too
    low and its error too small. So the second assumes that they are lognormal: the log of the mean is
    :math:`m + s^2/2`, its variance :math:`s^2/R + s^4/(2(R-1))`. For small s both are the same. The interval of one
    island is NaN.

    Args:
        log_evidences: (R,).
        level: of the interval.

    References:
        Bérard, Del Moral and Doucet (2014), "A lognormal central limit theorem for particle approximations of
        normalizing constants"; Zhou and Gao (1997), Cox's method for the mean of a lognormal, equation 6.
    """
    num_islands = len(log_evidences)
    if num_islands == 1:
        return float("nan"), float("nan")
    quantile = float(stats.t.ppf((1 + level) / 2, num_islands - 1))
    # Student's t
    center, half_width = log_mean(log_evidences), quantile * log_mean_error(log_evidences)
    low, high = center - half_width, center + half_width
    if not np.all(np.isfinite(log_evidences)):  # an island died: there is no lognormal with these logs
        return low, high
    # Lognormal
    variance = float(np.var(log_evidences, ddof=1))
    center = float(np.mean(log_evidences)) + variance / 2
    error = float(np.sqrt(variance / num_islands + variance**2 / (2 * (num_islands - 1))))
    half_width = quantile * error
    return min(low, center - half_width), max(high, center + half_width)


def disagreement(
    log_evidences: np.ndarray, convergence: report.Convergence, num_particles: int, advised: str
) -> Finding | None:
    """Return a finding if the evidences or the draws of the islands disagree.

    Args:
        log_evidences: (R,).
        convergence: of the draws, each island a chain.
        num_particles: of an island.
        advised: what to do then.
    """
    num_islands = len(log_evidences)
    if evidence_ess(log_evidences) < num_islands / 2:
        low, high = np.min(log_evidences), np.max(log_evidences)
        details = f"the evidences of the islands differ too much (logs {low:.1f} to {high:.1f})"
        return Finding(Status.CHAINS_DISAGREE, details, advised)
    if int(convergence.status) == Status.OK:
        return None
    details = report.explain(convergence, num_islands, num_particles, plural="islands")
    return Finding(Status(int(convergence.status)), details, advised)


def broadcast_log_weights(log_evidences: np.ndarray, num_particles: int, dtype: Any) -> Array:
    """Return log weights (R, N): every particle has the evidence of its island.

    Args:
        log_evidences: (R,).
        num_particles: N.
        dtype: of the weights.
    """
    column = jnp.asarray(log_evidences, dtype)[:, None]
    return jnp.broadcast_to(column, (len(log_evidences), num_particles))


def stack_padded(rows: Sequence[Any], shape: tuple[int, ...], dtype: Any) -> Array:
    """Return the records of islands as one array, padded by NaN for those that ended early.

    Args:
        rows: records of each island, at most ``shape[0]`` of them.
        shape: of a complete record.
        dtype: of the array.
    """
    stacked = np.full((len(rows), *shape), np.nan, dtype)
    for row, values in zip(stacked, rows):
        row[: len(values)] = values
    return jax.device_put(stacked)  # compiles nothing for a new shape
