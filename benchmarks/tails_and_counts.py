"""Data, models and the exact sampler of ``gp_tails_and_counts.py``.

Student-t noise is a mixture of normals: y_i ~ N(f_i, scale²/w_i), w_i ~ Gamma(df/2, df/2). Given the w_i the latent
function integrates out, so that hyperparameters and w are sampled from a smooth density in which nothing holds f in
place; f given both is Gaussian. The posterior of f and hyperparameters is that of the joint model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from probinfer import gp
from probinfer.data.measurements import measurement_path
from probinfer.gp.hyper_posterior import free_hyperparameters, rebuild
from probinfer.targets import LogDensity, from_prior

__all__ = [
    "DATA",
    "WEIGHTS",
    "Fold",
    "predict_given_weights",
    "prior_of",
    "shown_data",
    "stacked",
    "start_model",
    "weights_posterior",
]

WEIGHTS = "weights"


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
    return [Fold(X[train], y[train], test, y[test], X_all) for train, test in parts]


def coal() -> list[Fold]:
    """Random folds of bins; training parts cut to one size, the smallest."""
    time_, counts = np.loadtxt(measurement_path("gp/coal_binned.csv")).T
    X = ((time_ - time_.mean()) / time_.std())[:, None]
    order = np.random.default_rng(42).permutation(len(X))
    parts = np.array_split(order, 5)
    trains = [np.setdiff1d(order, part)[: len(X) - len(parts[0])] for part in parts]
    return [
        Fold(X[train], counts[train], part, counts[part], X)
        for train, part in zip(trains, parts, strict=True)
    ]


DATA = {"neal": neal, "coal": coal}


def start_model(name: str, y: np.ndarray) -> gp.Model:
    """Where all methods start."""
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
    """The same where y_i has the noise variance scale²/w_i."""

    def one(drawn):
        return with_weights(*drawn, X, y).predict(X_all)

    return jax.lax.map(one, (models, weights))


def with_weights(model, weights, X, y):
    noise = gp.likelihoods.KnownNoise(model.likelihood.scale**2 / weights)
    return gp.Exact().condition(gp.Model(model.kernel, noise, model.mean), X, y)


def log_likelihood_of_weights(free, model, X, y, values):
    """Log p(y | w, θ) + log p(w | df) − log p(w | 3): the target's prior of w has 3 degrees of freedom."""
    at, weights = rebuild(free, model, values), values[WEIGHTS]
    half = 0.5 * at.likelihood.df
    change = dist.Gamma(half, half).log_prob(weights) - dist.Gamma(1.5, 1.5).log_prob(weights)
    return with_weights(at, weights, X, y).log_evidence + jnp.sum(change)


def weights_posterior(model, prior, X, y):
    """Hyperparameters and w_i ~ Gamma(df/2, df/2), y_i ~ N(f_i, scale²/w_i), f integrated out."""
    free, priors = free_hyperparameters(model, prior)
    weights = dist.Gamma(np.full(len(y), 1.5), 1.5)
    log_likelihood = LogDensity(log_likelihood_of_weights, free, model, jnp.asarray(X), jnp.asarray(y))
    return free, from_prior({**priors, WEIGHTS: weights}, log_likelihood)


def stacked(free, model, draws):
    """The model at each of S draws, every leaf with an axis S."""
    num = len(next(iter(draws.values())))
    models = rebuild(free, model, draws)
    return jax.tree.map(lambda leaf, old: jnp.broadcast_to(leaf, (num, *np.shape(old))), models, model)


def shown_data(name: str) -> dict[str, Any]:
    """What is plotted beside the curves: points, or counts of windows of six bins as rates."""
    if name == "neal":
        return {"shown": np.loadtxt(measurement_path("gp/li2023_neal.txt"), delimiter=",")}
    years, counts = np.loadtxt(measurement_path("gp/coal_binned.csv")).T
    per_year, num = 1 / np.diff(years).mean(), len(years) // 6
    windows = years[: 6 * num].reshape(num, 6).mean(1), counts[: 6 * num].reshape(num, 6).mean(1) * per_year
    return {"shown": np.stack(windows, 1), "unit": [years.mean(), years.std()], "per year": per_year}
