"""Expectations of a likelihood under Gaussian marginals: all that inference asks of it.

Each function is elementwise over N points with marginals q(f_i) = N(m_i, v_i) and sites
t_i(f) = exp(lam1_i f − ½ lam2_i f²). It takes the likelihood's closed form where there is one, else quadrature where
the integrand is: expectations under q at q, by Gauss-Hermite or, where the likelihood says where it bends, by nodes
that resolve the bend whatever the variance of q; tilted densities, which may lie far from q, on the interval that holds
them (see ``support``). All are differentiable in every argument, to any order.
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
from probinfer.gp.model.likelihoods.support import automatic_bend, concave_interval
from probinfer.numerics.quadrature import gauss_hermite, resolving_nodes, sinh_nodes

__all__ = ["derivatives", "expected_log_density", "log_ratio", "tilted_moments", "tilted_nodes"]

Vector = Float[Array, " N"]
_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)
_NO_BEND = 1e4  # standard deviations: even nodes
_REACH = 12.0  # standard deviations of a cavity; twice as many where nothing is known of the likelihood
_SMALLEST_REST = 1e-6  # of 1 − η λ2 v
_MORE = 3  # times as many nodes where the tilted density may have two modes


def derivatives(
    likelihood: Any, y: Float[Array, "..."], f: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Log p(y | f) and its first three derivatives in f, pointwise.

    Returns:
        ``(log p, first, second, third)``, each of the shape of y and f together.
    """
    f = jnp.broadcast_to(f, jnp.broadcast_shapes(y.shape, f.shape))
    closed = _closed(likelihood, "derivatives", y, f)
    if closed is not None:
        return closed
    one = jnp.ones_like(f)

    def value(f):
        return likelihood.log_density(y, f)

    def first(f):
        return jax.jvp(value, (f,), (one,))

    def second(f):
        (log_p, d1), (_, d2) = jax.jvp(first, (f,), (one,))
        return log_p, d1, d2

    (log_p, d1, d2), (_, _, d3) = jax.jvp(second, (f,), (one,))
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
        ``(N,)``; NaN where the cavity does not exist (power · lam2 · v ≥ 1).
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
        nodes: what ``tilted_nodes`` found, to find them once for several calls.

    Returns:
        ``(mean, variance)``, each ``(N,)``; NaN from the closed form of the probit where the cavity does not exist.
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
    """The mean and three central moments."""
    stddev = jnp.sqrt(v)
    terms, z = _log_terms(likelihood, y, m, v, lam1, lam2, power, len(nodes[0]), nodes)
    weights = jax.nn.softmax(terms, axis=0)
    center = jnp.sum(weights * z, axis=0)
    offset = z - center
    first = weights * offset
    second, third, fourth = (jnp.sum(first * offset**k, axis=0) for k in (1, 2, 3))
    return m + stddev * center, v * second, v * stddev * third, v * v * fourth


def _moments_rule(power, primals, tangents):
    """In m, v and the site the density is an exponential family: derivatives are moments, and cost no evaluation.

    It is ∝ p^η exp(θ1 f − ½ θ2 f²), θ1 = m/v − η λ1, θ2 = 1/v − η λ2.
    """
    likelihood, y, m, v, lam1, lam2, nodes = primals
    at = mean, variance, third, fourth = _central_moments(power, *primals)
    dm, dv, dlam1, dlam2 = (_zeros_if_symbolic(tangent) for tangent in tangents[2:6])
    # Around the mean, where θ1 and μ θ2 do not cancel.
    dslope = (dm - (m - mean) / v * dv) / v - power * (dlam1 - mean * dlam2)
    dprecision = -dv / (v * v) - power * dlam2
    dmean = variance * dslope - 0.5 * third * dprecision
    dvariance = third * dslope - 0.5 * (fourth - variance * variance) * dprecision
    if any(not _is_zero(leaf) for leaf in jax.tree.leaves(tangents[:2])):

        def by_density(likelihood, y):
            return _central_moments(power, likelihood, y, m, v, lam1, lam2, nodes)[:2]

        of_density = jax.tree.map(_zeros_if_symbolic, tangents[:2])
        _, (dmean_by, dvariance_by) = jax.jvp(by_density, (likelihood, y), of_density)
        dmean, dvariance = dmean + dmean_by, dvariance + dvariance_by
    return at[:2], (dmean, dvariance)


