"""Expectations of a likelihood under Gaussian marginals: all that inference needs of it.

Each function is elementwise over N points with marginals q(f_i) = N(m_i, v_i) and sites
t_i(f) = exp(lam1_i f − ½ lam2_i f²). It uses the likelihood's closed form if there is one, otherwise quadrature where
the integrand is: for expectations under q around q, by Gauss-Hermite or, if the likelihood has a
``curvature_location``, by nodes that resolve it whatever the variance of q; for tilted densities, which may lie far
from q, on the interval that contains them (see ``support``). All are differentiable in every argument, to any order.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.scipy.special import logsumexp

from probinfer.core.types import Array, Float
from probinfer.gp.model.likelihoods.support import concave_interval, estimated_curvature_location
from probinfer.numerics.quadrature import gauss_hermite, resolving_nodes, sinh_nodes

__all__ = ["derivatives", "expected_log_density", "log_ratio", "tilted_moments", "tilted_nodes"]

Vector = Float[Array, " N"]
_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)
_EVEN_WIDTH = 1e4  # standard deviations: a width at which nodes are even
_HALF_WIDTH = 12.0  # standard deviations of a cavity; twice as many if nothing is known of the likelihood
_MIN_CAVITY = 1e-6  # of 1 − η λ2 v
_NODE_FACTOR = 3  # times as many nodes if the tilted density may have two modes


def derivatives(
    likelihood: Any, y: Float[Array, "..."], f: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Log p(y | f) and its first three derivatives in f, pointwise.

    Returns:
        ``(log p, first, second, third)``, each of the common shape of y and f.
    """
    f = jnp.broadcast_to(f, jnp.broadcast_shapes(y.shape, f.shape))
    closed = _closed(likelihood, "derivatives", y, f)
    if closed is not None:
        return closed
    unit = jnp.ones_like(f)

    def value(f):
        return likelihood.log_density(y, f)

    def first(f):
        return jax.jvp(value, (f,), (unit,))

    def second(f):
        (log_p, d1), (_, d2) = jax.jvp(first, (f,), (unit,))
        return log_p, d1, d2

    (log_p, d1, d2), (_, _, d3) = jax.jvp(second, (f,), (unit,))
    return log_p, d1, d2, d3


def expected_log_density(
    likelihood: Any, y: Vector, m: Vector, v: Vector, num_nodes: int
) -> tuple[Vector, Vector, Vector]:
    """E_q of log p(y | f) and of its first and second derivatives in f.

    By the theorems of Bonnet and Price the last two are the derivatives of the first in m and, doubled, in v.

    Args:
        likelihood: the likelihood.
        y: outputs ``(N,)``.
        m: marginal means ``(N,)``.
        v: marginal variances ``(N,)``, positive.
        num_nodes: quadrature nodes.

    Returns:
        ``(E log p, E log p′, E log p″)``, each ``(N,)``.
    """
    closed = _closed(likelihood, "expected_log_density", y, m, v)
    if closed is not None:
        return closed
    z, log_weights = _marginal_nodes(likelihood, y, m, v, num_nodes)
    values = derivatives(likelihood, y, m + jnp.sqrt(v) * z)[:3]
    log_p, d1, d2 = (jnp.sum(jnp.exp(log_weights) * value, axis=0) for value in values)
    return log_p, d1, d2


def log_ratio(
    likelihood: Any,
    y: Vector,
    m: Vector,
    v: Vector,
    lam1: Vector,
    lam2: Vector,
    power: float,
    num_nodes: int,
    nodes: Any = None,
) -> Vector:
    """Log E_q[(p(y | f) / t(f))^power].

    Args:
        likelihood: the likelihood.
        y: outputs ``(N,)``.
        m: marginal means ``(N,)``.
        v: marginal variances ``(N,)``, positive.
        lam1: first natural parameters of the sites ``(N,)``.
        lam2: second natural parameters ``(N,)``, of any sign.
        power: the power, positive.
        num_nodes: quadrature nodes.
        nodes: as in ``tilted_moments``.

    Returns:
        ``(N,)``; NaN if the cavity does not exist (power · lam2 · v ≥ 1).
    """
    closed = _closed(likelihood, "log_ratio", y, m, v, lam1, lam2, power)
    if closed is not None:
        return closed
    terms, _ = _log_terms(likelihood, y, m, v, lam1, lam2, power, num_nodes, nodes)
    return jnp.where(power * lam2 * v < 1, logsumexp(terms, axis=0), jnp.nan)


