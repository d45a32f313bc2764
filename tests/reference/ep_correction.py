"""What EP's log evidence leaves out, to leading order: pairs of third and fourth cumulants of the tilted densities.

EP matches two moments of each tilted density with those of q; the evidence that it then gives is exact up to a factor,
an expectation of products of the higher cumulants c_l. To second order in these,

    log p(y) − log Z_EP ≈ ½ Σ_{i≠j} Σ_{l≥3} c_l(i) c_l(j) / l! (Σ_ij / (Σ_ii Σ_jj))^l.

References:
    Opper, Paquet and Winther (2013), "Perturbative corrections for approximate inference in Gaussian latent variable
    models", second-order correction.
"""

import math

import numpy as np
from scipy import special

from tests.reference.ais import gaussian_base

_Z = np.linspace(-10.0, 10.0, 8001)  # fine, because a likelihood may be a step on the scale of its cavity


def ep_correction(K, prior_mean, log_density, lam1, lam2):
    """The terms l = 3 and l = 4 at a fixed point of EP.

    Args:
        K: (N, N) prior covariance.
        prior_mean: (N,).
        log_density: (i, f (G,)) to log p(y_i | f), (G,).
        lam1: (N,) sites of EP.
        lam2: (N,) their precisions, not negative.
    """
    mean, covariance, _ = gaussian_base(K, prior_mean, lam1, lam2)
    variance = np.diag(covariance)
    precision = 1 / variance - lam2
    cavity_mean = (mean / variance - lam1) / precision
    cumulants = np.array(
        [
            _cumulants(lambda f, i=i: log_density(i, f), cavity_mean[i], 1 / precision[i])
            for i in range(len(K))
        ]
    )
    coupling = covariance / np.outer(variance, variance)
    np.fill_diagonal(coupling, 0.0)
    return [
        float(0.5 / math.factorial(order) * c @ coupling**order @ c)
        for order, c in zip((3, 4), cumulants.T, strict=True)
    ]


def _cumulants(log_density, mean, variance):
    """Third and fourth cumulants of p(y | f) N(f; mean, variance)."""
    f = mean + np.sqrt(variance) * _Z
    log_terms = log_density(f) - 0.5 * _Z**2
    weights = np.exp(log_terms - special.logsumexp(log_terms))
    centered = f - weights @ f
    second, third, fourth = (weights @ centered**k for k in (2, 3, 4))
    return third, fourth - 3 * second**2
