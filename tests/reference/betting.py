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


def _projected(gradient_fn, num, top, bet):
    """Iterates x_{t+1} = min(bet_t(x_t, c_t), top) of one number from zero; ``bet`` sees where x is."""
    x, path = 0.0, []
    for t in range(num):
        x = min(bet(x, -float(gradient_fn(x, t))), top)
        path.append(x)
    return np.array(path)


def projected_coin(gradient_fn, num, top, unit):
    """The coin whose reward counts the displacement x of the parameters, as the published optimizer does."""
    held = {"total": 0.0, "length": 0.0, "reward": 0.0, "largest": 0.0}

    def bet(x, c):
        held["largest"] = max(held["largest"], abs(c))
        held["length"] += abs(c)
        held["reward"] = max(held["reward"] + x * c, 0.0)
        held["total"] += c
        scale = held["largest"] * (held["length"] + held["largest"])
        return held["total"] / scale * (2 * unit * held["largest"] + held["reward"])

    return _projected(gradient_fn, num, top, bet)


def projected_kt(gradient_fn, num, top, unit):
    """The bettor of Krichevsky and Trofimov whose wealth counts the displacement x of the parameters."""
    held = {"total": 0.0, "wealth": unit, "largest": 0.0, "count": 0}

    def bet(x, c):
        held["largest"] = max(held["largest"], abs(c))
        held["count"] += 1
        held["wealth"] += x * c / held["largest"]
        held["total"] += c / held["largest"]
        return held["total"] / (held["count"] + 1) * held["wealth"]

    return _projected(gradient_fn, num, top, bet)


def projected_fuse(gradient_fn, num, top, unit):
    """Distance over gradients, the distance that of the parameters."""
    held = {"distance": unit, "squares": 0.0}

    def bet(x, c):
        held["distance"] = max(held["distance"], abs(x))
        held["squares"] += c * c
        return x + held["distance"] / np.sqrt(held["squares"]) * c

    return _projected(gradient_fn, num, top, bet)
