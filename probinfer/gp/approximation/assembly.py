"""From converged sites to a conditioned process: everything that prediction and leave-one-out need, computed once."""

from __future__ import annotations

import jax.numpy as jnp

from probinfer.core.status import Status
from probinfer.core.types import Array, Bool, Float
from probinfer.gp.approximation.admissible import evidence_status, largest_log_evidence
from probinfer.gp.approximation.conditioned import Conditioned
from probinfer.gp.approximation.fixed_point import FixedPoint
from probinfer.gp.approximation.gaussian_marginals import marginals_from
from probinfer.gp.approximation.sites import Sites
from probinfer.gp.model.likelihoods.cavities import log_ratio_from_cavity
from probinfer.gp.model.likelihoods.moments import log_ratio
from probinfer.gp.model.model import Model
from probinfer.gp.structure.dense import negative_factor, positive_factor, posterior_matrices

__all__ = ["assemble", "at_sites"]


def assemble(
    model: Model,
    X: Float[Array, "N D"],
    y: Float[Array, " N"],
    fixed_point: FixedPoint,
    log_evidence: Float[Array, ""] | None,
    num_nodes: int,
    is_local: Bool[Array, ""] | bool = True,
) -> Conditioned:
    """Build a conditioned process from its sites; results that are not used are compiled away.

    Args:
        model: the model.
        X: inputs.
        y: checked outputs.
        fixed_point: the sites.
        log_evidence: log evidence at these sites; None if it is not needed.
        num_nodes: quadrature nodes for leave-one-out densities.
        is_local: whether the expansion behind the evidence is valid.

    The leave-one-out density of a point is the normalizer of its likelihood under its cavity, q divided by its site,
    for every method.
    """
    lam1, lam2 = fixed_point.sites
    signed = not model.likelihood.log_concave
    K = model.kernel.gram(X)
    matrices = posterior_matrices(K, lam2, signed)
    q = marginals_from(matrices, model.mean(X), lam1, lam2)
    scale, chol = positive_factor(K, jnp.maximum(lam2, 0))
    status = jnp.maximum(fixed_point.status, q.status)
    if log_evidence is not None:
        bound = largest_log_evidence(model.likelihood, y, model.mean(X), jnp.diagonal(K))
        validity = evidence_status(log_evidence, bound, fixed_point)
        validity = jnp.where(is_local, validity, jnp.maximum(validity, int(Status.POOR_APPROXIMATION)))
        status = jnp.maximum(status, validity)
        is_usable = (status < int(Status.NOT_POSITIVE_DEFINITE)) & (validity == Status.OK)
        log_evidence = jnp.where(is_usable, log_evidence, jnp.nan)
    return Conditioned(
        model=model,
        X=X,
        sites=Sites(lam1, lam2),
        mean=q.mean,
        variance=q.variance,
        alpha=q.alpha,
        chol=chol,
        scale=scale,
        negative=negative_factor(K, lam2) if signed else None,
        precision_diagonal=jnp.diagonal(matrices.reduction),
        log_evidence=log_evidence,
        status=status.astype(jnp.int32),
        jitter=jnp.zeros_like(y[0]),
        residual=fixed_point.residual,
        num_iterations=fixed_point.num_updates,
        log_loo=_log_cavity(model.likelihood, y, q.mean, q.variance, lam1, lam2, num_nodes),
    )


def at_sites(
    model: Model, X: Float[Array, "N D"], y: Float[Array, " N"], sites: Sites, num_nodes: int
) -> Conditioned:
    """Condition on known sites, without a search and without an evidence."""
    zero = jnp.zeros((), jnp.int32)
    fixed_point = FixedPoint(
        sites=jnp.stack([sites.lam1, sites.lam2]),
        residual=jnp.zeros_like(y[0]),
        num_updates=zero,
        status=zero,
    )
    return assemble(model, X, y, fixed_point, None, num_nodes)


def _log_cavity(likelihood, y, mean, variance, lam1, lam2, num_nodes):
    """Log ∫ p(y_i | f) cavity_i(f) df for all points, by solving ``log_ratio_from_cavity`` for it."""
    ratio = log_ratio(likelihood, y, mean, variance, lam1, lam2, 1.0, num_nodes)
    return ratio - log_ratio_from_cavity(jnp.zeros_like(mean), mean, variance, lam1, lam2, 1.0)
