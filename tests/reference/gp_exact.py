"""The log evidence of a Gaussian process by determinant and inverse, and in extended precision."""

import numpy as np


def rbf(x, z, variance, lengthscale):
    return np.array([[variance * np.exp(-0.5 * np.sum(((a - b) / lengthscale) ** 2)) for b in z] for a in x])


def log_evidence(gram, residual, noise):
    """log N(residual; 0, gram + diag(noise)), written out."""
    A = gram + np.diag(noise)
    sign, log_det = np.linalg.slogdet(A)
    assert sign > 0
    return -0.5 * residual @ np.linalg.inv(A) @ residual - 0.5 * log_det - 0.5 * len(A) * np.log(2 * np.pi)


def log_evidence_long_double(A, residual):
    """The same from a Cholesky factorization in extended precision, element by element."""
    A, n = np.asarray(A, np.longdouble), len(A)
    L, half = np.zeros_like(A), np.zeros(n, np.longdouble)
    for j in range(n):
        L[j, j] = np.sqrt(A[j, j] - L[j, :j] @ L[j, :j])
        for i in range(j + 1, n):
            L[i, j] = (A[i, j] - L[i, :j] @ L[j, :j]) / L[j, j]
        half[j] = (np.longdouble(residual[j]) - L[j, :j] @ half[:j]) / L[j, j]
    two_pi = 2 * np.longdouble(np.pi)
    return float(-0.5 * half @ half - np.log(np.diag(L)).sum() - 0.5 * n * np.log(two_pi))


def rbf_long_double(x, z, variance, lengthscale):
    x, z, lengthscale = (np.asarray(a).astype(np.longdouble) for a in (x, z, lengthscale))
    squared = (((x[:, None] - z[None]) / lengthscale) ** 2).sum(-1)
    return np.longdouble(variance) * np.exp(-squared / 2)


def variance_long_double(gram, cross, new, noise):
    """Posterior variances at new points, with some three digits more than float64 has."""
    A, half, n = gram + np.diag(np.asarray(noise).astype(np.longdouble)), cross.copy(), len(gram)
    L = np.zeros_like(A)
    for j in range(n):
        L[j, j] = np.sqrt(A[j, j] - L[j, :j] @ L[j, :j])
        L[j + 1 :, j] = (A[j + 1 :, j] - L[j + 1 :, :j] @ L[j, :j]) / L[j, j]
        half[j] = (half[j] - L[j, :j] @ half[:j]) / L[j, j]
    return (new - (half**2).sum(0)).astype(float)
