"""Energy distance of a cloud to many reference draws, raw and whitened, with what independent draws would have."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial.distance import cdist, pdist
from scipy.stats import t

__all__ = ["Reference", "paired", "short"]


class Reference:
    """Draws of a target; distances to them in their own coordinates and in whitened ones.

    Whitened: multiplied by the inverse Cholesky factor of the covariance of the draws.
    """

    def __init__(self, draws: np.ndarray, max_draws: int = 5000):
        self.every = np.asarray(draws, float)
        step = -(-len(self.every) // max_draws)
        thinned = self.every[::step]
        root = np.linalg.cholesky(np.cov(self.every.T).reshape(thinned.shape[1], -1))
        self.maps = (np.eye(thinned.shape[1]), np.linalg.inv(root).T)
        self.draws = [thinned @ linear for linear in self.maps]
        self.own = [pdist(part).mean() for part in self.draws]

    def distances(self, cloud: np.ndarray) -> list[float]:
        """2 E|a - b| - E|a - a'| - E|b - b'|, a over all pairs of the cloud; infinite where it is not finite."""
        if not np.isfinite(cloud).all():
            return [float("inf")] * 2
        return [self._distance(cloud @ linear, k) for k, linear in enumerate(self.maps)]

    def _distance(self, points: np.ndarray, k: int) -> float:
        within = 2 * pdist(points).sum() / len(points) ** 2
        return float(2 * cdist(points, self.draws[k]).mean() - within - self.own[k])

    def floor(self, size: int) -> list[float]:
        """The mean for ``size`` independent draws, E|b - b'| / size: what the pairs of a draw with itself leave."""
        return [draws_energy / size for draws_energy in self.own]


def paired(differences: Any) -> tuple[Any, Any]:
    """Return the ends of the 95 % interval of the mean along the first axis."""
    differences = np.asarray(differences, float)
    size = len(differences)
    half = t.ppf(0.975, size - 1) * differences.std(axis=0, ddof=1) / np.sqrt(size)
    return differences.mean(axis=0) - half, differences.mean(axis=0) + half


def short(values: Any) -> np.ndarray:
    """Round to the four digits that a results file needs."""
    return np.vectorize(lambda v: float(f"{v:.4g}"))(np.asarray(values, float))
