"""A short annealing of N(0, 1) into N(0, 1) N(y; theta, s²), forward and in reverse, all runs side by side in NumPy.

The densities p_t = N(0, 1) N(y; theta, s²)^t are normal, N(m_t, v_t), and the transition
theta' = m_t + r (theta - m_t) + sqrt((1 - r²) v_t) e is invariant and reversible for p_t. Forward from the prior
log w = sum_k (t_k - t_{k-1}) log N(y; theta_{k-1}, s²), theta_k after the transition at t_k. The reverse run starts
at a draw of p_1, applies the same transitions in the opposite order, and sums the same terms.
"""

import itertools

import numpy as np


def moments(y, s, t):
    v = 1 / (1 + t / s**2)
    return v * t * y / s**2, v


def log_evidence(y, s):
    return -0.5 * np.log(2 * np.pi * (1 + s**2)) - 0.5 * y**2 / (1 + s**2)


def log_likelihood(theta, y, s):
    return -0.5 * np.log(2 * np.pi * s**2) - 0.5 * (y - theta) ** 2 / s**2


def transition(rng, theta, y, s, t, memory):
    m, v = moments(y, s, t)
    return m + memory * (theta - m) + np.sqrt((1 - memory**2) * v) * rng.standard_normal(theta.shape)


def forward(rng, y, s, temperatures, num_runs, memory=0.5):
    """Log weights and final states."""
    theta = rng.standard_normal(num_runs)
    log_weights = np.zeros(num_runs)
    for before, after in itertools.pairwise(temperatures):
        log_weights += (after - before) * log_likelihood(theta, y, s)
        theta = transition(rng, theta, y, s, after, memory)
    return log_weights, theta


def reverse(rng, y, s, temperatures, num_runs, memory=0.5, start_sd=1.0):
    """Log weights from exact draws of the posterior (``start_sd`` other than 1 spoils them)."""
    m, v = moments(y, s, 1.0)
    theta = m + start_sd * np.sqrt(v) * rng.standard_normal(num_runs)
    log_weights = np.zeros(num_runs)
    for before, after in zip(temperatures[-2::-1], temperatures[:0:-1]):
        theta = transition(rng, theta, y, s, after, memory)
        log_weights += (after - before) * log_likelihood(theta, y, s)
    return log_weights
