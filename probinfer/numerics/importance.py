r"""Importance sampling: draws from q corrected by the log ratios :math:`\log p(x_i) - \log q(x_i)` to p.

``psis`` says whether the ratios are good enough to be used, by the shape of their tail, and smooths that tail;
``evidence`` estimates the normalizing constant of p with its standard error.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, Int, Scalar
from probinfer.numerics import weights

__all__ = ["Evidence", "Smoothed", "evidence", "khat_threshold", "psis"]


class Smoothed(NamedTuple):
    """Normalized log weights with a smoothed tail, and the shape of the tail.

    ``khat`` below ``khat_threshold(n)``: averages under these weights can be trusted. At 0.7 and above the bias
    dominates and grows; above 1 the mean of the ratios does not exist. Blind to regions that q never visits.
    """

    log_weights: Float[Array, " n"]
    khat: Scalar


class Evidence(NamedTuple):
    """An importance-sampling estimate of a log normalizing constant.

    ``log_evidence`` is log of the mean ratio (the mean is unbiased), ``standard_error`` that of ``log_evidence`` by
    the delta method: trust it only if ``khat`` is good. ``ess`` is the effective sample size of the ratios,
    ``status`` that of the weights.
    """

    log_evidence: Scalar
    standard_error: Scalar
    ess: Scalar
    khat: Scalar
    status: Int[Array, ""]


def khat_threshold(num_draws: int) -> float:
    r"""Return :math:`\min(1 - 1/\log_{10} n, 0.7)`: khat must be below for n draws to be enough.

    Args:
        num_draws: number of log ratios, at least 2.

    Raises:
        ValueError: fewer than two.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), "Pareto smoothed importance sampling".
    """
    if num_draws < 2:
        raise ValueError(f"num_draws must be at least 2 for a tail to have a shape, got {num_draws}")
    return min(1 - 1 / math.log10(num_draws), 0.7)


@partial(jax.jit, static_argnames="relative_ess")
def psis(log_ratios: Float[Array, "..."], *, relative_ess: float | int = 1.0) -> Smoothed:
    r"""Replace the largest ratios by the quantiles of a generalized Pareto distribution fitted to them.

    The tail is the largest :math:`\min(n/5, 3\sqrt{n/r})` ratios; those of order j of m become the quantile
    :math:`(j - 1/2)/m` of the fit, truncated at the largest ratio.

    Args:
        log_ratios: log p(x) - log q(x) of draws from q, up to a constant, one vector (n,); minus infinity allowed.
        relative_ess: effective sample size of the draws divided by n, below 1 for a Markov chain (static).

    Returns:
        Smoothed weights and khat. Fewer than five distinct ratios in the tail (so for n below 25, mostly): nothing is
        smoothed and khat is infinite. A NaN or plus infinity: both are NaN. Every ratio zero: weights of minus
        infinity.

    Raises:
        ValueError: not one vector, or a ``relative_ess`` that is not positive.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024); Zhang and Stephens (2009) for the fit.
    """
    weights.check_vector("log_ratios", log_ratios)
    if not relative_ess > 0:
        raise ValueError(f"relative_ess must be positive, got {relative_ess}")
    size = log_ratios.shape[0]
    num_tail = min(math.ceil(min(size / 5, 3 * math.sqrt(size / relative_ess))), size - 1)
    log_normalized, log_sum = weights.normalize(log_ratios)
    if num_tail < 5:
        khat = jnp.where(jnp.isnan(log_sum), log_sum, jnp.asarray(jnp.inf, log_ratios.dtype))
        return Smoothed(log_normalized, khat)
    shifted = log_ratios - jnp.where(jnp.isfinite(log_sum), jnp.max(log_ratios), 0)
    order = jnp.argsort(shifted)[-num_tail - 1 :]
    # smaller ratios are zero beside the largest, 1
    cutoff = jnp.maximum(shifted[order[0]], jnp.log(jnp.finfo(log_ratios.dtype).tiny))
    tail = shifted[order[1:]]
    smooth, khat = _smooth_tail(tail, cutoff)
    log_weights = weights.normalize(shifted.at[order[1:]].set(smooth)).log_weights
    broken = jnp.isnan(log_sum)
    return Smoothed(jnp.where(broken, log_sum, log_weights), jnp.where(broken, log_sum, khat))


@jax.jit
def evidence(log_ratios: Float[Array, "..."]) -> Evidence:
    r"""Estimate :math:`\log Z = \log\int p = \log E_q[p/q]` from independent draws of q.

    The standard error is :math:`\sqrt{(n/\mathrm{ESS} - 1)/(n - 1)}`, the relative error of the mean ratio.

    Args:
        log_ratios: log p(x) - log q(x), p unnormalized and q normalized, one vector (n,); minus infinity allowed.

    Returns:
        Estimate, standard error and diagnostics; all ratios zero: minus infinity with status
        ``DEGENERATE_WEIGHTS`` and a standard error of NaN.

    Raises:
        ValueError: not one vector.
    """
    weights.check_vector("log_ratios", log_ratios)
    size = log_ratios.shape[0]
    ess = weights.ess(log_ratios)
    excess = jnp.maximum(size / ess - 1, 0) / max(size - 1, 1)
    unknown = (ess == 0) | (size == 1)
    return Evidence(
        log_evidence=weights.log_mean_exp(log_ratios),
        standard_error=jnp.where(unknown, jnp.asarray(jnp.nan, ess.dtype), jnp.sqrt(excess)),
        ess=ess,
        khat=psis(log_ratios).khat,
        status=weights.status(log_ratios),
    )


def _smooth_tail(tail: Array, cutoff: Array) -> tuple[Array, Array]:
    """Smooth ascending log ratios where they exceed the cutoff; return them and the shape."""
    inside = tail > cutoff
    count = jnp.sum(inside)
    excess = jnp.where(inside, jnp.exp(tail) - jnp.exp(cutoff), 0)
    shape, scale = _fit_generalized_pareto(excess, count)
    rank = jnp.arange(len(tail)) - (len(tail) - count)
    probability = (jnp.maximum(rank, 0).astype(tail.dtype) + 0.5) / jnp.maximum(count, 1)
    quantile = jnp.log(_generalized_pareto_quantile(probability, shape, scale) + jnp.exp(cutoff))
    fitted = (count > 4) & jnp.isfinite(shape)
    smooth = jnp.where(inside & fitted, jnp.minimum(quantile, 0), tail)
    return smooth, jnp.where(fitted, shape, jnp.asarray(jnp.inf, tail.dtype))


def _fit_generalized_pareto(excess: Array, count: Array) -> tuple[Array, Array]:
    """Posterior mean of the shape and scale given the ``count`` last, ascending and positive, entries.

    Zhang and Stephens (2009): the profile likelihood over a grid of b = shape / scale, here with the sign of
    Vehtari et al., and their weak prior on the shape (10 observations' worth of 0.5).
    """
    inside = excess > 0
    size = count.astype(excess.dtype)
    grid_size = 30 + jnp.floor(jnp.sqrt(size))
    index = jnp.arange(1, 31 + math.isqrt(len(excess)), dtype=excess.dtype)
    quartile = excess[len(excess) - count + jnp.floor(size / 4 + 0.5).astype(jnp.int32) - 1]
    grid = 1 / excess[-1] + (1 - jnp.sqrt(grid_size / (index - 0.5))) / (3 * quartile)

    def mean_log(b):
        return jnp.sum(jnp.where(inside, jnp.log1p(-b * excess), 0)) / size

    shapes = jax.vmap(mean_log)(grid)
    log_profile = size * (jnp.log(-grid / shapes) - shapes - 1)
    log_profile = jnp.where((index <= grid_size) & jnp.isfinite(log_profile), log_profile, -jnp.inf)
    b = jnp.sum(jax.nn.softmax(log_profile) * grid)
    shape = mean_log(b)
    return (size * shape + 10 * 0.5) / (size + 10), -shape / b


def _generalized_pareto_quantile(probability: Array, shape: Array, scale: Array) -> Array:
    log_survival = jnp.log1p(-probability)
    flat = jnp.abs(shape) < jnp.finfo(shape.dtype).eps
    safe = jnp.where(flat, 1, shape)
    return scale * jnp.where(flat, -log_survival, jnp.expm1(-safe * log_survival) / safe)
