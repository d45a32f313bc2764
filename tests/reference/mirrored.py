"""Mirrored Stein directions by loops over pairs, closed forms written out."""

import numpy as np


def imq(x, y, h):
    """Kernel (1 + r²/h)^(-1/2) and its gradient in x."""
    u = 1 + np.sum((x - y) ** 2) / h
    return u**-0.5, -(u**-1.5) * (x - y) / h


def direction(theta, inverse_hessians, scores, h):
    """Mean over j of k(j, i) s_j + H_j^-1 grad_j k(j, i); theta (N, d) are the free positions."""
    out = np.zeros_like(scores)
    for i in range(len(theta)):
        for j in range(len(theta)):
            value, slope = imq(theta[j], theta[i], h)
            out[i] += value * scores[j] + inverse_hessians[j] @ slope
    return out / len(theta)


def adapted(theta, inverse_hessians, scores, h, cutoff, jitter=1e-5):
    """The same for the kernel sum_ab sqrt(l_a l_b) u_a(i) u_b(j) mean_c u_a(c) u_b(c) H_c, matrix by matrix."""
    num, dims = theta.shape
    gram = np.array([[imq(x, y, h)[0] for y in theta] for x in theta]) + jitter * np.eye(num)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    size = int(np.sum(np.cumsum(values) / np.sum(values) < cutoff)) + 1
    values, vectors = values[:size], vectors[:, :size]
    hessians = np.linalg.inv(inverse_hessians)
    u = np.sqrt(num) * vectors
    slopes = np.array([[imq(x, y, h)[1] for y in theta] for x in theta])  # d k(b, l) / d theta_b
    grads = np.einsum("bld,lk->bkd", slopes, vectors) * np.sqrt(num) / values[None, :, None]
    roots = np.sqrt(values / num)
    out = np.zeros((num, dims))
    for i in range(num):
        for j in range(num):
            for a in range(size):
                for b in range(size):
                    gamma = np.einsum("c,cpq->pq", u[:, a] * u[:, b], hessians) / num
                    felt = u[j, b] * scores[j] + inverse_hessians[j] @ grads[j, b]
                    out[i] += roots[a] * roots[b] * u[i, a] * gamma @ felt
    return out / num
