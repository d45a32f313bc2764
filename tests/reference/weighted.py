"""Weighted samples by definition: probabilities, loops, exact rational arithmetic."""

from fractions import Fraction

import numpy as np


def probabilities(log_weights):
    log_weights = np.asarray(log_weights, float)
    weights = np.exp(log_weights - np.max(log_weights))
    return weights / weights.sum()


def moments(log_weights, values):
    """Mean and variance from the pairwise form sum_ij W_i W_j (x_i - x_j)^2 / 2, without the diagonal."""
    p = probabilities(log_weights)
    pairs = p[:, None] * p[None, :]
    variance = 0.5 * np.sum(pairs * (values[:, None] - values[None, :]) ** 2) / (1 - np.sum(p**2))
    return p @ values, variance


def quantile(log_weights, values, probability):
    p = probabilities(log_weights)
    candidates = sorted(x for x, w in zip(values, p, strict=True) if w > 0)
    reached = (x for x in candidates if sum(p[values <= x]) >= probability - 1e-9)
    return next(reached, candidates[-1])


def systematic_counts(probabilities, offset, num):
    """Offspring of every particle when the offset is u: how many (u + j)/num fall into its interval, exactly."""
    exact = [Fraction(float(p)) for p in probabilities]
    total, start, counts = sum(exact), Fraction(0), []
    points = [(Fraction(float(offset)) + j) / num * total for j in range(num)]
    for p in exact:
        counts.append(sum(start <= point < start + p for point in points))
        start += p
    return np.array(counts)
