"""Expectations under one-dimensional Gaussians, by Gauss-Hermite quadrature or by nodes that resolve a bend.

The Gauss-Hermite rule of order n is exact for polynomials of degree 2n − 1; nodes and weights are computed once an
order in float64 and cast to the dtype of the arguments. Its nodes are some tenths of a standard deviation apart, so it
misses what the integrand does within less than that; ``resolving_nodes`` are dense there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.types import Array, Float

__all__ = ["expectation", "gauss_hermite", "log_expectation", "resolving_nodes", "sinh_nodes"]


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


def resolving_nodes(
    mean: Float[Array, "*B"],
    stddev: Float[Array, "*B"],
    bend: Float[Array, "*B"],
    width: Float[Array, "*B"],
    num: int,
    reach: float = 8.0,
) -> tuple[Float[Array, "num *B"], Float[Array, "num *B"]]:
    """Nodes z and log weights of a standard normal variable, dense where mean + stddev z is near ``bend``.

    The trapezoid rule in t, f = bend + width sinh t, over some standard deviations on each side of the mean: nodes are
    about width · 2 log(stddev / width) / num apart near the bend and grow apart with the distance from it, so that an
    integrand whose singularities lie a third of the width from the real axis there is integrated to 1e-8 with 64 nodes
    for stddev up to 4 widths, to 1e-5 up to 15. Where stddev is small the nodes are evenly spaced.

    Args:
        mean: of f.
        stddev: of f, positive.
        bend: where the integrand changes on the shortest scale.
        width: about three times that scale, positive.
        num: number of nodes, at least 2.
        reach: standard deviations on each side; 8 leave out 1e-14 of the weight, an integrand that grows
            exponentially needs more.

    Returns:
        Both with an axis of nodes in front; the weights sum to one.

    References:
        Trefethen and Weideman (2014), "The exponentially convergent trapezoidal rule".
    """
    offset, log_spacing = sinh_nodes(mean, stddev, bend, width, num, reach, reach)
    log_weights = log_spacing - 0.5 * offset * offset
    return offset, log_weights - jax.scipy.special.logsumexp(log_weights, axis=0)


def sinh_nodes(
    middle: Float[Array, "*B"],
    unit: Float[Array, "*B"],
    bend: Float[Array, "*B"],
    width: Float[Array, "*B"],
    num: int,
    left: Any,
    right: Any,
) -> tuple[Float[Array, "num *B"], Float[Array, "num *B"]]:
    """Nodes of the trapezoid rule on [middle − left unit, middle + right unit], dense near ``bend``.

    Even in t, f = bend + width sinh t. Where bend is far or the interval is short they are even in f.

    Args:
        middle: a point of the interval.
        unit: of the results and of ``left`` and ``right``, positive.
        bend: where nodes are densest.
        width: within which they are nearly even, positive.
        num: number of nodes, at least 2.
        left: length of the interval on the left of the middle, in units; nonnegative.
        right: on the right.

    Returns:
        The offsets (f − middle)/unit, and the logs of the weights of an integral over them; with an axis of nodes in
        front.
    """
    center, scale = (middle - bend) / width, unit / width
    start, slope = jnp.arcsinh(center), jnp.sqrt(1 + center * center)

    def end(distance):  # arcsinh(center + distance) - start, where that does not cancel
        linear = distance / slope
        return jnp.where(jnp.abs(linear) < 0.1, linear, jnp.arcsinh(center + distance) - start)

    low, high = end(-left * scale), end(right * scale)
    fractions = np.linspace(0.0, 1.0, num).reshape(num, *(1,) * middle.ndim)
    shift = low + (high - low) * jnp.asarray(fractions, middle.dtype)
    # Near the middle h = sinh(s/2) by its series, to 1e-17, and sinh(s) = 2 h (1 + h²)^½; elsewhere one exponential.
    half, growth = 0.5 * shift, jnp.exp(start + shift)
    square = half * half
    series = 1 + square / 42 * (1 + square / 72 * (1 + square / 110))
    half_sinh = half * (1 + square / 6 * (1 + square / 20 * series))
    near = 2 * half_sinh * (center * half_sinh + slope * jnp.sqrt(1 + half_sinh * half_sinh))
    far = 0.5 * (growth - 1 / growth) - center
    offset = jnp.where(jnp.abs(shift) < 0.5, near, far) / scale
    return offset, jnp.log(0.5 * (growth + 1 / growth) * (high - low) / ((num - 1) * scale))


def _points(mean: Array, variance: Array, order: int) -> tuple[Array, Array]:
    shape = (order, *(1,) * mean.ndim)
    nodes, log_weights = (jnp.asarray(a.reshape(shape), mean.dtype) for a in gauss_hermite(order))
    return mean + jnp.sqrt(variance) * nodes, log_weights
