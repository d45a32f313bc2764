"""The Stein operator pair by pair in NumPy, for k(x, z) = (1 + |(x − z)/c|²)^(−a)."""

import numpy as np


def kernel(x, z, scale, power):
    """Value, gradients with respect to x and z, and the trace of the mixed derivatives."""
    r = (x - z) / scale**2
    base = 1 + np.sum((x - z) ** 2 / scale**2)
    value = base**-power
    dx = -2 * power * base ** (-power - 1) * r
    trace = 2 * power * base ** (-power - 1) * np.sum(1 / scale**2)
    trace -= 4 * power * (power + 1) * base ** (-power - 2) * np.sum(r**2)
    return value, dx, -dx, trace


def direction(particles, scores, scale, power):
    result = np.zeros_like(particles)
    for i, x in enumerate(particles):
        for y, s in zip(particles, scores):
            value, dy, _, _ = kernel(y, x, scale, power)
            result[i] += (value * s + dy) / len(particles)
    return result


def gram(X, SX, Z, SZ, scale, power):
    result = np.zeros((len(X), len(Z)))
    for i, (x, s) in enumerate(zip(X, SX)):
        for j, (z, t) in enumerate(zip(Z, SZ)):
            value, dx, dz, trace = kernel(x, z, scale, power)
            result[i, j] = s @ t * value + s @ dz + t @ dx + trace
    return result
