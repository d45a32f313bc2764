"""Expectations under one-dimensional Gaussians, by Gauss-Hermite quadrature.

The rule of order n is exact for polynomials of degree 2n − 1. Nodes and weights are computed once an order in float64
and cast to the dtype of the arguments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.types import Array, Float

__all__ = ["expectation", "gauss_hermite", "log_expectation"]


@functools.cache
def gauss_hermite(order: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes z and log weights of the standard normal: ``E f(Z) ≈ Σ_k exp(log_weights_k) f(z_k)``.

    Args:
        order: number of nodes, from 1 to 370, where the outermost weights underflow.

    Returns:
        Nodes (order,), ascending, and log weights (order,), in float64.

    Raises:
        ValueError: the order is not such an integer.
    """
    if not isinstance(order, int) or not 1 <= order <= 370:
        raise ValueError(f"order must be an integer from 1 to 370, got {order!r}")
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    return nodes, np.log(weights) - 0.5 * math.log(2.0 * math.pi)


def expectation(
    fn: Callable[[Array], Array],
    mean: Float[Array, "*B"],
    variance: Float[Array, "*B"],
    *,
    order: int = 32,
) -> Float[Array, "*B"]:
    """``E f(X)``, ``X ~ N(mean, variance)``, elementwise over any batch shape.

    Args:
        fn: elementwise; it is called once, on an array with an axis of nodes in front.
        mean: means.
        variance: variances, positive (the derivative at 0 is not finite).
        order: number of nodes.

    Returns:
        The expectations, shaped like ``mean``.

    Raises:
        ValueError: a bad order.
    """
    points, log_weights = _points(mean, variance, order)
    return jnp.sum(jnp.exp(log_weights) * fn(points), axis=0)


def log_expectation(
    log_fn: Callable[[Array], Array],
    mean: Float[Array, "*B"],
    variance: Float[Array, "*B"],
    *,
    order: int = 32,
) -> Float[Array, "*B"]:
    """``log E exp g(X)``, ``X ~ N(mean, variance)``, without leaving the log scale.

    Args:
        log_fn: g, elementwise; it is called once, on an array with an axis of nodes in front. It may return
            minus infinity.
        mean: means.
        variance: variances, positive.
        order: number of nodes.

    Returns:
        The log expectations, shaped like ``mean``.

    Raises:
        ValueError: a bad order.
    """
    points, log_weights = _points(mean, variance, order)
    return jax.scipy.special.logsumexp(log_fn(points) + log_weights, axis=0)


def _points(mean: Array, variance: Array, order: int) -> tuple[Array, Array]:
    shape = (order, *(1,) * mean.ndim)
    nodes, log_weights = (jnp.asarray(a.reshape(shape), mean.dtype) for a in gauss_hermite(order))
    return mean + jnp.sqrt(variance) * nodes, log_weights
