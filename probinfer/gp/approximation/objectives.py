"""The objective of an approximation: one energy for EP, power EP, variational inference and their hybrid.

For sites t_i and marginals q_i = N(m_i, v_i) of their product with the prior,

    E_η = log Z + (1/η) Σ_i log E_{q_i}[(p(y_i | f) / t_i(f))^η],    log Z = log ∫ N(f; μ, K) Π t_i df,

is the evidence of EP at η = 1 and of power EP at other η; its limit η → 0 is the evidence lower bound. It is defined at
any sites, including those of another method, and never divides by their precisions.

References:
    Minka (2004), "Power EP"; Li, John and Solin (2023), "Improving hyperparameter learning under approximate inference
    in Gaussian process models", equation 12.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float
from probinfer.gp.approximation.gaussian_marginals import marginals, marginals_from
from probinfer.gp.model.likelihoods.moments import expected_log_density, log_ratio
from probinfer.gp.structure.dense import posterior_matrices
from probinfer.gp.structure.exact_evidence import inner

__all__ = ["Objective", "energy", "site_terms", "stationary_energy"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The choice of an energy: hashable, so that it can be static.

    Attributes:
        power: η, 0 for the evidence lower bound.
        num_nodes: quadrature nodes, for likelihoods without closed forms.
    """

    power: float
    num_nodes: int


def site_terms(
    objective: Objective,
    likelihood: Any,
    y: Float[Array, " N"],
    mean: Float[Array, " N"],
    variance: Float[Array, " N"],
    lam1: Float[Array, " N"],
    lam2: Float[Array, " N"],
    nodes: Any = None,
) -> Float[Array, " N"]:
    """(1/η) log E_q[(p / t)^η] of each point, or E_q[log p / t] for η = 0."""
    power, num_nodes = objective.power, objective.num_nodes
    if power == 0:
        expected, _, _ = expected_log_density(likelihood, y, mean, variance, num_nodes)
        return expected - lam1 * mean + 0.5 * lam2 * (mean * mean + variance)
    return log_ratio(likelihood, y, mean, variance, lam1, lam2, power, num_nodes, nodes) / power


def energy(
    objective: Objective,
    model: Any,
    X: Float[Array, "N D"],
    y: Float[Array, " N"],
    sites: Float[Array, "2 N"],
    nodes: Any = None,
) -> Float[Array, ""]:
    """E_η at any sites, differentiable in the model, the data and the sites; ``nodes`` as in ``moments``."""
    lam1, lam2 = sites
    q = marginals(model.kernel.gram(X), model.mean(X), lam1, lam2, not model.likelihood.log_concave)
    terms = site_terms(objective, model.likelihood, y, q.mean, q.variance, lam1, lam2, nodes)
    return q.log_z + jnp.sum(terms)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def stationary_energy(
    objective: Objective,
    model: Any,
    X: Float[Array, "N D"],
    y: Float[Array, " N"],
    sites: Float[Array, "2 N"],
    nodes: Any = None,
) -> Float[Array, ""]:
    """E_η at its own fixed point, where its derivative with respect to the sites, and so to (m, v), is zero.

    Its gradient is then ½ αᵀ dK α − ½ tr(R dK) (Rasmussen and Williams 2006, eq. 5.27) plus that of the likelihood at
    fixed q: one inverse, whatever the number of hyperparameters. Higher derivatives are right if ``sites`` carry their
    own derivative.
    """
    return energy(objective, model, X, y, sites, nodes)


@stationary_energy.defjvp
def _stationary_energy_jvp(objective, primals, tangents):
    model, X, y, (lam1, lam2), nodes = primals
    dmodel, dX, dy, *_ = tangents
    matrices = posterior_matrices(model.kernel.gram(X), lam2, not model.likelihood.log_concave)
    prior_mean, dprior_mean = jax.jvp(lambda mean, X: mean(X), (model.mean, X), (dmodel.mean, dX))
    q = marginals_from(matrices, prior_mean, lam1, lam2)
    terms, dterms = jax.jvp(
        lambda likelihood, y: jnp.sum(
            site_terms(objective, likelihood, y, q.mean, q.variance, lam1, lam2, nodes)
        ),
        (model.likelihood, y),
        (dmodel.likelihood, dy),
    )
    G = 0.5 * (q.alpha[:, None] * q.alpha[None, :] - matrices.reduction)
    kernel_gradient, X_gradient = model.kernel.contract(X, G)
    dlog_z = inner(kernel_gradient, dmodel.kernel, y.dtype) + jnp.sum(X_gradient * dX)
    return q.log_z + terms, dlog_z + jnp.dot(q.alpha, dprior_mean) + dterms
