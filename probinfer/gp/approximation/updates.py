"""Site updates: from marginals and sites to new sites, the only part in which the methods differ.

Expectation propagation matches the mean and variance of each tilted density ∝ q (p/t)^η; variational inference follows
the natural gradient of the evidence lower bound, whose full step is λ2 = −E_q[ℓ″], λ1 = E_q[ℓ′] + λ2 m.

References:
    Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, section 3.6; Minka (2004), "Power EP";
    Khan and Lin (2017), "Conjugate-computation variational inference".
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import gmres

from probinfer.core.types import Array, Float
from probinfer.gp.approximation.fixed_point import FixedPoint, SiteUpdate, find_fixed_point
from probinfer.gp.approximation.gaussian_marginals import Marginals, marginals, marginals_from
from probinfer.gp.approximation.objectives import Objective
from probinfer.gp.model.likelihoods.moments import expected_log_density, tilted_moments, tilted_nodes
from probinfer.gp.structure.dense import posterior_matrices

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
    """Quadrature nodes shared by an update and its derivatives, since finding them costs more than either."""
    if objective.power == 0:
        return None
    (lam1, lam2), power, num_nodes = sites, objective.power, objective.num_nodes
    return tilted_nodes(likelihood, y, mean, variance, lam1, lam2, power, num_nodes)


def _full_update(objective, likelihood, y, q, sites, nodes=None):
    """The new sites, which of them were updated, and Σ E_q log p for variational inference, else 0."""
    (lam1, lam2), power, num = sites, objective.power, objective.num_nodes
    if power == 0:
        expected, first, second = expected_log_density(likelihood, y, q.mean, q.variance, num)
        new = jnp.stack([first - second * q.mean, -second])
        return _projected(likelihood, new), jnp.ones_like(y, bool), jnp.sum(expected)
    # Moments of the tilted density, cavity times likelihood (R&W eq. 3.57, at η = 1)
    mean, variance = tilted_moments(likelihood, y, q.mean, q.variance, lam1, lam2, power, num, nodes)
    # Match them: the new t^η is the tilted density over the cavity (eq. 3.59), which is q over the old t^η (eq. 3.56).
    # The cavity cancels: the change of a site is the difference of tilted and marginal natural parameters, over η.
    gain1 = (mean / variance - q.mean / q.variance) / power
    gain2 = (1 / variance - 1 / q.variance) / power
    # Without a cavity, η λ2 v >= 1, there is no tilted density: the site stays as it is.
    updated = jnp.isfinite(gain1) & jnp.isfinite(gain2) & (variance > 0) & (power * lam2 * q.variance < 1)
    new = sites + jnp.where(updated, jnp.stack([gain1, gain2]), 0)
    return _projected(likelihood, new), updated, jnp.zeros_like(y[0])


def first_sites(
    likelihood: Any,
    y: Float[Array, " N"],
    prior_mean: Float[Array, " N"],
    prior_variance: Float[Array, " N"],
    num_nodes: int,
) -> Float[Array, "2 N"]:
    """Start of a search: the sites of each output alone, one update of expectation propagation from the prior.

    They put the marginals where the data are. Sites of zero precision would leave the search at the prior, where the
    rate of a count of 10 000 is 9 units away, and the first update of variational inference is 10 000 units long.
    """
    zeros = jnp.zeros_like(y)
    mean, variance = tilted_moments(likelihood, y, prior_mean, prior_variance, zeros, zeros, 1.0, num_nodes)
    sites = jnp.stack([mean / variance - prior_mean / prior_variance, 1 / variance - 1 / prior_variance])
    usable = jnp.isfinite(sites).all(0) & (sites[1] > 0)
    return jax.lax.stop_gradient(jnp.where(usable, sites, 0))


def site_scale(variance: Float[Array, " N"]) -> Float[Array, "2 N"]:
    """Factors that make changes of (λ1, λ2) dimensionless: (√v, v)."""
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

    dλ = (I − ∂T/∂λ)⁻¹ ∂T/∂θ dθ, where products with ∂T/∂λ cost N² operations. The derivative is NaN if GMRES
    cannot solve the linear system.

    Args:
        objective: which update: that of EP for a positive power, of variational inference for power 0.
        likelihood: the likelihood.
        y: checked outputs.
        K: prior covariance.
        prior_mean: prior mean.
        start: first sites.
        tolerance: largest residual of a solution.
        max_updates: maximum number of updates.

    Returns:
        The fixed point; only ``sites`` has a derivative.
    """
    settings = objective, tolerance, max_updates
    return FixedPoint(*_converged(settings, likelihood, y, K, prior_mean, start))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _converged(settings, likelihood, y, K, prior_mean, start):
    objective, tolerance, max_updates = settings

    def update(sites):
        matrices, q = _posterior(likelihood, K, prior_mean, sites)
        nodes = _nodes(objective, likelihood, y, q.mean, q.variance, sites)
        new, updated, expected = _full_update(objective, likelihood, y, q, sites, nodes)
        jacobian = _jacobian(objective, likelihood, y, matrices, q, sites, nodes)
        merit = jnp.zeros_like(q.log_z)
        if objective.power == 0:
            # The evidence lower bound E_q[log p(y | f)] − KL(q ‖ prior), in a form where nothing cancels
            twice_kl = (
                jnp.dot(q.mean - prior_mean, q.alpha) - jnp.dot(sites[1], q.variance) + matrices.log_det
            )
            merit = expected - 0.5 * twice_kl
        return SiteUpdate(
            change=new - sites,
            scale=site_scale(q.variance),
            status=q.status,
            jacobian=jacobian,
            mean=q.mean,
            is_complete=updated.all(),
            merit=merit,
            nodes=nodes,
        )

    shapes = jax.eval_shape(lambda: _nodes(objective, likelihood, y, prior_mean, prior_mean, start))
    nodes = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    project = functools.partial(_projected, likelihood)
    fixed_point = find_fixed_point(
        update, start, nodes, project=project, tolerance=tolerance, max_updates=max_updates
    )
    return tuple(fixed_point)


