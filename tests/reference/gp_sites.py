"""Approximate inference the slow way: NumPy inverses, one site at a time, integrals by sums over grids.

A problem is (K, prior_mean, log_densities), log_densities[i](f) = log p(y_i | f) over an array of f. Expectations under
q = N(m, v) are trapezoid sums in z = (f − m)/√v, which converge exponentially for smooth integrands. Cavities can be a
hundred times as wide as q: sums over them reach as far as their integrand does. Densities can be a hundred times as
narrow as q: the spacing is halved until every second point says the same.
"""

from functools import partial

import numpy as np
from scipy import optimize
from scipy.special import logsumexp

SPACING, WIDEST, MOST = 1 / 30, 2560.0, 2**22


def _grid(width, spacing=SPACING):
    Z = np.linspace(-width, width, 2 * round(width / spacing) + 1)
    return Z, -0.5 * Z**2 - logsumexp(-0.5 * Z**2)


Z, LOG_WEIGHTS = _grid(40.0)


def expected(fn, m, v):
    """E[(1, z, z² − 1) fn(f)] under N(m, v)."""
    z, log_weights = Z, LOG_WEIGHTS
    while True:
        terms = np.exp(log_weights) * fn(m + np.sqrt(v) * z)
        moments = np.array([terms.sum(), terms @ z, terms @ (z**2 - 1)])
        half = 2 * np.array([terms[::2].sum(), terms[::2] @ z[::2], terms[::2] @ (z[::2] ** 2 - 1)])
        size = np.abs(terms) @ (1 + z**2)
        if np.max(np.abs(moments - half)) < 1e-13 * size or len(z) > MOST:
            return moments
        z, log_weights = _grid(40.0, (z[1] - z[0]) / 2)


def condition(K, prior_mean, lam1, lam2):
    """Mean and covariance of N(f; prior_mean, K) Π exp(lam1 f − ½ lam2 f²), and the log of its integral."""
    inverse = np.linalg.inv(K)
    covariance = np.linalg.inv(inverse + np.diag(lam2))
    covariance = (covariance + covariance.T) / 2
    natural = inverse @ prior_mean + lam1
    mean = covariance @ natural
    log_z = 0.5 * (natural @ mean - prior_mean @ inverse @ prior_mean)
    log_z += 0.5 * (np.linalg.slogdet(covariance)[1] - np.linalg.slogdet(K)[1])
    return mean, covariance, log_z


def condition_without_inverse(K, prior_mean, lam1, lam2):
    """The same where K is singular to working precision: Σ = (I + KΛ)⁻¹K."""
    scaled = np.eye(len(K)) + K * lam2
    covariance = np.linalg.solve(scaled, K)
    natural = lam1 - lam2 * prior_mean
    mean = prior_mean + covariance @ natural
    log_z = lam1 @ prior_mean - 0.5 * lam2 @ prior_mean**2 + 0.5 * natural @ covariance @ natural
    return mean, covariance, log_z - 0.5 * np.linalg.slogdet(scaled)[1]


def predict(kernel_new, cross, K, prior_mean, lam1, lam2):
    """Mean and covariance of f at new points where the prior mean is zero."""
    mean, covariance, _ = condition(K, prior_mean, lam1, lam2)
    weights = np.linalg.solve(K, cross)
    return weights.T @ (mean - prior_mean), kernel_new + weights.T @ (covariance - K) @ weights


def _ratio_terms(log_density, m, v, lam1, lam2, power):
    if not v > 0:
        return Z, np.full_like(Z, np.nan)
    width, spacing, (z, log_weights) = 40.0, SPACING, (Z, LOG_WEIGHTS)
    while True:
        f = m + np.sqrt(v) * z
        terms = log_weights + power * (log_density(f) - lam1 * f + 0.5 * lam2 * f**2)
        if not (max(terms[0], terms[-1]) < np.max(terms) - 35 or width >= WIDEST):
            width *= 4
        elif abs(logsumexp(terms[::2]) + np.log(2) - logsumexp(terms)) < 1e-12 or len(z) > MOST:
            return f, terms
        else:
            spacing /= 2
        z, log_weights = _grid(width, spacing)


def _log_ratio(log_density, lam1, lam2, f):
    return log_density(f) - lam1 * f + 0.5 * lam2 * f**2


def energy(problem, lam1, lam2, power, condition=condition):
    """log Z + Σ (1/η) log E_q[(p/t)^η]; for η = 0 the evidence lower bound."""
    K, prior_mean, log_densities = problem
    mean, covariance, total = condition(K, prior_mean, lam1, lam2)
    for i, log_density in enumerate(log_densities):
        if power:
            _, terms = _ratio_terms(log_density, mean[i], covariance[i, i], lam1[i], lam2[i], power)
            total += logsumexp(terms) / power
        else:
            terms = partial(_log_ratio, log_density, lam1[i], lam2[i])
            total += expected(terms, mean[i], covariance[i, i])[0]
    return total


def ep_site(power):
    """The site of (power) EP as a function of the log density, the marginal and the old site."""

    def site(log_density, m, v, lam1, lam2):
        f, terms = _ratio_terms(log_density, m, v, lam1, lam2, power)
        weights = np.exp(terms - logsumexp(terms))
        mean = weights @ f
        variance = weights @ (f - mean) ** 2
        return lam1 + (mean / variance - m / v) / power, lam2 + (1 / variance - 1 / v) / power

    return site


def vi_site(log_density, m, v, lam1, lam2):
    """The site of variational inference, λ2 = −E[ℓ″], λ1 = E[ℓ′] + λ2 m, with derivatives by Stein's identity."""
    _, first, second = expected(log_density, m, v)
    first, second = first / np.sqrt(v), second / v
    return first - second * m, -second


