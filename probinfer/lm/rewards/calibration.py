r"""Is the score of a reward model a probability? A monotone map that makes it one, and figures that measure it.

A process reward model gives a logit; used as a likelihood it should be right about as often as its probability says.
From held-out steps with labels, ``calibrate`` learns a map of logits (temperature, Platt or isotonic), and
``reliability`` compares the probabilities with the labels. The maps keep the order of scores, so the area under the ROC
curve does not change (isotonic maps make ties).

References:
    Platt (1999), with his targets that keep the fit finite; Zadrozny and Elkan (2002), isotonic; Guo et al. (2017),
    temperature; DeLong, DeLong and Clarke-Pearson (1988), the variance of the area.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy import optimize, special, stats

from probinfer.core.errors import shortened
from probinfer.core.types import Array, Float, pytree, strong_array

__all__ = ["Affine", "Isotonic", "Reliability", "auc", "calibrate", "pool_adjacent", "reliability"]

_METHODS = ("temperature", "platt", "isotonic")


@pytree
class Affine:
    """The calibrated logit a l + b.

    Attributes:
        slope: a, not negative; 0 if the score carries no information.
        offset: b.
    """

    slope: Any
    offset: Any

    def __call__(self, logits: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Map logits; infinite ones stay infinite unless the slope is zero."""
        slope, offset = self.slope.astype(logits.dtype), self.offset.astype(logits.dtype)
        return jnp.where(slope == 0, jnp.zeros_like(logits), slope * logits) + offset


@pytree
class Isotonic:
    """A calibrated logit that is linear between knots and constant beyond them.

    Attributes:
        knots: (K,) increasing logits.
        values: (K,) calibrated logits, which do not decrease.
    """

    knots: Any
    values: Any

    def __call__(self, logits: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Map logits."""
        return jnp.interp(logits, self.knots.astype(logits.dtype), self.values.astype(logits.dtype))


class Reliability(NamedTuple):
    """Probabilities from scores, compared with labels.

    Attributes:
        lower: (B,) lower ends of the bins of probability; bins without steps are left out.
        upper: (B,) upper ends of the bins.
        predicted: (B,) mean probability in the bin.
        observed: (B,) share of right steps in the bin.
        counts: (B,) number of steps in the bin.
        ece: expected calibration error, the mean over steps of |predicted - observed| of their bin.
        brier: Brier score, the mean of (p - y)^2.
        auc: probability that a right step scores above a wrong one, ties counted half.
        auc_interval: confidence interval of ``auc``; a single point if no pair is in the wrong order (or all are).
        num_steps: n.
    """

    lower: np.ndarray
    upper: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    counts: np.ndarray
    ece: float
    brier: float
    auc: float
    auc_interval: tuple[float, float]
    num_steps: int

    def __str__(self) -> str:
        """The figures, and a table of the bins."""
        low, high = self.auc_interval
        lines = [
            f"{self.num_steps} steps: AUC {self.auc:.3f} ({low:.3f} to {high:.3f}), "
            f"calibration error {self.ece:.3f}, Brier score {self.brier:.3f}",
            "    bin       said   true  steps",
        ]
        rows = zip(self.lower, self.upper, self.predicted, self.observed, self.counts, strict=True)
        lines += [
            f"{a:.2f} - {b:.2f}  {said:.3f}  {true:.3f}  {count:5d}" for a, b, said, true, count in rows
        ]
        return "\n".join(lines)


def calibrate(logits: Any, labels: Any, method: str = "platt", *, smoothing: Any = 1.0) -> Affine | Isotonic:
    r"""Learn a monotone map from logits of a reward model to calibrated logits, on held-out steps.

    ``"temperature"`` is :math:`l / T` and ``"platt"`` :math:`a l + b` with :math:`a \ge 0`, both by maximum likelihood
    with Platt's targets :math:`(n_+ + 1)/(n_+ + 2)` and :math:`1/(n_- + 2)` in the place of 1 and 0, so that separated
    labels do not send the slope to infinity. ``"isotonic"`` pools adjacent violators, adds ``smoothing`` right and as
    many wrong steps to every pool (Laplace), pools again where this has broken the order, and interpolates linearly
    between the pools: no probability is 0 or 1, so no logit is infinite.

    Args:
        logits: (n,) finite scores of steps that the reward model was not trained on.
        labels: (n,) 1 or True if the step is right, else 0.
        method: "temperature" (few steps), "platt", or "isotonic" (a thousand steps or more).
        smoothing: number of right and of wrong steps added to every pool, for "isotonic".

    Returns:
        A callable pytree, logit to calibrated logit.

    Raises:
        ValueError: the method is unknown, logits are not finite, labels are not 0 and 1 or all alike, or lengths
            differ.

    Example:
        >>> import numpy as np
        >>> from probinfer.lm.rewards import calibration
        >>> logits = np.array([-4.0, -2.0, 0.0, 2.0, 4.0, 4.0])
        >>> scale = calibration.calibrate(logits, [0, 1, 0, 1, 0, 1], "temperature")
        >>> bool(0 < scale.slope < 1), float(scale.offset)
        (True, 0.0)
    """
    logits, labels = _check_labeled(logits, labels)
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}; got {method!r}")
    if not np.isfinite(logits).all():
        raise ValueError(
            "logits must be finite to calibrate on; clip those of scores 0 and 1, as with np.clip(., -30, 30)"
        )
    if method == "isotonic":
        if not 0 < smoothing < np.inf:
            raise ValueError(f"smoothing must be positive, so that no logit is infinite; got {smoothing}")
        return _isotonic(logits, labels, float(smoothing))
    slope, offset = _affine(logits, labels, method == "platt")
    return Affine(strong_array(slope), strong_array(offset))


def _affine(logits: np.ndarray, labels: np.ndarray, with_offset: bool) -> tuple[float, float]:
    """Return the slope (not negative) and offset of maximum likelihood with Platt's targets; a convex problem."""
    num_right = labels.sum()
    targets = np.where(labels > 0, (num_right + 1) / (num_right + 2), 1 / (len(labels) - num_right + 2))
    scale = np.abs(logits).max() or 1.0  # the optimizer sees logits of order one
    scaled = logits / scale

    def loss(params: np.ndarray) -> tuple[float, np.ndarray]:
        mapped = params[0] * scaled + params[1]
        errors = special.expit(mapped) - targets
        value = np.mean(np.logaddexp(0, mapped) - targets * mapped)
        return value, np.array([np.mean(errors * scaled), np.mean(errors)])

    bounds = [(0, None), (None, None) if with_offset else (0, 0)]
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000}
    result = optimize.minimize(
        loss, [scale, 0.0], jac=True, bounds=bounds, method="L-BFGS-B", options=options
    )
    return float(result.x[0]) / scale, float(result.x[1])


