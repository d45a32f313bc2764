"""Coin sampling step by step in NumPy, with loops over particles: the default rule and the published one."""

import numpy as np


def quantile_of_pairs(z, share):
    squares = sorted(np.sum((z[i] - z[j]) ** 2) for i in range(len(z)) for j in range(i))
    return squares[max(int(np.ceil(share * len(squares))), 1) - 1]


def bandwidth(rule, z, step, n=None):
    n = len(z) if n is None else n
    if rule == "published":  # the median over all n² ordered pairs, the n zeros of the diagonal among them
        return quantile_of_pairs(z, (n - 2) / (2 * (n - 1))) / np.log(n + 1)
    return quantile_of_pairs(z, 0.5 * 0.04 ** (1 - min(step / 32, 1)))


def direction(z, scores, h):
    phi = np.zeros_like(z)
    for i in range(len(z)):
        for j in range(len(z)):
            k = np.exp(-np.sum((z[i] - z[j]) ** 2) / h)
            phi[i] += (k * scores[j] - 2 / h * (z[j] - z[i]) * k) / len(z)
    return phi


class Coin:
    def __init__(self, z, unit):
        self.unit = unit
        self.L = self.A = self.R = self.S = self.zeta = np.zeros_like(z)

    def move(self, c):
        self.L = np.maximum(self.L, abs(c))
        self.A, self.S = self.A + abs(c), self.S + c
        self.R = np.maximum(self.R + self.zeta * c, 0)
        old, self.zeta = self.zeta, self.S / (self.L * (self.A + self.L)) * (2 * self.unit * self.L + self.R)
        return self.zeta - old


class Fuse:
    def __init__(self, z, unit):
        self.far, self.G, self.zeta = unit, 0.0, np.zeros_like(z)

    def move(self, c):
        self.far = max(self.far, np.sqrt(np.mean(np.sum(self.zeta**2, axis=1))))
        self.G += np.mean(np.sum(c**2, axis=1))
        step = self.far / np.sqrt(self.G) * c
        self.zeta = self.zeta + step
        return step


def published(x, score, steps, sources=None):
    """With ``sources`` the bandwidth is that of so many particles (some of which have no score)."""
    x, bet = x.copy(), Coin(x, 0.5)
    for step in range(steps):
        x = x + bet.move(direction(x, score(x), bandwidth("published", x, step, sources)))
    return x


def default(x, score, steps):
    """Full metric relative to the last one, restarts, a coin for 64 steps, then distance over gradients."""
    n, d = x.shape
    center, B = x.mean(0), np.diag(x.std(0))
    z = (x - center) / x.std(0)
    bet, age, settled = Coin(z, 0.1), 0, False
    for step in range(steps):
        x = center + z @ B.T
        spread, s = z.std(0), score(x)
        virial = np.mean((x - x.mean(0)) * s, axis=0)
        stale = np.any((spread > 2) | (spread < 0.5))
        due = age in (8, 16, 32, 64, 128, 256) or (not settled and age > 0 and age % 64 == 0)
        if due:
            fits = np.all((spread < 1.25) & (spread > 0.8)) and np.all(abs(virial + 1) <= 0.5)
            settled = age >= 64 and fits
        if stale:
            age, settled = 0, False
        if stale or due:
            mean, C, shrink = z.mean(0), np.cov(z.T, bias=True), min(1, d / n)
            L = np.linalg.cholesky((1 - shrink) * C + shrink * np.diag(np.diag(C)))
            center, z, B = center + B @ mean, np.linalg.solve(L, (z - mean).T).T, B @ L
            bet = Fuse(z, 0.1) if settled else Coin(z, 0.1)
        z = z + bet.move(direction(z, s @ B, bandwidth("median", z, step)))
        age += 1
    return center + z @ B.T, settled
