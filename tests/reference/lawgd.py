"""LAWGD in NumPy: the exact functions of a normal density, a dense diffusion matrix, double loops over pairs."""

import math

import numpy as np
from numpy.polynomial import hermite_e


def hermite(num, w):
    """Eigenfunctions 1 ... num of N(0, 1) and their derivatives at the points w: (num, n) each; rates 1 ... num."""
    norms = [math.sqrt(math.factorial(k)) for k in range(1, num + 1)]
    unit = np.eye(num + 1)[1:]
    values = [hermite_e.hermeval(w, c) / norm for c, norm in zip(unit, norms)]
    slopes = [hermite_e.hermeval(w, hermite_e.hermeder(c)) / norm for c, norm in zip(unit, norms)]
    return np.array(values), np.array(slopes)


def direction(values, slopes, rates):
    """-1/N sum_j sum_k slope_k(x_i) value_k(x_j) / rate_k, pair by pair; values and slopes (K, N)."""
    found = np.zeros(values.shape[1])
    for i in range(values.shape[1]):
        for j in range(values.shape[1]):
            for k, rate in enumerate(rates):
                found[i] -= slopes[k, i] * values[k, j] / rate / values.shape[1]
    return found


def generator(log_density, spacing):
    """The diffusion operator L as a dense matrix on the flattened grid, built node by node; not symmetric."""
    grid = list(np.ndindex(*log_density.shape))
    place = {index: i for i, index in enumerate(grid)}
    L = np.zeros((len(grid), len(grid)))
    for index, i in place.items():
        for axis, step in enumerate(spacing):
            for move in (-1, 1):
                other = tuple(v + move * (k == axis) for k, v in enumerate(index))
                if other in place:
                    flow = math.exp((log_density[other] - log_density[index]) / 2) / step**2
                    L[i, i] += flow
                    L[i, place[other]] -= flow
    return L