def _isotonic(logits: np.ndarray, labels: np.ndarray, smoothing: float) -> Isotonic:
    """Return the smoothed isotonic regression, with knots at both ends of every pool."""
    scores, group = np.unique(logits, return_inverse=True)
    count, num_right = np.bincount(group), np.bincount(group, labels)
    pool = pool_adjacent(num_right / count, count)
    # Smoothing moves small pools more than large ones, which may break their order: pool once more.
    pool_count = np.bincount(pool, count) + 2 * smoothing
    pool_right = np.bincount(pool, num_right) + smoothing
    merged = pool_adjacent(pool_right / pool_count, pool_count)
    probabilities = np.bincount(merged, pool_right) / np.bincount(merged, pool_count)
    values = special.logit(probabilities)[merged[pool]]
    knots = np.flatnonzero(np.diff(values, prepend=-np.inf) + np.diff(values, append=np.inf))
    return Isotonic(strong_array(scores[knots]), strong_array(values[knots]))


def pool_adjacent(means: Any, weights: Any) -> np.ndarray:
    r"""Pool adjacent violators: :math:`\min \sum_i w_i (m_i - f_i)^2` over :math:`f_1 \le f_2 \le \dots`.

    Args:
        means: (n,) means m.
        weights: (n,) positive weights w.

    Returns:
        (n,) number of the pool of each entry, from 0; f is the weighted mean of the pool.
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, entries
    for mean, weight in zip(np.asarray(means, float), np.asarray(weights, float), strict=True):
        pools.append((float(mean), float(weight), 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (a, v, k), (b, w, m) = pools[-2:]
            pools[-2:] = [((v * a + w * b) / (v + w), v + w, k + m)]
    return np.repeat(np.arange(len(pools)), [size for *_, size in pools])


def reliability(logits: Any, labels: Any, *, num_bins: int = 10, level: Any = 0.95) -> Reliability:
    r"""Compare scores with labels: a table by bins, calibration error, Brier score and area under the ROC curve.

    The interval of the area is DeLong's on the logit scale, which keeps it between 0 and 1; it assumes independent
    steps, so with many steps of one text it is too short.

    Args:
        logits: (n,) scores; infinite ones stand for 0 and 1.
        labels: (n,) 1 or True if the step is right, else 0.
        num_bins: number of bins of probability, of equal width.
        level: confidence level of the interval.

    Returns:
        The figures; ``print`` shows a table.

    Raises:
        ValueError: logits are NaN, labels are not 0 and 1 or all alike, lengths differ, or a setting is out of range.
    """
    logits, labels = _check_labeled(logits, labels)
    if num_bins < 1 or not 0 < level < 1:
        raise ValueError(f"num_bins must be positive and level between 0 and 1; got {num_bins} and {level}")
    probabilities = special.expit(logits)
    bins = np.minimum((probabilities * num_bins).astype(int), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    used = counts > 0
    count = counts[used]
    predicted = np.bincount(bins, probabilities, num_bins)[used] / count
    observed = np.bincount(bins, labels, num_bins)[used] / count
    area, variance = auc(logits, labels)
    edges = np.linspace(0, 1, num_bins + 1)
    return Reliability(
        lower=edges[:-1][used],
        upper=edges[1:][used],
        predicted=predicted,
        observed=observed,
        counts=count,
        ece=float(np.sum(count * np.abs(predicted - observed)) / len(labels)),
        brier=float(np.mean((probabilities - labels) ** 2)),
        auc=area,
        auc_interval=_interval(area, variance, float(level)),
        num_steps=len(labels),
    )


def auc(logits: Any, labels: Any) -> tuple[float, float]:
    r"""Return the area under the ROC curve :math:`P(l_+ > l_-) + P(l_+ = l_-)/2`, and DeLong's variance of it.

    Args:
        logits: (n,) scores.
        labels: (n,) 0 or 1.

    Returns:
        The area and the variance.

    Raises:
        ValueError: see ``reliability``.
    """
    logits, labels = _check_labeled(logits, labels)
    right, wrong = logits[labels > 0], logits[labels == 0]
    ranks = stats.rankdata(np.concatenate([right, wrong]))  # midranks: ties count half
    # the share of wrong steps below each right step, and of right steps above each wrong step
    wrong_below = (ranks[: len(right)] - stats.rankdata(right)) / len(wrong)
    right_above = 1 - (ranks[len(right) :] - stats.rankdata(wrong)) / len(right)
    shares = (wrong_below, right_above)
    variance = sum(share.var(ddof=1) / len(share) if len(share) > 1 else 0.0 for share in shares)
    return float(wrong_below.mean()), float(variance)


def _interval(area: float, variance: float, level: float) -> tuple[float, float]:
    """Return a confidence interval of the area, by the delta method on its logit."""
    slope = area * (1 - area)
    if slope == 0:
        return area, area
    half_width = special.ndtri((1 + level) / 2) * np.sqrt(variance) / slope
    center = special.logit(area)
    return float(special.expit(center - half_width)), float(special.expit(center + half_width))


def _check_labeled(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and labels as floats (n,), or refuse them."""
    logits, labels = np.asarray(logits, float), np.asarray(labels)
    if logits.ndim != 1 or logits.shape != labels.shape:
        raise ValueError(f"logits and labels must both be (n,), got {logits.shape} and {labels.shape}")
    if np.isnan(logits).any():
        raise ValueError(f"{np.isnan(logits).sum()} of {len(logits)} logits are NaN; drop those steps")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {shortened(labels[~np.isin(labels, (0, 1))].tolist())}")
    labels = labels.astype(float)
    if labels.min(initial=1) >= labels.max(initial=0):
        raise ValueError(f"all {len(labels)} labels are alike: a reward is judged by right and wrong steps")
    return logits, labels
