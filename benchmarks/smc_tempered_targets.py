"""Targets of ``smc_tempered.py`` whose evidence and moments are known."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from probinfer import data, gp
from probinfer import targets as ours
from probinfer.core.binding import LogDensity

__all__ = ["TARGETS", "Case"]


class Case(NamedTuple):
    """A target; ``mean`` and ``sd`` (d,) of its unconstrained coordinates."""

    target: Any
    log_evidence: float
    mean: np.ndarray
    sd: np.ndarray
    num_particles: int = 256
    without: tuple[str, ...] = ("nuts",)
    num_peers: int = 5


def log_mixture(locs, precisions, log_shares, u):
    """Log likelihood: a mixture of normals."""
    centered = u - locs
    values = log_shares - 0.5 * jnp.einsum("ki,kij,kj->k", centered, precisions, centered)
    return jax.scipy.special.logsumexp(values)


def mixture(locs, covariances, shares, prior_sd: float) -> Case:
    """Return a normal prior with a mixture of normals as likelihood: a mixture of conjugate posteriors."""
    d = locs.shape[1]
    prior = prior_sd**2 * np.eye(d)
    precisions = np.linalg.inv(covariances)
    log_shares = np.log(shares) - 0.5 * np.linalg.slogdet(2 * np.pi * covariances)[1]
    pieces = np.array(
        [
            np.log(share) + multivariate_normal(np.zeros(d), prior + covariance).logpdf(loc)
            for share, loc, covariance in zip(shares, locs, covariances)
        ]
    )
    log_evidence = float(logsumexp(pieces))
    weights = np.exp(pieces - log_evidence)
    inner = np.linalg.inv(np.linalg.inv(prior) + precisions)
    means = np.einsum("kij,kjl,kl->ki", inner, precisions, locs)
    mean = weights @ means
    second = weights @ (np.einsum("kii->ki", inner) + means**2)
    likelihood = LogDensity(log_mixture, jnp.asarray(locs), jnp.asarray(precisions), jnp.asarray(log_shares))
    target = ours.from_prior(dist.Normal(jnp.zeros(d), prior_sd), likelihood)
    return Case(target=target, log_evidence=log_evidence, mean=mean, sd=np.sqrt(second - mean**2))


def normal(d: int) -> Case:
    """A normal with correlations 0.9 of neighbors and scales from 0.1 to 1; the data are drawn from the model."""
    scales = np.geomspace(0.1, 1, d)
    covariance = 0.9 ** np.abs(np.subtract.outer(np.arange(d), np.arange(d))) * np.outer(scales, scales)
    rng = np.random.default_rng(d)
    y = rng.normal(size=d) + np.linalg.cholesky(covariance) @ rng.normal(size=d)
    return mixture(y[None], covariance[None], np.ones(1), 1.0)


def two_modes(d: int) -> Case:
    """Two modes with weights 0.3 and 0.7, at distance 6 in each coordinate, one with twice the variance."""
    locs = np.stack([np.full(d, -3.0), np.full(d, 3.0)])
    return mixture(locs, np.stack([0.25 * np.eye(d), 0.5 * np.eye(d)]), np.array([0.3, 0.7]), 3.0)


def nile(num: int = 40) -> Case:
    """Variance, lengthscale and noise of a squared-exponential process on the first years of the Nile."""
    table = data.nile()
    X, y = table.X[:num], table.y[:num]
    X, y = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    model = gp.Model(gp.kernels.RBF(1.0, 1.0), gp.likelihoods.Gaussian(0.5))
    priors = {
        "kernel.variance": dist.LogNormal(0.0, 1.0),
        "kernel.lengthscale": dist.LogNormal(0.0, 1.0),
        "likelihood.variance": dist.LogNormal(-1.0, 1.0),
    }
    prior = gp.replace(gp.default_prior(model, X), priors)
    _, target = gp.hyper_posterior(model, prior, jnp.asarray(X), jnp.asarray(y), gp.Exact())
    wide = [(-7.0, 7.0), (-7.0, 7.0), (-8.0, 6.0)]  # prior standard deviations, by sorted names
    box = ends_of_mass(trapezoid(target, wide, 41))
    fine, coarse = (trapezoid(target, box, points) for points in (71, 61))
    if abs(fine[0] - coarse[0]) > 1e-6:
        raise RuntimeError(f"the grids disagree by {fine[0] - coarse[0]:.1e} nats")
    return Case(target, *fine[:3], num_particles=128, num_peers=3)


def trapezoid(target: Any, box: list, points: int) -> tuple:
    """Log evidence, mean and sd by the trapezoidal rule; axes and weights."""
    names = sorted(target.prior.sample(jax.random.key(0)))
    axes = [np.linspace(low, high, points) for low, high in box]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(names))
    rows = {name: jnp.asarray(grid[:, i]) for i, name in enumerate(names)}
    values = np.asarray(jax.jit(lambda rows: jax.lax.map(target.logdensity_fn, rows))(rows))
    log_evidence = float(logsumexp(values) + np.sum([np.log(axis[1] - axis[0]) for axis in axes]))
    weights = np.exp(values - logsumexp(values))
    mean = weights @ grid
    sd = np.sqrt(weights @ (grid - mean) ** 2)
    return log_evidence, mean, sd, axes, weights.reshape([points] * len(axes))


def ends_of_mass(grid: tuple) -> list[tuple[float, float]]:
    """Return the ranges in which the marginals exceed 1e-9 of their sum, extended by one cell."""
    *_, axes, weights = grid
    box = []
    for i, axis in enumerate(axes):
        marginal = weights.sum(axis=tuple(j for j in range(len(axes)) if j != i))
        inside = np.flatnonzero(marginal > 1e-9)
        box.append((axis[max(inside[0] - 1, 0)], axis[min(inside[-1] + 1, len(axis) - 1)]))
    return box


TARGETS = {
    "normal, d = 2": lambda: normal(2),
    "normal, d = 10": lambda: normal(10)._replace(without=()),
    "normal, d = 50": lambda: normal(50)._replace(num_peers=2),
    "two modes, d = 2": lambda: two_modes(2),
    "two modes, d = 5": lambda: two_modes(5),
    "GP, Nile": nile,
}
