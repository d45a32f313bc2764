"""Scores of predictions on held-out rows with standard errors, and paired differences."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy.stats import norm

from probinfer.core.types import Float

__all__ = [
    "Estimate",
    "PredictionScores",
    "Predictions",
    "concatenate",
    "difference",
    "normal_baseline",
    "predictions",
    "scores",
]

_LEVELS = (0.025, 0.05, 0.25, 0.5, 0.75, 0.95, 0.975)


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


class Predictions(NamedTuple):
    """Predictions for M points, in the units of y.

    Attributes:
        mean: predictive means ``(M,)``.
        sd: predictive standard deviations ``(M,)``, noise included.
        quantiles: level -> ``(M,)``, at 2.5, 5, 25, 50, 75, 95 and 97.5 %.
        y: outcomes ``(M,)``; None if they are not known.
        log_density: log p(y_m | training data) ``(M,)``, the log of the mean over hyperparameter draws; None without y.
        pit: p(y' <= y_m | training data) ``(M,)``, uniform if the predictions are calibrated; None without y.
    """

    mean: Float[np.ndarray, " M"]
    sd: Float[np.ndarray, " M"]
    quantiles: dict[float, np.ndarray]
    y: Any = None
    log_density: Any = None
    pit: Any = None


class PredictionScores(NamedTuple):
    """Scores over test points, each with its standard error.

    Attributes:
        nlpd: mean negative log predictive density in nats; lower is better.
        rmse: root mean squared error of the predictive mean, in the units of y.
        coverage: share of the outcomes inside their central 95 % interval.
    """

    nlpd: Estimate
    rmse: Estimate
    coverage: Estimate


def predictions(
    fit: Any, X: Float[np.ndarray, "M D"], y: Float[np.ndarray, " M"] | None = None
) -> Predictions:
    """Predict new outputs with a fit of a Gaussian process.

    Args:
        fit: a ``gp.Fit``.
        X: new inputs.
        y: their outputs; None if they are not scored.
    """
    predictive = fit.predict_y(X)
    values = np.asarray(predictive.quantile(np.asarray(_LEVELS)), np.float64)
    quantiles = dict(zip(_LEVELS, values, strict=True))
    mean, sd = np.asarray(predictive.mean, np.float64), np.asarray(predictive.stddev, np.float64)
    if y is None:
        return Predictions(mean, sd, quantiles)
    outcomes = jnp.asarray(y)
    return Predictions(
        mean=mean,
        sd=sd,
        quantiles=quantiles,
        y=np.asarray(y, np.float64),
        log_density=np.asarray(predictive.log_prob(outcomes), np.float64),
        pit=np.asarray(predictive.cdf(outcomes), np.float64),
    )


def normal_baseline(y_train: Float[np.ndarray, " N"], y: Float[np.ndarray, " M"]) -> Predictions:
    """Predict without the inputs, by a normal with the mean and standard deviation of the training outputs."""
    normal = norm(np.mean(y_train), np.std(y_train, ddof=1))
    ones = np.ones(len(y))
    quantiles = {level: normal.ppf(level) * ones for level in _LEVELS}
    return Predictions(
        mean=normal.mean() * ones,
        sd=normal.std() * ones,
        quantiles=quantiles,
        y=y,
        log_density=normal.logpdf(y),
        pit=normal.cdf(y),
    )


def concatenate(parts: list[Predictions]) -> Predictions:
    """Concatenate the predictions of several folds."""
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("mean", "sd", "y", "log_density", "pit")
    }
    quantiles = {level: np.concatenate([part.quantiles[level] for part in parts]) for level in _LEVELS}
    return Predictions(quantiles=quantiles, **columns)


def scores(predicted: Predictions, *, block: int = 1) -> PredictionScores:
    """Score predictions whose outcomes are known.

    Args:
        predicted: predictions with ``y``.
        block: number of neighboring test points that are averaged before the standard error is computed from the
            blocks, for series, whose neighboring errors are correlated; 1 for independent test points.
    """
    errors = (predicted.y - predicted.mean) ** 2
    inside = (predicted.quantiles[0.025] <= predicted.y) & (predicted.y <= predicted.quantiles[0.975])
    mse = _estimate(errors, block)
    rmse = np.sqrt(mse.value)
    return PredictionScores(
        nlpd=_estimate(-predicted.log_density, block),
        rmse=Estimate(float(rmse), mse.error / (2 * float(rmse)) if rmse > 0 else 0.0),  # the delta method
        coverage=_estimate(inside.astype(float), block),
    )


def difference(predicted: Predictions, reference: Predictions, *, block: int = 1) -> Estimate:
    """Compute the NLPD minus that of a reference on the same points, as a paired difference.

    Args:
        predicted: one set of predictions.
        reference: the other, of the same outcomes in the same order.
        block: see ``scores``.

    Raises:
        ValueError: the outcomes differ.
    """
    if not np.array_equal(predicted.y, reference.y):
        raise ValueError("a paired difference needs predictions of the same outcomes in the same order")
    return _estimate(reference.log_density - predicted.log_density, block)


def _estimate(values, block):
    """Compute the mean, and its standard error from the block means."""
    num_blocks = max(len(values) // block, 1)
    means = np.array([part.mean() for part in np.array_split(values, num_blocks)])
    error = means.std(ddof=1) / np.sqrt(num_blocks) if num_blocks > 1 else np.nan
    return Estimate(float(values.mean()), float(error))
