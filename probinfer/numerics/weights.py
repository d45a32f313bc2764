r"""Weights live in log space from birth to report.

A weighted sample is a vector ``log_weights`` beside values with the same leading axis. The weights need no
normalization. Minus infinity is a legal log weight: that draw carries no mass and never touches a result,
even where its value is NaN. When *every* log weight is minus infinity there is no distribution left: nothing
is replaced by uniform weights, ``status`` says ``DEGENERATE_WEIGHTS``, the effective sample sizes are 0 and
the moments NaN. NaN and plus infinity are failures (``NON_FINITE``), and NaN in every result. Functions take
one vector; batches are lifted by ``vmap``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.status import Status
from probinfer.core.types import Array, Float, Int, Scalar, Shaped

__all__ = [
    "Normalized",
    "add_compensated",
    "check_vector",
    "covariance",
    "entropic_ess",
    "ess",
    "log_mean_exp",
    "mean",
    "normalize",
    "quantile",
    "relative_weights",
    "status",
    "variance",
]


class Normalized(NamedTuple):
    """Log weights whose exponentials sum to one, and the logarithm of the sum of the weights before."""

    log_weights: Float[Array, " n"]
    log_sum: Scalar


def normalize(log_weights: Float[Array, " n"]) -> Normalized:
    r"""Return :math:`\log W_i = \log w_i - \log\sum_j w_j` and :math:`\log\sum_j w_j`.

    Args:
        log_weights: unnormalized log weights, minus infinity allowed.

    Returns:
        The normalized log weights and the log of the sum. If every weight is zero both are minus infinity; if
        one is NaN or infinite both are NaN.
    """
    scaled, largest = relative_weights(log_weights)
    total = jnp.sum(scaled)
    log_total = jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, jnp.ones_like(total), total)))
    shift = jnp.where(total == 0, jnp.zeros_like(total), log_total)
    return Normalized(log_weights - largest - shift, largest + log_total)


def relative_weights(log_weights: Float[Array, " n"]) -> tuple[Float[Array, " n"], Scalar]:
    """Return the weights divided by the largest one, and its logarithm, so that a common offset costs no precision.

    Args:
        log_weights: unnormalized log weights, minus infinity allowed.

    Returns:
        Values between 0 and 1, and the largest log weight; zeros and zero if every weight is zero, NaN if one is NaN
        or infinite.

    Raises:
        ValueError: not one vector.
    """
    check_vector("log_weights", log_weights)
    largest = jax.lax.stop_gradient(jnp.max(log_weights))  # NaN if one is
    largest = jnp.where(largest == jnp.inf, jnp.nan, largest)
    largest = jnp.where(largest == -jnp.inf, jnp.zeros_like(largest), largest)
    return jnp.exp(log_weights - largest), largest


def log_mean_exp(log_weights: Float[Array, " n"]) -> Scalar:
    r"""Return :math:`\log\frac1n\sum_i w_i`, the log evidence of an importance sample.

    Args:
        log_weights: unnormalized log weights, minus infinity allowed.

    Returns:
        Minus infinity if every weight is zero, NaN if one is NaN or infinite.
    """
    size = jnp.asarray(log_weights.shape[0], log_weights.dtype)
    return normalize(log_weights).log_sum - jnp.log(size)


def add_compensated(total: Array, rest: Array, term: Array) -> tuple[Array, Array]:
    """Add to a compensated sum, so that a log evidence of many steps keeps its digits in float32.

    Args:
        total: the sum so far.
        rest: the part that rounding took from it; the sum is ``total + rest``.
        term: the next term.

    Returns:
        The new total, and the part that rounding took from it.

    References:
        Kahan (1965), "Further remarks on reducing truncation errors".
    """
    term = term + rest
    new = total + term
    return new, term - (new - total)


def ess(log_weights: Float[Array, " n"]) -> Scalar:
    r"""Return the effective sample size :math:`1/\sum_i W_i^2`, between 1 and n; 0 if every weight is zero.

    Args:
        log_weights: unnormalized log weights, minus infinity allowed.

    References:
        Kong, Liu and Wong (1994).
    """
    scaled, _ = relative_weights(log_weights)
    total = jnp.sum(scaled)
    return jnp.where(total == 0, jnp.zeros_like(total), total * total / jnp.sum(scaled * scaled))


def entropic_ess(log_weights: Float[Array, " n"]) -> Scalar:
    r"""Return the perplexity :math:`\exp(-\sum_i W_i\log W_i)`, at most n; 0 if every weight is zero.

    Args:
        log_weights: unnormalized log weights, minus infinity allowed.

    References:
        Cornebise, Moulines and Olsson (2008).
    """
    log_normalized, log_sum = normalize(log_weights)
    safe = jnp.where(log_normalized == -jnp.inf, jnp.zeros_like(log_normalized), log_normalized)
    size = jnp.exp(-jnp.sum(jnp.exp(log_normalized) * safe))  # 0 log 0 = 0
    return jnp.where(log_sum == -jnp.inf, jnp.zeros_like(size), size)


def status(log_weights: Float[Array, " n"]) -> Int[Array, ""]:
    """Return ``OK``, ``DEGENERATE_WEIGHTS`` (all are zero) or ``NON_FINITE`` (one is NaN or plus infinity).

    Args:
        log_weights: unnormalized log weights.

    Raises:
        ValueError: not one vector.
    """
    check_vector("log_weights", log_weights)
    bad = jnp.any(jnp.isnan(log_weights) | (log_weights == jnp.inf))
    empty = jnp.all(log_weights == -jnp.inf)
    code = jnp.where(empty, int(Status.DEGENERATE_WEIGHTS), int(Status.OK))
    return jnp.where(bad, int(Status.NON_FINITE), code).astype(jnp.int32)


def mean(log_weights: Float[Array, " n"], values: Shaped[Array, "n *event"]) -> Float[Array, "*event"]:
    r"""Return :math:`\sum_i W_i x_i` in the dtype of the values (integers: of the weights).

    Args:
        log_weights: unnormalized log weights, minus infinity allowed.
        values: one value a weight; those of zero weight may be NaN.
    """
    weights = _probabilities(log_weights)
    return _weighted_sum(weights, _floating(values, weights))


def variance(log_weights: Float[Array, " n"], values: Shaped[Array, "n *event"]) -> Float[Array, "*event"]:
    r"""Return :math:`\sum_i W_i (x_i-\bar x)^2 / (1-\sum_i W_i^2)`.

    Unbiased for weights that do not depend on the values, and the usual n - 1 estimator for equal ones. NaN
    when a single draw carries all the weight: it says nothing about spread.

    Args:
        log_weights: unnormalized log weights, minus infinity allowed.
        values: one value a weight; those of zero weight may be NaN.
    """
    weights = _probabilities(log_weights)
    values = _floating(values, weights)
    centered = values - _weighted_sum(weights, values)
    return _weighted_sum(weights, jnp.square(centered)) / _bessel(weights).astype(values.dtype)


def covariance(log_weights: Float[Array, " n"], values: Shaped[Array, "n d"]) -> Float[Array, "d d"]:
    r"""Return :math:`\sum_i W_i (x_i-\bar x)(x_i-\bar x)^\top / (1-\sum_i W_i^2)`.

    Args:
        log_weights: unnormalized log weights, minus infinity allowed.
        values: one row a weight; those of zero weight may be NaN.
    """
    weights = _probabilities(log_weights)
    values = _floating(values, weights)
    centered = jnp.where(weights[:, None] == 0, 0, values - _weighted_sum(weights, values))
    scaled = centered * weights.astype(values.dtype)[:, None]
    return scaled.T @ centered / _bessel(weights).astype(values.dtype)


@jax.jit
def quantile(
    log_weights: Float[Array, " n"], values: Shaped[Array, "n *event"], probabilities: Float[Array, " q"]
) -> Shaped[Array, "q *event"]:
    r"""Return the quantiles :math:`\inf\{x : \sum_{x_i\le x} W_i \ge p\}` of the weighted sample.

    The inverse of the empirical distribution function: always one of the values, untouched by draws of zero
    weight and by splitting a draw in two.

    Args:
        log_weights: unnormalized log weights, minus infinity allowed.
        values: one value a weight.
        probabilities: levels between 0 and 1.

    Returns:
        The quantiles, in the dtype of the values for integers and booleans too. NaN for floating values when
        the weights are degenerate.
    """
    weights = _probabilities(log_weights)
    columns = values.reshape(values.shape[0], -1)
    quantiles = jax.vmap(_quantile, in_axes=(None, 1, None), out_axes=1)(weights, columns, probabilities)
    return quantiles.reshape(probabilities.shape + values.shape[1:])


def check_vector(name: str, value: Any) -> None:
    """Refuse what is not one vector with at least one entry: sums over a matrix would mix samples.

    Args:
        name: of the argument, for the message.
        value: an array.

    Raises:
        ValueError: another number of axes, or no entries.
    """
    if jnp.ndim(value) != 1 or not jnp.size(value):
        raise ValueError(
            f"{name} must be one vector (n,) that is not empty, got shape {jnp.shape(value)}: ravel the chains of one "
            "sample, or lift the function over many samples by jax.vmap"
        )


def _quantile(weights: Array, values: Array, probabilities: Array) -> Array:
    order = jnp.argsort(jnp.where(weights == 0, _largest(values), values))
    cumulative = jax.lax.cummax(jnp.cumsum(weights[order]))
    # p = k / n must find the k-th draw although the cumulative sum is rounded
    slack = 16 * jnp.finfo(weights.dtype).eps
    levels = jnp.maximum(probabilities.astype(weights.dtype) * cumulative[-1] * (1 - slack), slack**2)
    last = jnp.maximum(jnp.sum(weights > 0) - 1, 0)
    quantiles = values[order[jnp.minimum(jnp.searchsorted(cumulative, levels), last)]]
    if jnp.issubdtype(values.dtype, jnp.floating):
        broken = jnp.isnan(cumulative[-1]) | jnp.any(jnp.isnan(values) & (weights > 0))
        quantiles = jnp.where(broken, jnp.asarray(jnp.nan, values.dtype), quantiles)
    return quantiles


def _largest(values: Array) -> Array:
    if jnp.issubdtype(values.dtype, jnp.floating):
        return jnp.asarray(jnp.nan, values.dtype)  # sorts behind plus infinity
    if values.dtype == bool:
        return jnp.asarray(True)
    return jnp.asarray(jnp.iinfo(values.dtype).max, values.dtype)


def _probabilities(log_weights: Array) -> Array:
    log_normalized, log_sum = normalize(log_weights)
    return jnp.where(log_sum == -jnp.inf, jnp.asarray(jnp.nan, log_weights.dtype), jnp.exp(log_normalized))


def _floating(values: Array, weights: Array) -> Array:
    return values if jnp.issubdtype(values.dtype, jnp.floating) else values.astype(weights.dtype)


def _weighted_sum(weights: Array, values: Array) -> Array:
    weights = weights.astype(values.dtype).reshape(weights.shape + (1,) * (values.ndim - 1))
    return jnp.sum(jnp.where(weights == 0, jnp.zeros_like(values), weights * values), axis=0)


def _bessel(weights: Array) -> Array:
    remainder = 1 - jnp.sum(jnp.square(weights))
    return jnp.where(
        remainder <= jnp.finfo(weights.dtype).eps, jnp.asarray(jnp.nan, weights.dtype), remainder
    )
