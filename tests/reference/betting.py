"""Slow bets in NumPy: one number, one vector at a time."""

import numpy as np


def coin(outcomes, unit, alpha=0.0):
    """Displacements after every outcome of one group, ``outcomes`` (T, n)."""
    outcomes = np.asarray(outcomes, float)
    total, zeta = np.zeros(outcomes.shape[1]), np.zeros(outcomes.shape[1])
    length = reward = largest = 0.0
    path = []
    for c in outcomes:
        size = np.sqrt(np.sum(c**2))
        largest = max(largest, size)
        length += size
        reward = max(reward + np.sum(zeta * c), 0.0)
        total = total + c
        if largest > 0:
            scale = largest * max(length + largest, alpha * largest)
            zeta = total / scale * (2 * unit * largest + reward)
        path.append(zeta)
    return np.array(path)


def kt(outcomes, unit):
    """Displacements and wealth after every outcome of one group."""
    outcomes = np.asarray(outcomes, float)
    total, zeta = np.zeros(outcomes.shape[1]), np.zeros(outcomes.shape[1])
    wealth, largest, count = unit, 0.0, 0
    path, wealths = [], []
    for c in outcomes:
        largest = max(largest, np.sqrt(np.sum(c**2)))
        if largest > 0:
            count += 1
            wealth += np.sum(zeta * c / largest)
            total = total + c / largest
        zeta = total / (count + 1) * wealth
        path.append(zeta)
        wealths.append(wealth)
    return np.array(path), np.array(wealths)


def fuse(outcomes, unit):
    """Displacements of a cloud (T, N, n)."""
    outcomes = np.asarray(outcomes, float)
    zeta, distance, squares, path = np.zeros(outcomes.shape[1:]), unit, 0.0, []
    for c in outcomes:
        distance = max(distance, np.sqrt(np.mean(np.sum(zeta**2, axis=1))))
        squares += np.mean(np.sum(c**2, axis=1))
        zeta = zeta + (distance / np.sqrt(squares) * c if squares > 0 else 0.0)
        path.append(zeta)
    return np.array(path)


def restarts(outcomes, start):
    """Displacements of one number without a unit: coins from step 16 to 64, else distance over gradients."""
    unit, anchor, begin, path = 1e-6 * (1 + abs(start)), 0.0, 0, []
    for end in (16, 32, 64, 128, 256):
        part = np.asarray(outcomes, float)[begin:end, None]
        if len(part) == 0:
            break
        zeta = coin(part, unit)[:, 0] if 16 < end <= 64 else _walk(part[:, 0], unit)
        path += list(anchor + zeta)
        anchor, begin = path[-1], end
        farthest = np.max(np.abs(zeta))
        unit = 0.25 * farthest if farthest > 0 else unit
    return np.array(path)


def _walk(outcomes, unit):
    zeta = farthest = squares = 0.0
    path = []
    for c in outcomes:
        squares += c**2
        if squares > 0:
            zeta += max(unit, farthest) / np.sqrt(squares) * c
        farthest = max(farthest, abs(zeta))
        path.append(zeta)
    return np.array(path)
