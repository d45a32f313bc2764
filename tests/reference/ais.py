"""The evidence of a latent Gaussian model by annealed importance sampling, in NumPy, all runs side by side.

The joint density is N(f; μ, K) Π p(y_i | f_i). Each run starts with an exact draw of a Gaussian base, N(f; μ, K)
Π t_i(f_i) over its integral Z₀, t_i(f) = exp(λ1 f − ½ λ2 f²), and goes through base × Π (p/t)^τ, τ from 0 to 1, by
transitions of elliptical slice sampling, which leave each density invariant and have nothing to tune. Without sites
(λ = 0) the base is the prior: that is Neal's annealing of the likelihood. The weight of a run,

    log w = log Z₀ + Σ_k (τ_k − τ_{k−1}) Σ_i log (p/t)(f_i at τ_{k−1}),

satisfies E[w] = p(y) exactly, whatever the sites, the temperatures, and however slowly the transitions mix: sites of an
approximation make the variance small, and cannot move the expectation. The estimate log mean w has a negative expected
error, about −var(w) / (2 R E[w]²) for R runs, and by Markov's inequality it exceeds log p(y) + c with probability at
most exp(−c).

Intervals are those of the delta method, log mean w ± q sd(w) / (√R mean(w)), q Student's quantile with R − 1 degrees of
freedom. They hold while the weights are of one size; ``Evidence.ess`` = (Σ w)² / Σ w² says whether they are. Where it
is a small part of R the interval covers less often than it says, and errs on the low side.

References:
    Neal (2001), "Annealed importance sampling"; Murray, Adams and MacKay (2010), "Elliptical slice sampling", figure 2;
    Fagan, Bhandari and Cunningham (2016), "Elliptical slice sampling with expectation propagation" (the base).
"""

from typing import NamedTuple

import numpy as np
from scipy import special, stats


class Evidence(NamedTuple):
    """Log mean weight, half the width of its interval, and the effective number of runs."""

    log_evidence: float
    half_width: float
    ess: float


def summarize(log_weights, level=0.95):
    """The estimate from the log weights of independent runs."""
    count = len(log_weights)
    log_mean = special.logsumexp(log_weights) - np.log(count)
    relative = np.exp(log_weights - log_mean)  # of mean 1
    quantile = stats.t.ppf(0.5 + level / 2, count - 1)
    half_width = quantile * relative.std(ddof=1) / np.sqrt(count)
    return Evidence(float(log_mean), float(half_width), float(count / np.mean(relative**2)))


def power_ladder(num, power=3.0):
    """Temperatures (k/num)^power, k = 0, ..., num: dense where the base is left, where the weights spread most."""
    return np.linspace(0.0, 1.0, num + 1) ** power


def gaussian_base(K, prior_mean, lam1, lam2):
    """Mean, covariance and log integral of N(f; μ, K) Π exp(λ1 f − ½ λ2 f²), λ2 ≥ 0; K may be singular."""
    root = np.sqrt(lam2)
    half = np.linalg.cholesky(np.eye(len(K)) + root[:, None] * K * root)
    T = np.linalg.solve(half, root[:, None] * K)
    covariance = K - T.T @ T
    slope = lam1 - lam2 * prior_mean  # of the log sites at the prior mean
    shift = covariance @ slope
    log_z = np.sum(lam1 * prior_mean - 0.5 * lam2 * prior_mean**2) + 0.5 * slope @ shift
    return prior_mean + shift, covariance, log_z - np.log(np.diag(half)).sum()


def annealed(rng, K, prior_mean, log_density, temperatures, num_runs, sites=None):
    """Annealed importance sampling of log p(y), y given through ``log_density``.

    Args:
        rng: a NumPy generator.
        K: (N, N) prior covariance; may be singular.
        prior_mean: (N,).
        log_density: (R, N) latent values to (R, N) log p(y_i | f_i).
        temperatures: (T + 1,) increasing from 0 to 1.
        num_runs: R independent runs.
        sites: (λ1, λ2) of the base, each (N,); None for the prior.

    Returns:
        (R,) log weights, and the (T, R) sums of log p/t that they are made of.
    """
    lam1, lam2 = np.zeros((2, len(K))) if sites is None else sites
    mean, covariance, log_z = gaussian_base(K, prior_mean, lam1, lam2)

    def log_factor(centered):
        f = mean + centered
        return np.sum(log_density(f) - f * (lam1 - 0.5 * lam2 * f), 1)

    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))).T  # rootᵀ root = covariance
    f = rng.standard_normal((num_runs, len(K))) @ root
    value = log_factor(f)
    path = np.empty((len(temperatures) - 1, num_runs))
    for k, temperature in enumerate(temperatures[1:]):
        path[k] = value
        auxiliary = rng.standard_normal(f.shape) @ root
        f, value = _slice(rng, f, value, auxiliary, temperature, log_factor)
    return log_z + np.diff(temperatures) @ path, path


def _slice(rng, f, value, auxiliary, temperature, log_factor):
    """One transition on N(f; 0, covariance) exp(τ log_factor(f)) a row: its arc shrinks until a point on it is high."""
    log_height = temperature * value - rng.exponential(size=len(f))
    angle = rng.uniform(0.0, 2 * np.pi, len(f))
    low, high = angle - 2 * np.pi, angle.copy()
    new, new_value = np.empty_like(f), np.empty_like(value)
    pending = np.arange(len(f))
    while pending.size:
        at = angle[pending]
        trial = np.cos(at)[:, None] * f[pending] + np.sin(at)[:, None] * auxiliary[pending]
        trial_value = log_factor(trial)
        accepted = temperature * trial_value >= log_height[pending]
        new[pending[accepted]], new_value[pending[accepted]] = trial[accepted], trial_value[accepted]
        pending, at = pending[~accepted], at[~accepted]
        low[pending] = np.where(at < 0, at, low[pending])
        high[pending] = np.where(at < 0, high[pending], at)
        angle[pending] = rng.uniform(low[pending], high[pending])
    return new, new_value
