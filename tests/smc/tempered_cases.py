"""One family of likelihoods in two dimensions, whose data make them normal, bimodal, skewed or broken.

All share one compiled program. Evidences and moments are exact or by the trapezoidal rule, which is exact to rounding
for smooth densities that vanish at the ends.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm

from probinfer import targets
from probinfer.core.binding import LogDensity


class Case(NamedTuple):
    scales: np.ndarray  # (2,) of the normal prior
    log_shares: np.ndarray  # (2,) of two normal bumps, their normalizers included
    locs: np.ndarray  # (2, 2)
    precisions: np.ndarray  # (2, 2, 2)
    rate: float = 0.0  # of the penalty rate exp(u_0)
    cut: float = 1e6  # beyond it in u_0 the log likelihood is `bad`
    bad: float = 0.0


def bumps(shares, locs, covariances, scales, **others) -> Case:
    covariances = np.asarray(covariances)
    norms = -0.5 * np.linalg.slogdet(2 * np.pi * covariances)[1]
    with np.errstate(divide="ignore"):
        log_shares = np.log(shares) + norms
    return Case(np.asarray(scales), log_shares, np.asarray(locs), np.linalg.inv(covariances), **others)


ROUND = [[[0.3, 0.1], [0.1, 0.2]]] * 2
NORMAL = bumps([1.0, 0.0], [[1.0, -2.0]] * 2, ROUND, [1.0, 3.0])
BIMODAL = bumps([0.3, 0.7], [[-3.0, 0.0], [3.0, 1.0]], [np.eye(2) * 0.25, np.eye(2) * 0.5], [3.0, 2.0])
SKEWED = bumps([1.0, 0.0], [[0.0, 20.0]] * 2, [np.diag([9.0, 100.0])] * 2, [2.0, 30.0], rate=2.0)


def log_likelihood(locs, precisions, log_shares, rate, cut, bad, u):
    centered = u - locs
    values = log_shares - 0.5 * jnp.einsum("ki,kij,kj->k", centered, precisions, centered)
    top = jnp.max(values)
    value = top + jnp.log(jnp.sum(jnp.exp(values - top))) - rate * jnp.exp(u[0])
    return jnp.where(u[0] > cut, bad, value)


def log_joint(scales, likelihood, u):
    return jnp.sum(-0.5 * (u / scales) ** 2 - jnp.log(scales) - 0.5 * np.log(2 * np.pi)) + likelihood(u)


def likelihood_of(case: Case) -> LogDensity:
    dtype = jnp.result_type(float)
    data = (case.locs, case.precisions, case.log_shares, case.rate, case.cut, case.bad)
    return LogDensity(log_likelihood, *(jnp.asarray(value, dtype) for value in data))


def target_of(case: Case) -> targets.Target:
    scales = jnp.asarray(case.scales, jnp.result_type(float))
    return targets.from_prior(dist.Normal(jnp.zeros(2), scales), likelihood_of(case))


def without_prior(case: Case) -> targets.Target:
    scales = jnp.asarray(case.scales, jnp.result_type(float))
    return targets.from_logdensity(LogDensity(log_joint, scales, likelihood_of(case)), jnp.zeros(2))


class Truth(NamedTuple):
    log_evidence: float
    mean: np.ndarray
    sd: np.ndarray


def truth(case: Case, num: int = 801) -> Truth:
    axes = [np.linspace(-9 * scale, 9 * scale, num) for scale in case.scales]
    u = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    centered = u[:, :, None, :] - case.locs
    quadratic = np.einsum("abki,kij,abkj->abk", centered, case.precisions, centered)
    log_density = logsumexp(case.log_shares - 0.5 * quadratic, axis=-1) - case.rate * np.exp(u[..., 0])
    log_density += multivariate_normal(np.zeros(2), np.diag(case.scales**2)).logpdf(u)
    cell = np.prod([axis[1] - axis[0] for axis in axes])
    log_evidence = logsumexp(log_density) + np.log(cell)
    weight = np.exp(log_density - log_evidence) * cell
    mean = np.einsum("ab,abi->i", weight, u)
    return Truth(log_evidence, mean, np.sqrt(np.einsum("ab,abi->i", weight, (u - mean) ** 2)))


def conjugate() -> tuple[float, np.ndarray, np.ndarray]:
    """Log evidence, posterior mean and covariance of ``NORMAL``."""
    noise, prior, y = np.linalg.inv(NORMAL.precisions[0]), np.diag(NORMAL.scales**2), NORMAL.locs[0]
    covariance = np.linalg.inv(np.linalg.inv(prior) + NORMAL.precisions[0])
    return (
        multivariate_normal(np.zeros(2), prior + noise).logpdf(y),
        covariance @ NORMAL.precisions[0] @ y,
        covariance,
    )


def log_evidence_below(cut: float) -> float:
    """That of ``NORMAL`` where the likelihood is zero for u_0 above the cut."""
    log_evidence, mean, covariance = conjugate()
    return log_evidence + norm.logcdf(cut, mean[0], np.sqrt(covariance[0, 0]))
