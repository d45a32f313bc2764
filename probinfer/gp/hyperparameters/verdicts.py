"""Warnings about fits and predictions: lost precision, hyperparameters at a limit, nothing learned.

A point estimate has learned nothing if a model without inputs explains the data as well: one common level, or
independent values of one variance, the limits of every kernel whose variance goes to zero or whose lengthscale goes to
infinity or zero.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.special import logsumexp

from probinfer.core.errors import ConvergenceWarning, advice
from probinfer.core.status import Status
from probinfer.core.types import Float
from probinfer.gp.model.validation import is_traced

__all__ = ["add_verdicts", "warn_lost_precision"]

_MIN_GAIN = 0.5  # nats over the model without inputs: less is no evidence of any dependence
_NOISE_LIMIT = 64.0  # ε times the variance of the outputs: smaller noise variances cannot be told from zero


class _Data(NamedTuple):
    """Gaussian data and their model; for other likelihoods those that are equivalent to the sites."""

    y: Float[np.ndarray, " N"]
    noise: Float[np.ndarray, " N"]
    gram: Float[np.ndarray, "N N"]
    mean: Float[np.ndarray, " N"]


def warn_lost_precision(variance: Any, floor: Any) -> None:
    """Warn about variances below the resolution of the arithmetic; does nothing while a function is traced.

    Args:
        variance: predictive variances ``(M,)``.
        floor: the size of their rounding errors ``(M,)``.
    """
    if is_traced((variance, floor)):
        return
    lost = np.asarray(variance < floor)
    if lost.any():
        warnings.warn(
            f"{lost.sum()} of {lost.size} predictive standard deviations are below what {variance.dtype} resolves "
            f"here, {float(np.sqrt(np.max(np.asarray(floor)[lost]))):.1e}: {advice(Status.PRECISION_LOST)}",
            ConvergenceWarning,
            stacklevel=3,
        )


def add_verdicts(
    info: Any, models: Any, X: Any, y: Any, sites: Any, draws: dict[str, Any], log_evidence: Any
) -> Any:
    """Add verdicts to the report of a point estimate, and warn about them.

    Args:
        info: the report, a named tuple with a ``status``.
        models: the learned model, leaves ``(1, ...)``.
        X: inputs ``(N, D)`` in the model's units.
        y: outputs ``(N,)`` in the model's units.
        sites: the sites, leaves ``(1, N)``; None for exact inference.
        draws: the learned hyperparameters by dotted name.
        log_evidence: log p(y | X) in the model's units; not used for exact inference.

    Returns:
        The report, with a status at least as bad as ``AT_LIMIT`` or ``NOTHING_LEARNED`` if that is a verdict.
    """
    model, sites = jax.tree.map(lambda leaf: leaf[0], (models, sites))
    gram, mean = (np.asarray(value, float) for value in _prior(model, X))
    data = _gaussian_data(model, np.asarray(y, float), sites, gram, mean)
    verdicts = []
    # Noise at zero
    limit = _NOISE_LIMIT * float(np.finfo(X.dtype).eps) * float(np.var(y))
    if _learned_noise(model, draws) < limit:
        num_free = sum(np.size(draw) for draw in draws.values())
        verdicts.append((Status.AT_LIMIT, _noise_text(len(y), num_free)))
    # No better than the model without inputs
    if sites is None:
        gain = _log_normal(data) - _log_normal_without_inputs(data)
    else:
        gain = float(log_evidence) - _log_evidence_without_inputs(model.likelihood, y, data)
    if gain < _MIN_GAIN:
        verdicts.append((Status.NOTHING_LEARNED, _nothing_text(data, gain)))
    for status, text in verdicts:
        warnings.warn(text, ConvergenceWarning, stacklevel=3)
        info = info._replace(status=max(int(info.status), int(status)))
    return info


@jax.jit
def _prior(model, X):
    return model.kernel.gram(X), model.mean(X)


def _gaussian_data(model, y, sites, gram, mean):
    if sites is None:
        return _Data(y, np.asarray(model.likelihood.noise_variance(len(y)), float), gram, mean)
    lam1, lam2 = np.asarray(sites.lam1, float), np.asarray(sites.lam2, float)
    used = lam2 > 1e-10 * max(float(lam2.max(initial=0)), 1e-290)
    return _Data(lam1[used] / lam2[used], 1 / lam2[used], gram[np.ix_(used, used)], mean[used])


def _learned_noise(model, names):
    """The variance of the noise in squared units of y; infinite if it was not learned."""
    likelihood = model.likelihood
    if "likelihood.variance" in names:
        return float(likelihood.variance)
    if "likelihood.scale" in names and getattr(likelihood, "outputs_have_unit", False):
        return float(likelihood.scale) ** 2
    return np.inf


def _log_normal(data):
    """Log N(y; m, K + D), up to the constant."""
    root = 1 / np.sqrt(np.maximum(data.noise, 1e-290))
    B = root[:, None] * data.gram * root + np.eye(len(root))
    try:
        chol = cholesky(B, lower=True)
    except (np.linalg.LinAlgError, ValueError):
        return np.inf  # the noise is below rounding, so the fit has learned something
    half = solve_triangular(chol, root * (data.y - data.mean), lower=True)
    return -0.5 * half @ half - np.log(np.diagonal(chol)).sum() + np.log(root).sum()


def _log_normal_without_inputs(data):
    """The same for K = a I + b 1 1ᵀ, the largest over a and b >= 0 (b in closed form, a on a grid)."""
    r = data.y - data.mean.mean()
    spread = max(float(np.mean(r**2)), 1e-290)
    a = np.concatenate([[0.0], spread * np.geomspace(1e-6, 10, 120)])[:, None]
    d = np.maximum(data.noise + a, 1e-290)
    total, level = (1 / d).sum(1), (r / d).sum(1)
    b = np.maximum(0, (level**2 / total - 1) / total)
    quad = (r**2 / d).sum(1) - b * level**2 / (1 + b * total)
    return float(np.max(-0.5 * (quad + np.log(d).sum(1) + np.log1p(b * total))))


def _log_evidence_without_inputs(likelihood, y, data):
    """The same for any likelihood: the larger of f = c and of independent f_i, for f on a grid."""
    level, spread = float(data.mean.mean()), 1.0
    if getattr(likelihood, "outputs_have_unit", False):
        spread = max(float(np.std(y)), 1e-150)
    # A grid that covers the prior and the informative outputs, finer than the narrowest site
    center = data.y[data.noise < 100 * np.median(data.noise)]
    low, high = np.clip([center.min(), center.max()], level - 40 * spread, level + 40 * spread)
    low, high = min(level, low) - 6 * spread, max(level, high) + 6 * spread
    num = int(np.clip((high - low) / (0.25 * np.sqrt(data.noise.min())), 256, 4096))
    grid = np.linspace(low, high, num)
    log_density = np.asarray(_on_grid(likelihood, y, jnp.asarray(grid, y.dtype)), float)
    values = []
    for variance in spread**2 * np.geomspace(1e-4, 1e2, 25):
        log_weights = -0.5 * (grid - level) ** 2 / variance
        log_weights -= logsumexp(log_weights)
        values.append(logsumexp(log_density.sum(1) + log_weights))  # f = c
        values.append(logsumexp(log_density + log_weights[:, None], axis=0).sum())  # independent f_i
    return float(max(values))


@jax.jit
def _on_grid(likelihood, y, grid):
    return jax.lax.map(lambda f: likelihood.log_density(y, jnp.full_like(y, f)), grid)


def _noise_text(num, num_free):
    text = (
        "the noise went to zero: the model reproduces the data without noise. If they are the output of a computation, "
        "that is right, and fix the noise at a small value; if they were measured, the model is flexible enough to fit "
        "their noise"
    )
    if num_free > num // 4:
        return (
            f"{text}: {num_free} hyperparameters are too many to be learned from {num} points by maximum likelihood. "
            "Learn them under the prior (gp.MAP(), mcmc.NUTS()), or share one lengthscale between the columns"
        )
    return f"{text}: learn under the prior (gp.MAP(), mcmc.NUTS()), or look for rows that were duplicated by copying"


def _nothing_text(data, gain):
    scale = np.sqrt(np.maximum(np.diagonal(data.gram), 1e-290))
    correlation = data.gram / np.outer(scale, scale) - np.eye(len(scale))
    if np.mean(scale**2 / data.noise) * len(scale) < 0.1:
        reason = "the variance of the kernel went to zero"
    elif len(scale) > 1 and (correlation + np.eye(len(scale))).min() > 0.99:
        reason = "the lengthscales went to infinity, so that the function is a constant"
    elif np.median(np.abs(correlation).max(1)) < 0.1:
        reason = (
            "the lengthscales went below the spacing of the inputs, so that points are independent and tell nothing "
            "about new ones"
        )
    else:
        reason = "the data show no dependence on the inputs"
    return (
        f"nothing was learned about how y depends on X: {reason}. A model without inputs explains the data as well "
        f"(log evidence {max(gain, -999.0):+.2g} relative to it). If there should be a dependence, start elsewhere "
        "(gp.ML2(num_restarts=16), another lengthscale), let each column have its own lengthscale or drop columns, or "
        "learn under the prior (gp.MAP(), mcmc.NUTS())"
    )
