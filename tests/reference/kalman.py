"""Kalman filter and Rauch-Tung-Striebel smoother of a one-dimensional linear-Gaussian model, in loops."""

import numpy as np


def kalman(y, *, slope, process, noise, start):
    """x_0 ~ N(0, start), x_t = slope x_{t-1} + N(0, process), y_t = x_t + N(0, noise).

    Returns log evidence, means and variances of the filter.
    """
    log_evidence, mean, variance, means, variances = 0.0, 0.0, start, [], []
    for t, value in enumerate(y):
        if t:
            mean, variance = slope * mean, slope**2 * variance + process
        total = variance + noise
        log_evidence += -0.5 * (np.log(2 * np.pi * total) + (value - mean) ** 2 / total)
        gain = variance / total
        mean, variance = mean + gain * (value - mean), (1 - gain) * variance
        means.append(mean)
        variances.append(variance)
    return log_evidence, np.array(means), np.array(variances)


def smooth(y, *, slope, process, noise, start):
    """Means and variances of the states given all of y."""
    _, means, variances = kalman(y, slope=slope, process=process, noise=noise, start=start)
    for t in reversed(range(len(y) - 1)):
        predicted = slope**2 * variances[t] + process
        gain = slope * variances[t] / predicted
        means[t] += gain * (means[t + 1] - slope * means[t])
        variances[t] += gain**2 * (variances[t + 1] - predicted)
    return means, variances