_moments.defjvp(_moments_rule, symbolic_zeros=True)


def _is_zero(tangent):
    return isinstance(tangent, SymbolicZero) or tangent.dtype == jax.dtypes.float0


def _zeros_if_symbolic(tangent):
    if not isinstance(tangent, SymbolicZero):
        return tangent
    return (np if tangent.dtype == jax.dtypes.float0 else jnp).zeros(tangent.shape, tangent.dtype)


def tilted_nodes(
    likelihood: Any, y: Vector, m: Vector, v: Vector, lam1: Vector, lam2: Vector, power: float, num_nodes: int
) -> Any:
    """The nodes that ``tilted_moments`` takes; None where it has a closed form. Arguments as there."""
    if _closed(likelihood, "tilted_moments", y, m, v, lam1, lam2, power) is not None:
        return None
    return jax.lax.stop_gradient(_open_nodes(likelihood, y, m, jnp.sqrt(v), lam1, lam2, power, num_nodes))


def _closed(likelihood, name, *arguments):
    method = getattr(likelihood, f"closed_{name}", None)
    return None if method is None else method(*arguments)


def _log_terms(likelihood, y, m, v, lam1, lam2, power, num_nodes, nodes=None):
    """Logs of the terms of ∫ N(z; 0, 1) (p/t)^power dz, f = m + √v z, and the nodes z."""
    stddev = jnp.sqrt(v)
    if nodes is None:
        nodes = _open_nodes(likelihood, y, m, stddev, lam1, lam2, power, num_nodes)
    z, log_weights = jax.lax.stop_gradient(nodes)
    f = m + stddev * z
    exponent = power * (likelihood.log_density(y, f) - (lam1 - 0.5 * lam2 * f) * f)
    return log_weights - 0.5 * z * z - _HALF_LOG_TAU + exponent, z


def _open_nodes(likelihood, y, m, stddev, lam1, lam2, power, num_nodes):
    """Nodes in standard deviations of q where the tilted density is; their place has no bearing on derivatives."""
    if likelihood.log_concave:
        peak, left, right = concave_interval(likelihood, y, m, stddev * stddev, lam1, lam2, power)
        where, width = _bend(likelihood, y) or (m + stddev * peak, stddev * _NO_BEND)
    else:
        # It may be wide or have two modes: the whole cavity.
        rest = jnp.maximum(1 - power * lam2 * stddev * stddev, _SMALLEST_REST)
        peak = stddev * power * (lam2 * m - lam1) / rest
        bend, reach = _bend(likelihood, y), _REACH
        if bend is None:
            bend = automatic_bend(likelihood, y, m + stddev * peak, stddev / jnp.sqrt(rest))
            reach = 2 * _REACH
        (where, width), num_nodes = bend, _MORE * num_nodes
        left = right = reach / jnp.sqrt(rest)
    offset, log_weights = sinh_nodes(m + stddev * peak, stddev, where, width, num_nodes, left, right)
    return peak + offset, log_weights


def _bend(likelihood, y):
    """Where the likelihood says that it bends; None where it does not say."""
    if not hasattr(likelihood, "bend"):
        return None
    where, width = likelihood.bend(y)
    return jnp.broadcast_to(where, y.shape), jnp.broadcast_to(width, y.shape)


def _marginal_nodes(likelihood, y, m, v, num_nodes):
    """Nodes in standard deviations of q and their log weights; where they lie has no bearing on derivatives."""
    bend = _bend(likelihood, y)
    if bend is None:
        shape = (num_nodes, *(1,) * m.ndim)
        nodes, log_weights = gauss_hermite(num_nodes)
        return jnp.asarray(nodes.reshape(shape), m.dtype), jnp.asarray(log_weights.reshape(shape), m.dtype)
    where, width = (jnp.broadcast_to(value, m.shape) for value in bend)
    more = 1 if likelihood.log_concave else _MORE
    return jax.lax.stop_gradient(resolving_nodes(m, jnp.sqrt(v), where, width, more * num_nodes, 8.0))
