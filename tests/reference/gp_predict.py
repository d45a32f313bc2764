"""Slow, obviously right exact Gaussian-process regression in NumPy: matrix inverses and loops."""

import numpy as np
from scipy import stats


def matern52(X, Z, variance, lengthscale):
    gram = np.empty((len(X), len(Z)))
    for i, x in enumerate(X):
        for j, z in enumerate(Z):
            r = np.sqrt(5.0) * np.sqrt(np.sum(((x - z) / lengthscale) ** 2))
            gram[i, j] = variance * (1 + r + r**2 / 3) * np.exp(-r)
    return gram


def rbf(X, Z, variance, lengthscale):
    return np.array([[variance * np.exp(-0.5 * np.sum(((x - z) / lengthscale) ** 2)) for z in Z] for x in X])


def condition(gram, y, noise, prior_mean):
    """Posterior mean and covariance of f at the training points, log evidence."""
    K = gram + np.diag(noise)
    inverse = np.linalg.inv(K)
    mean = prior_mean + gram @ inverse @ (y - prior_mean)
    covariance = gram - gram @ inverse @ gram
    log_evidence = stats.multivariate_normal(prior_mean, K).logpdf(y)
    return mean, covariance, log_evidence


def predict(gram, cross, new, y, noise, prior_mean, new_mean):
    """Posterior mean and covariance of f at new points; ``cross`` is (N, M)."""
    inverse = np.linalg.inv(gram + np.diag(noise))
    return new_mean + cross.T @ inverse @ (y - prior_mean), new - cross.T @ inverse @ cross


def leave_one_out(gram, y, noise, prior_mean):
    """log p(y_i | y_-i) by refitting without point i."""
    scores = []
    for i in range(len(y)):
        keep = np.arange(len(y)) != i
        mean, cov = predict(
            gram[np.ix_(keep, keep)],
            gram[np.ix_(keep, [i])],
            gram[np.ix_([i], [i])],
            y[keep],
            noise[keep],
            prior_mean[keep],
            prior_mean[[i]],
        )
        scores.append(stats.norm(mean[0], np.sqrt(cov[0, 0] + noise[i])).logpdf(y[i]))
    return np.array(scores)
