"""Pareto-smoothed importance sampling with loops, after Zhang and Stephens (2009) and Vehtari et al. (2024)."""

import math

import numpy as np


def fit(excess):
    """Shape and scale of a generalized Pareto distribution from ascending positive numbers."""
    n, largest = len(excess), excess[-1]
    size = 30 + int(math.sqrt(n))
    quartile = excess[int(n / 4 + 0.5) - 1]
    grid = [1 / largest + (1 - math.sqrt(size / (j - 0.5))) / (3 * quartile) for j in range(1, size + 1)]

    def shape_at(b):
        return sum(math.log1p(-b * x) for x in excess) / n

    profile = np.array([n * (math.log(-b / shape_at(b)) - shape_at(b) - 1) for b in grid])
    weights = np.exp(profile - profile.max())
    b = float(weights @ np.array(grid) / weights.sum())
    shape = shape_at(b)
    return (n * shape + 5) / (n + 10), -shape / b


def psis(log_ratios):
    x = np.asarray(log_ratios, float) - np.max(log_ratios)
    num_tail = math.ceil(min(len(x) / 5, 3 * math.sqrt(len(x))))
    order = np.argsort(x, kind="stable")
    cutoff = max(x[order[-num_tail - 1]], math.log(np.finfo(float).tiny))
    tail = [i for i in order if x[i] > cutoff]
    shape = math.inf
    if len(tail) > 4:
        shape, scale = fit(np.exp(x[tail]) - math.exp(cutoff))
        for j, i in enumerate(tail):
            survival = 1 - (j + 0.5) / len(tail)
            x[i] = min(math.log(scale * (survival**-shape - 1) / shape + math.exp(cutoff)), 0)
    return x - np.log(np.sum(np.exp(x))), shape
