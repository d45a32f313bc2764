r"""Reference points for TARP that depend on the data, and leave the ranks exactly uniform under a right posterior.

The reference of a simulation is what a regression of theta on x predicts for its data. It is fitted to *earlier*
simulations only, in blocks that double: the true value of a simulation has no part in its own reference, nor in that
of any simulation before it, so the ranks are uniform and independent, not only nearly so. The first block,
which has no past, takes members of other simulations' posteriors.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from probinfer.checks.calibration.whitening import columns
from probinfer.core.types import ArrayTree, PRNGKey

__all__ = ["References", "generator", "regression_references"]

_FIRST_SHARE = 16  # the first block is this part of the simulations
_RANDOM_FEATURES = 64
_PENALTIES = np.logspace(-3, 5, 17)
_CLIP = 5.0  # standardised features


class References(NamedTuple):
    """Reference points and what is known of them.

    Attributes:
        points: (S, D), in whitened coordinates.
        uses_data: whether they depend on the data.
        explained: share of the variance of theta that they predict, of the best coordinate; None if not a prediction.
    """

    points: np.ndarray
    uses_data: bool
    explained: float | None


def regression_references(
    rng: np.random.Generator, x: ArrayTree, theta: Float[np.ndarray, "S D"], others: Float[np.ndarray, "S D"]
) -> References:
    """Predict theta from the data by ridge regression on x, x^2 and random tanh features, fitted to the past.

    Args:
        rng: for the random features.
        x: data, leaves (S, ...), in random order.
        theta: true values in whitened coordinates.
        others: points that do not use a simulation's data, for the first block.

    Returns:
        The references. They count as dependent on the data if the predictions of held-out true values are better
        than chance, as far as rank correlation at the level 0.001 (over the coordinates) can tell.
    """
    raw = np.asarray(columns(x, 1), dtype=float).reshape(len(theta), -1)
    raw = np.where(np.isfinite(raw), raw, 0.0)
    weights = rng.normal(size=(raw.shape[1], _RANDOM_FEATURES)) / np.sqrt(max(raw.shape[1], 1))
    offsets = rng.normal(size=_RANDOM_FEATURES)
    points, start = others.copy(), max(len(theta) // _FIRST_SHARE, 8)
    first = start
    while start < len(theta):
        stop = min(2 * start, len(theta))
        features = _features(raw[:stop], raw[:start], weights, offsets)
        points[start:stop] = _ridge(features[:start], theta[:start], features[start:])
        start = stop
    skill, explained = _skill(points[first:], theta[first:])
    return References(points, skill, explained)


def _features(raw: np.ndarray, past: np.ndarray, weights: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    centre = np.median(past, axis=0)
    spread = np.maximum(np.median(np.abs(past - centre), axis=0) * 1.4826, 1e-300)
    scaled = np.clip((raw - centre) / spread, -_CLIP, _CLIP)
    return np.concatenate([scaled, scaled**2, np.tanh(scaled @ weights + offsets)], axis=1)


def _ridge(features: np.ndarray, theta: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Ridge regression, its penalty by generalised cross-validation (Golub, Heath and Wahba, 1979)."""
    centre, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.where(spread > 0, spread, np.inf)
    mean = np.median(theta, axis=0)
    target = np.clip(theta - mean, *np.quantile(theta - mean, [0.02, 0.98], axis=0))
    scaled = (features - centre) / spread
    # By the eigenvalues s^2 of the normal equations: what rounding does to the small ones, the penalties hide.
    squares, vectors = np.linalg.eigh(scaled.T @ scaled)
    squares = np.maximum(squares, 1e-12 * max(squares[-1], 1.0))
    shrink = squares / (squares + _PENALTIES[:, None])
    inside = (vectors.T @ (scaled.T @ target)) / np.sqrt(squares)[:, None]
    residual = np.sum(target**2, axis=0) - np.einsum("pk,kd->pd", 2 * shrink - shrink**2, inside**2)
    scores = residual / (1 - shrink.sum(axis=1, keepdims=True) / (len(theta) + 1)) ** 2
    best = shrink[np.argmin(scores, axis=0)]
    coefficients = (best / np.sqrt(squares)).T * inside
    return mean + ((new - centre) / spread) @ (vectors @ coefficients)


def _skill(points: np.ndarray, theta: np.ndarray) -> tuple[bool, float]:
    """Whether predictions and true values go together, and the share of variance explained by rank."""
    if len(points) < 4:
        return False, 0.0
    ranks = [
        np.argsort(np.argsort(values, axis=0), axis=0) - (len(values) - 1) / 2 for values in (points, theta)
    ]
    correlation = np.mean(ranks[0] * ranks[1], axis=0) * 12 / (len(points) ** 2 - 1)
    # z of 3.3 is the one-sided level 0.0005; each further coordinate takes its share.
    needed = np.sqrt((3.3**2 + 2 * np.log(max(theta.shape[1], 1))) / len(points))
    best = float(np.max(correlation))
    return bool(best > needed), max(best, 0.0) ** 2


def generator(key: PRNGKey) -> np.random.Generator:
    """Return a NumPy generator seeded by a key."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))
