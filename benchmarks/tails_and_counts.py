"""Data, models and the exact samplers of ``gp_tails_and_counts.py``.

Student-t noise is a mixture of normals: y_i ~ N(f_i, scale²/w_i), w_i ~ Gamma(df/2, df/2). Given the w_i the latent
function integrates out, so that hyperparameters and w are sampled from a smooth density in which nothing holds f in
place; f given both is Gaussian.

Counts: with Gaussian sites t_i held fixed, those of EP at the starting model, f = m(θ) + C(θ) ν where N(m, C Cᵀ) is the
posterior under the sites. The density of (θ, ν) is p(θ) N(ν; 0, I) Z(θ) Π p(y_i | f_i) / t_i(f_i): nearly that of
independent normals times one of θ, whatever the sites are worth.

Both have the posterior of f and hyperparameters of the joint model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.linalg import solve_triangular
from measurements import measurement_path

from probinfer import gp
from probinfer.gp.hyperparameters.posterior import free_hyperparameters, rebuild
from probinfer.numerics.linalg import safe_cholesky
from probinfer.targets import LogDensity, from_prior

__all__ = [
    "DATA",
    "LATENT",
    "WEIGHTS",
    "Fold",
    "predict_given_weights",
    "prior_of",
    "prior_whitened_draws",
    "sites_posterior",
    "stacked",
    "start_model",
    "weights_posterior",
]

WEIGHTS = "weights"
LATENT = "latent"


class Fold(NamedTuple):
    """Training data, held-out rows of ``X_all``, and the inputs that are predicted: ``X_all``, then a grid."""

    X: Any
    y: Any
    held_out: np.ndarray
    y_held_out: np.ndarray
    X_all: Any


def neal() -> list[Fold]:
    """The published folds: 80 points in training."""
    from sklearn.model_selection import KFold

    data = np.loadtxt(measurement_path("gp/li2023_neal.txt"), delimiter=",")
    X, y = data[:, :1], data[:, 1]
    X_all = np.concatenate([X, np.linspace(X.min() - 0.2, X.max() + 0.2, 156)[:, None]])
    parts = KFold(5, shuffle=True, random_state=42).split(X)
    return [
        Fold(X=X[train], y=y[train], held_out=test, y_held_out=y[test], X_all=X_all) for train, test in parts
    ]


def coal() -> list[Fold]:
    """Random folds of bins; training parts cut to one size, the smallest."""
    time_, counts = np.loadtxt(measurement_path("gp/coal_binned.csv")).T
    X = ((time_ - time_.mean()) / time_.std())[:, None]
    order = np.random.default_rng(42).permutation(len(X))
    parts = np.array_split(order, 5)
    trains = [np.setdiff1d(order, part)[: len(X) - len(parts[0])] for part in parts]
    return [
        Fold(X=X[train], y=counts[train], held_out=part, y_held_out=counts[part], X_all=X)
        for train, part in zip(trains, parts, strict=True)
    ]


DATA = {"neal": neal, "coal": coal}


def start_model(name: str, y: np.ndarray) -> gp.Model:
    """Return the initial model of all methods."""
    kernel = gp.kernels.Matern52(1.0, 1.0)
    if name == "neal":
        return gp.Model(kernel, gp.likelihoods.StudentT(1.0, 3.0))
    return gp.Model(kernel, gp.likelihoods.Poisson(), gp.means.Constant(np.log(y.mean())))


def prior_of(model: gp.Model, X: np.ndarray, free_df: bool = False) -> Any:
    """The default prior; degrees of freedom are fixed unless they are to be learned."""
    prior = gp.default_prior(model, X)
    is_fixed = isinstance(model.likelihood, gp.likelihoods.StudentT) and not free_df
    return gp.replace(prior, {"likelihood.df": gp.fixed}) if is_fixed else prior


@jax.jit
def predict_given_weights(models, weights, X, y, X_all):
    """Latent means and variances ``(S, M)`` where y_i has the noise variance scale²/w_i."""

    def one(drawn):
        return with_weights(*drawn, X, y).predict(X_all)

    return jax.lax.map(one, (models, weights))


def with_weights(model, weights, X, y):
    noise = gp.likelihoods.KnownNoise(model.likelihood.scale**2 / weights)
    return gp.Exact().condition(gp.Model(model.kernel, noise, model.mean), X, y)


def log_likelihood_of_weights(free, model, X, y, values):
    """Log p(y | w, θ) + log p(w | df) − log p(w | 3): the target's prior of w has 3 degrees of freedom."""
    model_at, weights = rebuild(free, model, values), values[WEIGHTS]
    half = 0.5 * model_at.likelihood.df
    change = dist.Gamma(half, half).log_prob(weights) - dist.Gamma(1.5, 1.5).log_prob(weights)
    return with_weights(model_at, weights, X, y).log_evidence + jnp.sum(change)


