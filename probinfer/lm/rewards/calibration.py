r"""Is the score of a reward model a probability? A monotone map that makes it one, and the figures that tell.

A process reward model gives a logit; used as a likelihood it should be right about as often as it says. From held-out
steps with labels, ``calibrate`` learns a map of logits (temperature, Platt or isotonic), and ``reliability`` compares
what is said with what is true. Both keep the order of scores, so the area under the ROC curve does not change (isotonic
maps make ties).

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
        slope: a, not negative; 0 says that the score tells nothing.
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
    """A calibrated logit that rises in straight pieces between knots and is constant beyond them.

    Attributes:
        knots: (K,) rising logits.
        values: (K,) calibrated logits, which do not fall.
    """

    knots: Any
    values: Any

    def __call__(self, logits: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Map logits."""
        return jnp.interp(logits, self.knots.astype(logits.dtype), self.values.astype(logits.dtype))


class Reliability(NamedTuple):
    """What the scores say against what is true.

    Attributes:
        lower: (B,) where the bins of probability begin; bins without steps are left out.
        upper: (B,) where they end.
        predicted: (B,) mean probability in the bin.
        observed: (B,) share of right steps in the bin.
        counts: (B,) steps.
        ece: expected calibration error, the mean over steps of |predicted - observed| of their bin.
        brier: mean of (p - y)^2.
        auc: probability that a right step scores above a wrong one, ties counted half.
        auc_interval: at the level asked for; a single point where no pair is in the wrong order (or all are).
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
        """A table."""
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
    r"""A monotone map from logits of a reward model to calibrated logits, learnt on held-out steps.

    ``"temperature"`` is :math:`l / T` and ``"platt"`` :math:`a l + b` with :math:`a \ge 0`, both by maximum likelihood
    with Platt's targets :math:`(n_+ + 1)/(n_+ + 2)` and :math:`1/(n_- + 2)` in the place of 1 and 0, so that separated
    labels do not send the slope to infinity. ``"isotonic"`` pools adjacent violators, adds ``smoothing`` right and as
    many wrong steps to every pool (Laplace), pools again what this has put out of order, and joins the pools by
    straight pieces: no probability is 0 or 1, so no logit is infinite.

    Args:
        logits: (n,) finite scores of steps that the reward model was not trained on.
        labels: (n,) 1 or True where the step is right, else 0.
        method: "temperature" (few steps), "platt", or "isotonic" (a thousand steps or more).
        smoothing: for "isotonic".

    Returns:
        A callable pytree, logit to calibrated logit.

    Raises:
        ValueError: unknown method; logits that are not finite; labels other than 0 and 1, or all alike; other lengths.

    Example:
        >>> import numpy as np
        >>> from probinfer.lm.rewards import calibration
        >>> logits = np.array([-4.0, -2.0, 0.0, 2.0, 4.0, 4.0])
        >>> scale = calibration.calibrate(logits, [0, 1, 0, 1, 0, 1], "temperature")
        >>> bool(0 < scale.slope < 1), float(scale.offset)
        (True, 0.0)
    """
    logits, labels = _checked(logits, labels)
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
    """Slope (not negative) and offset of the largest likelihood, with Platt's targets; a convex problem."""
    right = labels.sum()
    targets = np.where(labels > 0, (right + 1) / (right + 2), 1 / (len(labels) - right + 2))
    size = np.abs(logits).max() or 1.0  # the search runs on logits of size one
    scaled = logits / size

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        found = theta[0] * scaled + theta[1]
        errors = special.expit(found) - targets
        value = np.mean(np.logaddexp(0, found) - targets * found)
        return value, np.array([np.mean(errors * scaled), np.mean(errors)])

    bounds = [(0, None), (None, None) if with_offset else (0, 0)]
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000}
    best = optimize.minimize(loss, [size, 0.0], jac=True, bounds=bounds, method="L-BFGS-B", options=options)
    return float(best.x[0]) / size, float(best.x[1])


