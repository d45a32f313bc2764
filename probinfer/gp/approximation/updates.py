"""Site updates: from marginals and sites to new sites. Methods differ in nothing else.

Expectation propagation matches the mean and variance of each tilted density ∝ q (p/t)^η; variational inference takes
the natural gradient of the evidence lower bound, whose full step is λ2 = −E_q[ℓ″], λ1 = E_q[ℓ′] + λ2 m.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import gmres

from probinfer.core.types import Array, Float
from probinfer.gp.approximation.fixed_point import FixedPoint, Point, find
from probinfer.gp.approximation.gaussian_marginals import Marginals, marginals, marginals_from
from probinfer.gp.approximation.objectives import Objective
from probinfer.gp.model.likelihoods.moments import expected_log_density, tilted_moments, tilted_nodes
from probinfer.gp.structure.dense import precision

__all__ = ["converged_sites", "first_sites", "site_scale", "updated_sites"]


def updated_sites(
    objective: Objective,
    likelihood: Any,
    y: Float[Array, " N"],
    q: Marginals,
    sites: Float[Array, "2 N"],
    nodes: Any = None,
) -> Float[Array, "2 N"]:
    """The sites of one full update: of EP for a positive power, of variational inference for power 0."""
    return _full_update(objective, likelihood, y, q, sites, nodes)[0]


def _nodes(objective, likelihood, y, mean, variance, sites):
    """Quadrature nodes of an update, for the update and its derivatives: finding them costs more than either."""
    if objective.power == 0:
        return None
    (lam1, lam2), power, num_nodes = sites, objective.power, objective.num_nodes
    return tilted_nodes(likelihood, y, mean, variance, lam1, lam2, power, num_nodes)


def _full_update(objective, likelihood, y, q, sites, nodes=None):
    """The new sites, which of them could be found, and Σ E_q log p for variational inference, else 0."""
    (lam1, lam2), power, num = sites, objective.power, objective.num_nodes
    if power == 0:
        expected, first, second = expected_log_density(likelihood, y, q.mean, q.variance, num)
        new = jnp.stack([first - second * q.mean, -second])
        return _allowed(likelihood, new), jnp.ones_like(y, bool), jnp.sum(expected)
    mean, variance = tilted_moments(likelihood, y, q.mean, q.variance, lam1, lam2, power, num, nodes)
    # The tilted density has the precision of the cavity plus power times that of the new site.
    gain1 = (mean / variance - q.mean / q.variance) / power
    gain2 = (1 / variance - 1 / q.variance) / power
    moved = jnp.isfinite(gain1) & jnp.isfinite(gain2) & (variance > 0) & (power * lam2 * q.variance < 1)
    new = sites + jnp.where(moved, jnp.stack([gain1, gain2]), 0)  # without a cavity a site stays as it is
    return _allowed(likelihood, new), moved, jnp.zeros_like(y[0])


def first_sites(
    likelihood: Any,
    y: Float[Array, " N"],
    prior_mean: Float[Array, " N"],
    prior_variance: Float[Array, " N"],
    num_nodes: int,
) -> Float[Array, "2 N"]:
    """Where searches start: the sites of each output on its own, as expectation propagation finds them at the prior.

    They put the marginals where the data are. Sites of no precision leave the search at the prior, where the rate of a
    count of 10 000 is 9 units away, and the first update of variational inference from there is 10 000 units long.
    """
    none = jnp.zeros_like(y)
    mean, variance = tilted_moments(likelihood, y, prior_mean, prior_variance, none, none, 1.0, num_nodes)
    sites = jnp.stack([mean / variance - prior_mean / prior_variance, 1 / variance - 1 / prior_variance])
    usable = jnp.isfinite(sites).all(0) & (sites[1] > 0)
    return jax.lax.stop_gradient(jnp.where(usable, sites, 0))


def site_scale(variance: Float[Array, " N"]) -> Float[Array, "2 N"]:
    """Factors that turn changes of (λ1, λ2) into numbers without unit: (√v, v)."""
    return jnp.stack([jnp.sqrt(variance), variance])


def converged_sites(
    objective: Objective,
    likelihood: Any,
    y: Float[Array, " N"],
    K: Float[Array, "N N"],
    prior_mean: Float[Array, " N"],
    start: Float[Array, "2 N"],
    *,
    tolerance: float,
    max_updates: int,
) -> FixedPoint:
    """The fixed point of ``updated_sites``, differentiable by the implicit function theorem, to any order.

    dλ = (I − ∂T/∂λ)⁻¹ ∂T/∂θ dθ, where products with ∂T/∂λ cost N² operations. A linear system that GMRES cannot solve
    gives NaN.

    Args:
        objective: which update.
        likelihood: the likelihood.
        y: checked outputs.
        K: prior covariance.
        prior_mean: prior mean.
        start: first sites.
        tolerance: of the fixed point.
        max_updates: the most updates.

    Returns:
        The fixed point; all but ``sites`` has no derivative.
    """
    settings = objective, tolerance, max_updates
    return FixedPoint(*_converged(settings, likelihood, y, K, prior_mean, start))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _converged(settings, likelihood, y, K, prior_mean, start):
    objective, tolerance, max_updates = settings

    def update(sites):
        known, q = _at(likelihood, K, prior_mean, sites)
        nodes = _nodes(objective, likelihood, y, q.mean, q.variance, sites)
        new, moved, expected = _full_update(objective, likelihood, y, q, sites, nodes)
        jacobian = _jacobian(objective, likelihood, y, known, q, sites, nodes)
        merit = jnp.zeros_like(q.log_z)
        if objective.power == 0:  # the evidence lower bound, in a form where nothing cancels
            half = jnp.dot(q.mean - prior_mean, q.alpha) - jnp.dot(sites[1], q.variance) + known.log_det
            merit = expected - 0.5 * half
        change, scale = new - sites, site_scale(q.variance)
        return Point(change, scale, q.status, jacobian, q.mean, moved.all(), merit, nodes)

    shapes = jax.eval_shape(lambda: _nodes(objective, likelihood, y, prior_mean, prior_mean, start))
    nodes = jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype), shapes)
    project = functools.partial(_allowed, likelihood)
    found = find(update, start, nodes, project=project, tolerance=tolerance, max_updates=max_updates)
    return tuple(found)


@_converged.defjvp
def _converged_jvp(settings, primals, tangents):
    likelihood, y, K, prior_mean, _ = primals
    sites, residual, num_updates, status, nodes = _converged(settings, *primals)
    objective, signed = settings[0], not likelihood.log_concave

    known, q = _at(likelihood, K, prior_mean, sites)

    def at_sites(likelihood, y, K, prior_mean):
        q = marginals(K, prior_mean, *sites, signed)
        return updated_sites(objective, likelihood, y, q, sites, nodes)

    _, by_others = jax.jvp(at_sites, (likelihood, y, K, prior_mean), tangents[:4])
    by_sites = _jacobian(objective, likelihood, y, known, q, sites, nodes)
    scale = jax.lax.stop_gradient(site_scale(q.variance))

    def operator(x):
        return x - scale * by_sites(x / scale)

    dsites = jax.lax.custom_linear_solve(operator, scale * by_others, _solve, _solve) / scale
    none = np.zeros((), jax.dtypes.float0)
    dnodes = jax.tree.map(jnp.zeros_like, nodes)
    found = sites, residual, num_updates, status, nodes
    return found, (dsites, jnp.zeros_like(residual), none, none, dnodes)


def _at(likelihood, K, prior_mean, sites):
    known = precision(K, sites[1], not likelihood.log_concave)
    return known, marginals_from(known, prior_mean, *sites)


def _jacobian(objective, likelihood, y, known, q, sites, nodes):
    """δλ ↦ ∂T/∂λ δλ, N² operations: T depends on the sites through m, v and directly, point by point."""

    def pointwise(mean, variance, lam1, lam2):
        moved = q._replace(mean=mean, variance=variance)
        return updated_sites(objective, likelihood, y, moved, jnp.stack([lam1, lam2]), nodes)

    arguments = q.mean, q.variance, sites[0], sites[1]
    unit = jnp.broadcast_to(jnp.eye(4, dtype=y.dtype)[:, :, None], (4, 4, len(y)))
    by = jax.vmap(lambda direction: jax.jvp(pointwise, arguments, tuple(direction))[1])(unit)
    squared = known.covariance * known.covariance

    def apply(delta):
        dmean = known.covariance @ (delta[0] - q.mean * delta[1])
        dvariance = -(squared @ delta[1])
        return by[0] * dmean + by[1] * dvariance + by[2] * delta[0] + by[3] * delta[1]

    return apply


def _solve(operator, target):
    tolerance = 1e-11 if target.dtype == jnp.float64 else 1e-5
    x, _ = gmres(operator, target, tol=tolerance, atol=0.0, restart=min(40, target.size), maxiter=8)
    missed = jnp.linalg.norm(operator(x) - target) > 1e3 * tolerance * jnp.linalg.norm(target)
    return jnp.where(missed, jnp.nan, x)


def _allowed(likelihood, sites):
    """No negative precisions where the likelihood is log-concave."""
    return sites.at[1].max(0.0) if likelihood.log_concave else sites