def tilted_moments(
    likelihood: Any,
    y: Vector,
    m: Vector,
    v: Vector,
    lam1: Vector,
    lam2: Vector,
    power: float,
    num_nodes: int,
    nodes: Any = None,
) -> tuple[Vector, Vector]:
    """Mean and variance of the density ∝ N(f; m, v) (p(y | f) / t(f))^power.

    Args:
        likelihood: the likelihood.
        y: outputs ``(N,)``.
        m: marginal means ``(N,)``.
        v: marginal variances ``(N,)``, positive.
        lam1: first natural parameters of the sites ``(N,)``.
        lam2: second natural parameters ``(N,)``, of any sign.
        power: the power, positive.
        num_nodes: quadrature nodes.
        nodes: from ``tilted_nodes``, to find them once for several calls.

    Returns:
        ``(mean, variance)``, each ``(N,)``; NaN from the closed form of the probit if the cavity does not exist.
    """
    closed = _closed(likelihood, "tilted_moments", y, m, v, lam1, lam2, power)
    if closed is not None:
        return closed
    if nodes is None:
        nodes = tilted_nodes(likelihood, y, m, v, lam1, lam2, power, num_nodes)
    return _moments(power, likelihood, y, m, v, lam1, lam2, nodes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _moments(power, likelihood, y, m, v, lam1, lam2, nodes):
    mean, variance, _, _ = _central_moments(power, likelihood, y, m, v, lam1, lam2, nodes)
    return mean, variance


def _central_moments(power, likelihood, y, m, v, lam1, lam2, nodes):
    """The mean and the second to fourth central moments, of deviations from the mean, so that nothing cancels."""
    stddev = jnp.sqrt(v)
    terms, z = _log_terms(likelihood, y, m, v, lam1, lam2, power, len(nodes[0]), nodes)
    weights = jax.nn.softmax(terms, axis=0)
    center = jnp.sum(weights * z, axis=0)
    offset = z - center
    first = weights * offset
    second, third, fourth = (jnp.sum(first * offset**k, axis=0) for k in (1, 2, 3))
    return m + stddev * center, v * second, v * stddev * third, v * v * fourth


def _moments_jvp(power, primals, tangents):
    """Derivatives of the moments in m, v and the site, which are moments themselves and cost no evaluation.

    The density is an exponential family in them, ∝ p^η exp(θ1 f − ½ θ2 f²), θ1 = m/v − η λ1, θ2 = 1/v − η λ2.
    """
    likelihood, y, m, v, lam1, lam2, nodes = primals
    mean, variance, third, fourth = _central_moments(power, *primals)
    dm, dv, dlam1, dlam2 = (_zeros_if_symbolic(tangent) for tangent in tangents[2:6])
    # Around the mean μ: dθ1 − μ dθ2 as one expression, because far from zero the two terms cancel.
    dslope = (dm - (m - mean) / v * dv) / v - power * (dlam1 - mean * dlam2)
    dprecision = -dv / (v * v) - power * dlam2
    dmean = variance * dslope - 0.5 * third * dprecision
    dvariance = third * dslope - 0.5 * (fourth - variance * variance) * dprecision
    if any(not _is_zero(leaf) for leaf in jax.tree.leaves(tangents[:2])):

        def moments_of(likelihood, y):
            return _central_moments(power, likelihood, y, m, v, lam1, lam2, nodes)[:2]

        density_tangents = jax.tree.map(_zeros_if_symbolic, tangents[:2])
        _, (dmean_density, dvariance_density) = jax.jvp(moments_of, (likelihood, y), density_tangents)
        dmean, dvariance = dmean + dmean_density, dvariance + dvariance_density
    return (mean, variance), (dmean, dvariance)


_moments.defjvp(_moments_jvp, symbolic_zeros=True)


def _is_zero(tangent):
    return isinstance(tangent, SymbolicZero) or tangent.dtype == jax.dtypes.float0


def _zeros_if_symbolic(tangent):
    if not isinstance(tangent, SymbolicZero):
        return tangent
    return (np if tangent.dtype == jax.dtypes.float0 else jnp).zeros(tangent.shape, tangent.dtype)


def tilted_nodes(
    likelihood: Any, y: Vector, m: Vector, v: Vector, lam1: Vector, lam2: Vector, power: float, num_nodes: int
) -> Any:
    """The nodes of ``tilted_moments``, with the same arguments; None if it has a closed form."""
    if _closed(likelihood, "tilted_moments", y, m, v, lam1, lam2, power) is not None:
        return None
    return jax.lax.stop_gradient(
        _quadrature_nodes(likelihood, y, m, jnp.sqrt(v), lam1, lam2, power, num_nodes)
    )


def _closed(likelihood, name, *arguments):
    method = getattr(likelihood, f"closed_{name}", None)
    return None if method is None else method(*arguments)


def _log_terms(likelihood, y, m, v, lam1, lam2, power, num_nodes, nodes=None):
    """Logs of the terms of ∫ N(z; 0, 1) (p/t)^power dz, f = m + √v z, and the nodes z."""
    stddev = jnp.sqrt(v)
    if nodes is None:
        nodes = _quadrature_nodes(likelihood, y, m, stddev, lam1, lam2, power, num_nodes)
    z, log_weights = jax.lax.stop_gradient(nodes)
    f = m + stddev * z
    exponent = power * (likelihood.log_density(y, f) - (lam1 - 0.5 * lam2 * f) * f)
    return log_weights - 0.5 * z * z - _HALF_LOG_TAU + exponent, z


def _quadrature_nodes(likelihood, y, m, stddev, lam1, lam2, power, num_nodes):
    """Nodes in standard deviations of q where the tilted density is; derivatives do not depend on their location."""
    if likelihood.log_concave:
        peak, left, right = concave_interval(likelihood, y, m, stddev * stddev, lam1, lam2, power)
        location, width = _curvature_location(likelihood, y) or (m + stddev * peak, stddev * _EVEN_WIDTH)
    else:
        # The tilted density may be wide or have two modes: cover the whole cavity, of mean m + stddev · peak.
        c = jnp.maximum(1 - power * lam2 * stddev * stddev, _MIN_CAVITY)
        peak = stddev * power * (lam2 * m - lam1) / c
        curvature_location, half_width = _curvature_location(likelihood, y), _HALF_WIDTH
        if curvature_location is None:
            curvature_location = estimated_curvature_location(
                likelihood, y, m + stddev * peak, stddev / jnp.sqrt(c)
            )
            half_width = 2 * _HALF_WIDTH
        (location, width), num_nodes = curvature_location, _NODE_FACTOR * num_nodes
        left = right = half_width / jnp.sqrt(c)
    offset, log_weights = sinh_nodes(m + stddev * peak, stddev, location, width, num_nodes, left, right)
    return peak + offset, log_weights


def _curvature_location(likelihood, y):
    if not hasattr(likelihood, "curvature_location"):
        return None
    location, width = likelihood.curvature_location(y)
    return jnp.broadcast_to(location, y.shape), jnp.broadcast_to(width, y.shape)


def _marginal_nodes(likelihood, y, m, v, num_nodes):
    """Nodes in standard deviations of q and their log weights; derivatives do not depend on their location."""
    curvature_location = _curvature_location(likelihood, y)
    if curvature_location is None:
        shape = (num_nodes, *(1,) * m.ndim)
        nodes, log_weights = gauss_hermite(num_nodes)
        return jnp.asarray(nodes.reshape(shape), m.dtype), jnp.asarray(log_weights.reshape(shape), m.dtype)
    location, width = (jnp.broadcast_to(value, m.shape) for value in curvature_location)
    factor = 1 if likelihood.log_concave else _NODE_FACTOR
    return jax.lax.stop_gradient(resolving_nodes(m, jnp.sqrt(v), location, width, factor * num_nodes, 8.0))
