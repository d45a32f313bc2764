"""Ranks of distances from the middle of a normal posterior, by quadrature over order statistics."""

import numpy as np
from scipy import stats

__all__ = ["law"]


def law(dims, num_draws, bias, scale):
    """P(rank < m), m = 1 ... L: draws from N(bias e_1, scale^2 I), a true value from N(0, I), a reference at zero."""
    at, weights = np.polynomial.legendre.leggauss(40)
    edges = np.arange(1, num_draws + 1)[:, None]
    quantiles = stats.beta.ppf((at + 1) / 2, edges, num_draws + 1 - edges)
    squared = scale**2 * (
        stats.ncx2.ppf(quantiles, dims, (bias / scale) ** 2) if bias else stats.chi2.ppf(quantiles, dims)
    )
    return stats.chi2.cdf(squared, dims) @ weights / 2