def _isotonic(logits: np.ndarray, labels: np.ndarray, smoothing: float) -> Isotonic:
    """Knots at both ends of every pool."""
    scores, group = np.unique(logits, return_inverse=True)
    count, right = np.bincount(group), np.bincount(group, labels)
    pool = pool_adjacent(right / count, count)
    # Smoothing moves small pools more than large ones, which may turn their order.
    counts = np.bincount(pool, count) + 2 * smoothing
    rights = np.bincount(pool, right) + smoothing
    again = pool_adjacent(rights / counts, counts)
    values = special.logit(np.bincount(again, rights) / np.bincount(again, counts))[again[pool]]
    ends = np.flatnonzero(np.diff(values, prepend=-np.inf) + np.diff(values, append=np.inf))
    return Isotonic(strong_array(scores[ends]), strong_array(values[ends]))


def pool_adjacent(means: Any, weights: Any) -> np.ndarray:
    r"""Pools of the isotonic regression :math:`\min \sum_i w_i (m_i - f_i)^2` over :math:`f_1 \le f_2 \le \dots`.

    Args:
        means: (n,).
        weights: (n,) positive.

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

    The interval of the area is DeLong's on the scale of its logit, which keeps it between 0 and 1; it takes the steps
    for independent, so with many steps of one text it is too short.

    Args:
        logits: (n,) scores; infinite ones stand for 0 and 1.
        labels: (n,) 1 or True where the step is right, else 0.
        num_bins: bins of probability of equal width.
        level: of the interval.

    Returns:
        The figures; ``print`` shows a table.

    Raises:
        ValueError: NaN logits; labels other than 0 and 1, or all alike; other lengths; settings out of range.
    """
    logits, labels = _checked(logits, labels)
    if num_bins < 1 or not 0 < level < 1:
        raise ValueError(f"num_bins must be positive and level between 0 and 1; got {num_bins} and {level}")
    said = special.expit(logits)
    bins = np.minimum((said * num_bins).astype(int), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    used = counts > 0
    count = counts[used]
    predicted = np.bincount(bins, said, num_bins)[used] / count
    observed = np.bincount(bins, labels, num_bins)[used] / count
    area, variance = auc(logits, labels)
    edges = np.linspace(0, 1, num_bins + 1)
    return Reliability(
        edges[:-1][used],
        edges[1:][used],
        predicted,
        observed,
        count,
        float(np.sum(count * np.abs(predicted - observed)) / len(labels)),
        float(np.mean((said - labels) ** 2)),
        area,
        _interval(area, variance, float(level)),
        len(labels),
    )


def auc(logits: Any, labels: Any) -> tuple[float, float]:
    r"""The area under the ROC curve, :math:`P(l_+ > l_-) + P(l_+ = l_-)/2`, and DeLong's estimate of its variance.

    Args:
        logits: (n,) scores.
        labels: (n,) 0 or 1.

    Returns:
        The area and the variance.

    Raises:
        ValueError: see ``reliability``.
    """
    logits, labels = _checked(logits, labels)
    right, wrong = logits[labels > 0], logits[labels == 0]
    both = stats.rankdata(np.concatenate([right, wrong]))  # midranks: ties count half
    above = (both[: len(right)] - stats.rankdata(right)) / len(
        wrong
    )  # share of wrong ones below each right one
    below = 1 - (both[len(right) :] - stats.rankdata(wrong)) / len(right)
    spread = sum(part.var(ddof=1) / len(part) if len(part) > 1 else 0.0 for part in (above, below))
    return float(above.mean()), float(spread)


def _interval(area: float, variance: float, level: float) -> tuple[float, float]:
    """An interval of the area, on the scale of its logit."""
    slope = area * (1 - area)
    if slope == 0:
        return area, area
    half = special.ndtri((1 + level) / 2) * np.sqrt(variance) / slope
    return float(special.expit(special.logit(area) - half)), float(special.expit(special.logit(area) + half))


def _checked(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels as floats (n,), of two kinds."""
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