@_converged.defjvp
def _converged_jvp(settings, primals, tangents):
    likelihood, y, K, prior_mean, _ = primals
    sites, residual, num_updates, status, nodes = _converged(settings, *primals)
    objective, signed = settings[0], not likelihood.log_concave

    matrices, q = _posterior(likelihood, K, prior_mean, sites)

    # The derivative of the update at fixed sites, ∂T/∂θ dθ
    def update_at_sites(likelihood, y, K, prior_mean):
        q = marginals(K, prior_mean, *sites, signed)
        return updated_sites(objective, likelihood, y, q, sites, nodes)

    _, dupdate = jax.jvp(update_at_sites, (likelihood, y, K, prior_mean), tangents[:4])

    # Solve (I − ∂T/∂λ) dλ = ∂T/∂θ dθ, scaled so that the tolerance of GMRES has no unit
    jacobian = _jacobian(objective, likelihood, y, matrices, q, sites, nodes)
    scale = jax.lax.stop_gradient(site_scale(q.variance))

    def operator(x):
        return x - scale * jacobian(x / scale)

    dsites = jax.lax.custom_linear_solve(operator, scale * dupdate, _solve, _solve) / scale
    no_tangent = np.zeros((), jax.dtypes.float0)
    dnodes = jax.tree.map(jnp.zeros_like, nodes)
    fixed_point = sites, residual, num_updates, status, nodes
    return fixed_point, (dsites, jnp.zeros_like(residual), no_tangent, no_tangent, dnodes)


def _posterior(likelihood, K, prior_mean, sites):
    matrices = posterior_matrices(K, sites[1], not likelihood.log_concave)
    return matrices, marginals_from(matrices, prior_mean, *sites)


def _jacobian(objective, likelihood, y, matrices, q, sites, nodes):
    """δλ ↦ ∂T/∂λ δλ in N² operations: T depends on the sites directly and through m and v, point by point."""

    def pointwise(mean, variance, lam1, lam2):
        perturbed = q._replace(mean=mean, variance=variance)
        return updated_sites(objective, likelihood, y, perturbed, jnp.stack([lam1, lam2]), nodes)

    arguments = q.mean, q.variance, sites[0], sites[1]
    unit = jnp.broadcast_to(jnp.eye(4, dtype=y.dtype)[:, :, None], (4, 4, len(y)))
    # Partial derivatives of T in m, v, λ1 and λ2, each (2, N)
    partials = jax.vmap(lambda direction: jax.jvp(pointwise, arguments, tuple(direction))[1])(unit)
    # ∂m/∂λ1 = Σ, ∂m/∂λ2 = −Σ diag(m), ∂v/∂λ2 = −Σ∘Σ
    squared = matrices.covariance * matrices.covariance

    def apply(delta):
        dmean = matrices.covariance @ (delta[0] - q.mean * delta[1])
        dvariance = -(squared @ delta[1])
        return partials[0] * dmean + partials[1] * dvariance + partials[2] * delta[0] + partials[3] * delta[1]

    return apply


def _solve(operator, target):
    tolerance = 1e-11 if target.dtype == jnp.float64 else 1e-5
    x, _ = gmres(operator, target, tol=tolerance, atol=0.0, restart=min(40, target.size), maxiter=8)
    # GMRES reports no failure: its residual is checked here, and NaN says that there is no derivative.
    failed = jnp.linalg.norm(operator(x) - target) > 1e3 * tolerance * jnp.linalg.norm(target)
    return jnp.where(failed, jnp.nan, x)


def _projected(likelihood, sites):
    """Sites without negative precisions if the likelihood is log-concave, else unchanged."""
    return sites.at[1].max(0.0) if likelihood.log_concave else sites