def ep(problem, power=1.0, damping=0.7, tolerance=1e-11):
    """Sites of (power) EP: one at a time, the posterior inverted anew before each."""
    return _iterate(problem, ep_site(power), damping, tolerance)


def vi(problem, damping=0.5, tolerance=1e-11):
    """Sites of variational inference."""
    return _iterate(problem, vi_site, damping, tolerance)


def site_residual(problem, site, lam1, lam2):
    """The largest change of a site by one more update, around the mean and in posterior standard deviations."""
    K, prior_mean, log_densities = problem
    mean, covariance, _ = condition_without_inverse(K, prior_mean, lam1, lam2)
    worst = 0.0
    for i, log_density in enumerate(log_densities):
        m, v = mean[i], covariance[i, i]
        new1, new2 = site(log_density, m, v, lam1[i], lam2[i])
        change1, change2 = new1 - lam1[i], new2 - lam2[i]
        worst = max(worst, abs(np.sqrt(v) * (change1 - m * change2)), abs(v * change2))
    return worst


def _iterate(problem, site, damping, tolerance):
    K, prior_mean, log_densities = problem
    lam1, lam2 = np.zeros(len(K)), np.zeros(len(K))
    for _ in range(2000):
        change = 0.0
        for i, log_density in enumerate(log_densities):
            mean, covariance, _ = condition(K, prior_mean, lam1, lam2)
            new = site(log_density, mean[i], covariance[i, i], lam1[i], lam2[i])
            step = damping * (new[0] - lam1[i]), damping * (new[1] - lam2[i])
            lam1[i], lam2[i] = lam1[i] + step[0], lam2[i] + step[1]
            change = max(change, abs(step[0]), abs(step[1]))
        if change < tolerance:
            return lam1, lam2
    raise AssertionError(f"the oracle did not converge: {change}")


def slope_and_curvature(log_density, f, step=2e-3):
    """First and second derivative by differences of order four; errors about 1e-12 and 1e-9."""
    low2, low1, here, high1, high2 = (log_density(f + k * step) for k in (-2, -1, 0, 1, 2))
    slope = (low2 - 8 * low1 + 8 * high1 - high2) / (12 * step)
    curvature = (-low2 + 16 * low1 - 30 * here + 16 * high1 - high2) / (12 * step**2)
    return slope, curvature


def laplace(problem, start=None):
    """Sites of Laplace's approximation and its evidence, by a root of f − μ − K ∇log p(f)."""
    K, prior_mean, log_densities = problem

    def slopes(f):
        return np.array([slope_and_curvature(fn, x)[0] for fn, x in zip(log_densities, f)])

    found = optimize.root(
        lambda f: f - prior_mean - K @ slopes(f), prior_mean if start is None else start, tol=1e-13
    )
    f, slope = found.x, slopes(found.x)
    curvature = np.array([slope_and_curvature(fn, x)[1] for fn, x in zip(log_densities, f)])
    log_det = np.linalg.slogdet(np.eye(len(K)) - K * curvature)[1]
    log_p = sum(fn(x) for fn, x in zip(log_densities, f))
    return (
        slope - curvature * f,
        -curvature,
        log_p - 0.5 * (f - prior_mean) @ np.linalg.solve(K, f - prior_mean) - 0.5 * log_det,
    )


def cavities(problem, lam1, lam2):
    """log ∫ p(y_i | f) N(f; cavity) df, each cavity conditioned on all the other sites."""
    K, prior_mean, log_densities = problem
    densities = []
    for i, log_density in enumerate(log_densities):
        keep = np.arange(len(K)) != i
        mean, covariance, _ = condition(K, prior_mean, lam1 * keep, lam2 * keep)
        densities.append(logsumexp(_ratio_terms(log_density, mean[i], covariance[i, i], 0.0, 0.0, 1.0)[1]))
    return np.array(densities)


def log_evidence(problem, order=20):
    """log ∫ p(y | f) N(f; prior_mean, K) df by a tensor product of Gauss-Hermite rules centered at EP's posterior."""
    K, prior_mean, log_densities = problem
    lam1, lam2 = ep(problem, tolerance=1e-6)
    mean, covariance, _ = condition(K, prior_mean, lam1, lam2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    index = np.indices((order,) * len(K)).reshape(len(K), -1).T
    z, log_weights = nodes[index], np.log(weights)[index].sum(1)
    chol = np.linalg.cholesky(covariance)
    f = mean + z @ chol.T
    centered = f - prior_mean
    log_prior = -0.5 * np.einsum("ij,ji->i", centered, np.linalg.solve(K, centered.T))
    log_p = sum(log_density(f[:, i]) for i, log_density in enumerate(log_densities))
    total = logsumexp(log_weights + log_p + log_prior + 0.5 * (z**2).sum(1))
    constants = np.log(np.diag(chol)).sum() - 0.5 * np.linalg.slogdet(K)[1]
    return total + constants - 0.5 * len(K) * np.log(2 * np.pi)


def leave_one_out(problem, order=20):
    """log p(y_i | y_-i) as a ratio of evidences."""
    K, prior_mean, log_densities = problem
    whole, parts = log_evidence(problem, order), []
    for i in range(len(K)):
        keep = np.arange(len(K)) != i
        others = [fn for fn, kept in zip(log_densities, keep) if kept]
        parts.append(log_evidence((K[np.ix_(keep, keep)], prior_mean[keep], others), order))
    return whole - np.array(parts)
