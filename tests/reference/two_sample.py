"""Distances between two sets of draws by double loops over pairs, in NumPy."""

import numpy as np


def unbiased(a, b, k):
    """Mean of k within a, within b (distinct pairs), and between."""
    aa = [k(x, z) for i, x in enumerate(a) for j, z in enumerate(a) if i != j]
    bb = [k(x, z) for i, x in enumerate(b) for j, z in enumerate(b) if i != j]
    return np.mean(aa), np.mean(bb), np.mean([k(x, z) for x in a for z in b])


def mmd(a, b, lengthscales):
    def k(x, z):
        return np.mean([np.exp(-np.sum((x - z) ** 2) / (2 * c**2)) for c in lengthscales])

    within_a, within_b, between = unbiased(a, b, k)
    return within_a + within_b - 2 * between


def energy(a, b):
    within_a, within_b, between = unbiased(a, b, lambda x, z: np.sqrt(np.sum((x - z) ** 2)))
    return 2 * between - within_a - within_b


def sliced(a, b, lines):
    """Each draw repeated until both sets have one size: then the quantile functions are sorted values."""
    return np.mean(
        [np.mean((np.sort(np.repeat(a @ w, len(b))) - np.sort(np.repeat(b @ w, len(a)))) ** 2) for w in lines]
    )


def median_distance(rows):
    return np.median([np.sqrt(np.sum((x - z) ** 2)) for i, x in enumerate(rows) for z in rows[:i]])