def weights_posterior(model, prior, X, y):
    """Hyperparameters and w_i ~ Gamma(df/2, df/2), y_i ~ N(f_i, scale²/w_i), f integrated out."""
    free, priors = free_hyperparameters(model, prior)
    weights = dist.Gamma(np.full(len(y), 1.5), 1.5)
    log_likelihood = LogDensity(log_likelihood_of_weights, free, model, jnp.asarray(X), jnp.asarray(y))
    return free, from_prior({**priors, WEIGHTS: weights}, log_likelihood)


def log_likelihood_at_sites(free, model, X, y, sites, values):
    """Log Z(θ) + Σ log p(y_i | f_i) − log t_i(f_i)."""
    model_at = rebuild(free, model, values)
    z, chol, log_z = prior_whitened(model_at, X, sites, values[LATENT])
    f = model_at.mean(X) + chol @ z
    return log_z + jnp.sum(model_at.likelihood.log_density(y, f) - sites.lam1 * f + 0.5 * sites.lam2 * f**2)


def prior_whitened(model, X, sites, whitened):
    """Z = L⁻¹ (f − μ) of posterior-whitened ν, the factor L of K, and log Z.

    With g = Lz, b = λ1 − λ2 μ and A = I + Lᵀ Λ L = R Rᵀ: z ~ N(A⁻¹ Lᵀ b, A⁻¹) under the sites, and
    log Z = Σ (λ1 μ − ½ λ2 μ²) + ½ |R⁻¹ Lᵀ b|² − ½ log |A|.
    """
    mean = model.mean(X)
    chol, _, _ = safe_cholesky(model.kernel.gram(X))
    A = jnp.eye(len(mean), dtype=X.dtype) + chol.T @ (sites.lam2[:, None] * chol)
    R = jnp.linalg.cholesky(A)
    half = solve_triangular(R, chol.T @ (sites.lam1 - sites.lam2 * mean), lower=True)
    z = solve_triangular(R, half + whitened, lower=True, trans=1)
    log_z = jnp.sum(sites.lam1 * mean - 0.5 * sites.lam2 * mean**2) + 0.5 * half @ half
    return z, chol, log_z - jnp.sum(jnp.log(jnp.diag(R)))


def sites_posterior(model, prior, X, y):
    """Hyperparameters and ν; also the sites."""
    free, priors = free_hyperparameters(model, prior)
    sites = gp.condition(model, X, y, gp.EP()).sites
    data = jnp.asarray(X), jnp.asarray(y)
    log_likelihood = LogDensity(log_likelihood_at_sites, free, model, *data, sites)
    whitened = dist.Normal(np.zeros(len(y)), np.ones(()))
    return free, from_prior({**priors, LATENT: whitened}, log_likelihood), sites


@jax.jit
def prior_whitened_draws(models, whitened, X, sites):
    """What ``gp.joint_predictive`` takes."""
    return jax.lax.map(lambda drawn: prior_whitened(drawn[0], X, sites, drawn[1])[0], (models, whitened))


def stacked(free, model, draws):
    """The model at each of S draws, every leaf with an axis S."""
    num = len(next(iter(draws.values())))
    models = rebuild(free, model, draws)
    return jax.tree.map(lambda leaf, old: jnp.broadcast_to(leaf, (num, *np.shape(old))), models, model)
