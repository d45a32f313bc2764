r"""Reference points for TARP that depend on the data, and keep the ranks exactly uniform under a correct posterior.

The reference of a simulation is the prediction of a regression of theta on x for its data. It is fitted to *earlier*
simulations only, in blocks that double: the true value of a simulation does not enter its own reference, nor that of
any simulation before it, so the ranks are exactly uniform and independent. The first block, which has no earlier
simulations, uses draws from the posteriors of other simulations.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from probinfer.checks.calibration.whitening import columns
from probinfer.core.types import ArrayTree, PRNGKey

__all__ = ["References", "generator", "regression_references"]

_FIRST_SHARE = 16  # the first block is one in so many simulations
_RANDOM_FEATURES = 64
_PENALTIES = np.logspace(-3, 5, 17)
_CLIP = 5.0  # bound of standardized features


class References(NamedTuple):
    """Reference points, and whether they depend on the data.

    Attributes:
        points: reference points (S, D), in whitened coordinates.
        uses_data: whether they depend on the data.
        explained: share of the variance of theta that they predict, in the best coordinate; None if they are not
            predictions.
    """

    points: Float[np.ndarray, "S D"]
    uses_data: bool
    explained: float | None


def regression_references(
    rng: np.random.Generator,
    x: ArrayTree,
    true_values: Float[np.ndarray, "S D"],
    others: Float[np.ndarray, "S D"],
) -> References:
    """Predict true values by ridge regression on x, x^2 and random tanh features, fitted to earlier simulations.

    Args:
        rng: generator of the random features.
        x: data, leaves (S, ...), in random order.
        true_values: true values in whitened coordinates.
        others: points that do not use a simulation's data, for the first block.

    Returns:
        The references. They count as dependent on the data if the predictions of held-out true values are better
        than chance by their rank correlation, at the level 0.001 over the coordinates.
    """
    data = np.asarray(columns(x, 1), dtype=float).reshape(len(true_values), -1)
    data = np.where(np.isfinite(data), data, 0.0)
    weights = rng.normal(size=(data.shape[1], _RANDOM_FEATURES)) / np.sqrt(max(data.shape[1], 1))
    offsets = rng.normal(size=_RANDOM_FEATURES)
    points, start = others.copy(), max(len(true_values) // _FIRST_SHARE, 8)
    first = start
    while start < len(true_values):
        stop = min(2 * start, len(true_values))
        features = _features(data[:stop], data[:start], weights, offsets)
        points[start:stop] = _ridge(features[:start], true_values[:start], features[start:])
        start = stop
    uses_data, explained = _rank_correlation(points[first:], true_values[first:])
    return References(points, uses_data, explained)


def _features(data: np.ndarray, earlier: np.ndarray, weights: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    center = np.median(earlier, axis=0)
    scale = np.maximum(np.median(np.abs(earlier - center), axis=0) * 1.4826, 1e-300)
    scaled = np.clip((data - center) / scale, -_CLIP, _CLIP)
    return np.concatenate([scaled, scaled**2, np.tanh(scaled @ weights + offsets)], axis=1)


def _ridge(features: np.ndarray, targets: np.ndarray, new_features: np.ndarray) -> np.ndarray:
    """Predict by ridge regression with a penalty from generalized cross-validation (Golub, Heath and Wahba, 1979)."""
    center, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 0, scale, np.inf)
    mean = np.median(targets, axis=0)
    clipped = np.clip(targets - mean, *np.quantile(targets - mean, [0.02, 0.98], axis=0))
    scaled = (features - center) / scale
    # Eigenvalues s^2 of the normal equations: the penalties exceed the rounding errors of the small ones.
    squares, vectors = np.linalg.eigh(scaled.T @ scaled)
    squares = np.maximum(squares, 1e-12 * max(squares[-1], 1.0))
    shrink = squares / (squares + _PENALTIES[:, None])
    projections = (vectors.T @ (scaled.T @ clipped)) / np.sqrt(squares)[:, None]
    residual = np.sum(clipped**2, axis=0) - np.einsum("pk,kd->pd", 2 * shrink - shrink**2, projections**2)
    scores = residual / (1 - shrink.sum(axis=1, keepdims=True) / (len(targets) + 1)) ** 2
    best = shrink[np.argmin(scores, axis=0)]
    coefficients = (best / np.sqrt(squares)).T * projections
    return mean + ((new_features - center) / scale) @ (vectors @ coefficients)


def _rank_correlation(points: np.ndarray, true_values: np.ndarray) -> tuple[bool, float]:
    """Return whether predictions and true values are correlated by rank, and the share of variance explained."""
    if len(points) < 4:
        return False, 0.0
    ranks = [
        np.argsort(np.argsort(values, axis=0), axis=0) - (len(values) - 1) / 2
        for values in (points, true_values)
    ]
    correlation = np.mean(ranks[0] * ranks[1], axis=0) * 12 / (len(points) ** 2 - 1)
    # z of 3.3 is the one-sided level 0.0005; the logarithm corrects for the number of coordinates.
    min_correlation = np.sqrt((3.3**2 + 2 * np.log(max(true_values.shape[1], 1))) / len(points))
    best = float(np.max(correlation))
    return bool(best > min_correlation), max(best, 0.0) ** 2


def generator(key: PRNGKey) -> np.random.Generator:
    """Return a NumPy generator seeded by a key."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))
