"""Models of ``coin_minibatch.py``: logistic regression and a neural network on splits of small tables.

Features and the response of a regression are standardized by the training rows alone, and each network has one
response, which is no feature of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measurements import measurement

from probinfer import data, targets

__all__ = ["MODELS", "MinibatchProblem"]

HIDDEN = 50


class MinibatchProblem(NamedTuple):
    """One split.

    ``target_fn(batch_size)`` is a minibatch target; ``start(key, num)`` a cloud; ``scores(positions)`` are the mean
    test log likelihood of the mixture over particles and the root mean squared error of its mean, in units of y.
    """

    target_fn: Callable
    start: Callable
    scores: Callable


def split(table: Any, seed: int, *, scale_y: bool) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Split off nine tenths for training; return the standard deviation of their y too."""
    train, test = data.random_split(len(table.y), 0.9, seed=seed)
    mean, sd = table.X[train].mean(0), table.X[train].std(0)
    sd = np.where(sd > 0, sd, 1.0)
    shift, unit = (table.y[train].mean(), table.y[train].std()) if scale_y else (0.0, 1.0)
    kind = jnp.result_type(float)
    both = [
        {
            "X": jnp.asarray((table.X[k] - mean) / sd, kind),
            "y": jnp.asarray((table.y[k] - shift) / unit, kind),
        }
        for k in (train, test)
    ]
    return both[0], both[1], float(unit)


def logistic_prior(position):
    """N(0, I)."""
    return -0.5 * (jnp.sum(position["slopes"] ** 2) + position["intercept"] ** 2)


def logistic_rows(position, batch):
    """Return the log likelihoods of labels 0 and 1."""
    logits = batch["X"] @ position["slopes"] + position["intercept"]
    return jax.nn.log_sigmoid((2 * batch["y"] - 1) * logits)


@jax.jit
def logistic_scores(positions, test):
    """Return the log score and the root Brier score of the mean probability."""
    logits = positions["slopes"] @ test["X"].T + positions["intercept"][:, None]
    p = jnp.mean(jax.nn.sigmoid(logits), axis=0)
    p = jnp.clip(p, 1e-7, 1 - 1e-7)
    fit = jnp.log(jnp.where(test["y"] > 0.5, p, 1 - p))
    return jnp.mean(fit), jnp.sqrt(jnp.mean((p - test["y"]) ** 2))


def logistic(table: Any, seed: int) -> MinibatchProblem:
    """Logistic regression with prior N(0, I); the particles start at prior draws."""
    train, test, _ = split(table, seed, scale_y=False)
    dims = table.X.shape[1]
    example = {"slopes": jnp.zeros(dims), "intercept": jnp.zeros(())}

    def start(key, num):
        draws = jax.random.normal(key, (num, dims + 1))
        return {"slopes": draws[:, 1:], "intercept": draws[:, 0]}

    return MinibatchProblem(
        lambda size: targets.minibatch(logistic_prior, logistic_rows, train, size, example=example),
        start,
        lambda positions: logistic_scores(positions, test),
    )


def outputs(position, X):
    """One hidden layer of rectified units."""
    hidden = jax.nn.relu(X @ position["w1"] + position["b1"])
    return hidden @ position["w2"] + position["b2"]


def log_gamma(log_precision):
    """Log density of the logarithm of a Gamma(1, 0.1) precision."""
    return log_precision - 0.1 * jnp.exp(log_precision)


def network_prior(position):
    """Weights N(0, 1 / precision), precisions Gamma(1, 0.1)."""
    weights = [position[name] for name in ("w1", "b1", "w2", "b2")]
    size = sum(leaf.size for leaf in weights)
    square = sum(jnp.sum(leaf**2) for leaf in weights)
    log_precision = position["log_precision"]
    hyper_prior = log_gamma(log_precision) + log_gamma(position["log_noise_precision"])
    return hyper_prior + 0.5 * size * log_precision - 0.5 * jnp.exp(log_precision) * square


def network_rows(position, batch):
    """Normal noise of unknown precision."""
    residual = batch["y"] - outputs(position, batch["X"])
    log_noise = position["log_noise_precision"]
    return 0.5 * log_noise - 0.5 * jnp.exp(log_noise) * residual**2 - 0.5 * jnp.log(2 * jnp.pi)


@jax.jit
def network_scores(positions, test, unit):
    """Return the scores in the units of y."""
    rows = jax.vmap(network_rows, (0, None))(positions, test)
    fit = jax.scipy.special.logsumexp(rows, axis=0) - jnp.log(rows.shape[0]) - jnp.log(unit)
    mean = jnp.mean(jax.vmap(outputs, (0, None))(positions, test["X"]), axis=0)
    return jnp.mean(fit), unit * jnp.sqrt(jnp.mean((mean - test["y"]) ** 2))


def network(table: Any, seed: int) -> MinibatchProblem:
    """A Bayesian neural network; the initial weights keep the hidden units at unit scale."""
    train, test, unit = split(table, seed, scale_y=True)
    dims = table.X.shape[1]
    shapes = {"w1": (dims, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN,), "b2": ()}
    shapes |= {"log_precision": (), "log_noise_precision": ()}
    widths = {"w1": (dims + 1) ** -0.5, "w2": (HIDDEN + 1) ** -0.5}

    def start(key, num):
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        return {k: widths.get(k, 0.1) * jax.random.normal(keys[k], (num, *shapes[k])) for k in shapes}

    example = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    return MinibatchProblem(
        lambda size: targets.minibatch(network_prior, network_rows, train, size, example=example),
        start,
        lambda positions: network_scores(positions, test, unit),
    )


MODELS: dict[str, tuple[Callable[[int], MinibatchProblem], int]] = {
    "breast cancer": (lambda seed: logistic(data.breast_cancer(), seed), 100),
    "concrete": (lambda seed: network(measurement("concrete"), seed), 20),
    "yacht": (lambda seed: network(measurement("yacht"), seed), 20),
    "wine": (lambda seed: network(measurement("winequality_red"), seed), 20),
}
