"""Kernel Stein discrepancy and its descent direction in NumPy: double loops, derivatives by central differences."""

import numpy as np

from tests.reference.stein import gram


def squared_discrepancy(X, score_fn, scale, power):
    """The V-statistic: the mean of the Stein kernel over all pairs, the diagonal included."""
    scores = np.array([score_fn(x) for x in X])
    return gram(X, scores, X, scores, scale, power).mean()


def direction(X, score_fn, scale, power, step=1e-5):
    """Minus its gradient, one coordinate of one particle after another, scores recomputed."""
    result = np.zeros_like(X)
    for i, k in np.ndindex(*X.shape):
        moved = [X.copy(), X.copy()]
        moved[0][i, k] += step
        moved[1][i, k] -= step
        up, down = (squared_discrepancy(m, score_fn, scale, power) for m in moved)
        result[i, k] = -(up - down) / (2 * step)
    return result
