"""From converged sites to a conditioned process: what prediction and leave-one-out need, computed once."""

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
from probinfer.gp.structure.dense import negative_factor, positive_factor, precision

__all__ = ["assemble", "at_sites"]


def assemble(
    model: Model,
    X: Float[Array, "N D"],
    y: Float[Array, " N"],
    found: FixedPoint,
    log_evidence: Float[Array, ""] | None,
    num_nodes: int,
    is_local: Bool[Array, ""] | bool = True,
) -> Conditioned:
    """A conditioned process from its sites; what is not used is compiled away.

    Args:
        model: the model.
        X: inputs.
        y: checked outputs.
        found: the sites.
        log_evidence: at these sites; None where it is not asked for.
        num_nodes: quadrature nodes for leave-one-out densities.
        is_local: whether the expansion behind the evidence holds where it is used.

    The leave-one-out density of a point is the normaliser of its likelihood under its cavity, q divided by its site,
    whatever the method that found the sites.
    """
    lam1, lam2 = found.sites
    signed = not model.likelihood.log_concave
    K = model.kernel.gram(X)
    known = precision(K, lam2, signed)
    q = marginals_from(known, model.mean(X), lam1, lam2)
    scale, chol = positive_factor(K, jnp.maximum(lam2, 0))
    status = jnp.maximum(found.status, q.status)
    if log_evidence is not None:
        bound = largest_log_evidence(model.likelihood, y, model.mean(X), jnp.diagonal(K))
        verdict = evidence_status(log_evidence, bound, found)
        verdict = jnp.where(is_local, verdict, jnp.maximum(verdict, int(Status.POOR_APPROXIMATION)))
        status = jnp.maximum(status, verdict)
        usable = (status < int(Status.NOT_POSITIVE_DEFINITE)) & (verdict == Status.OK)
        log_evidence = jnp.where(usable, log_evidence, jnp.nan)
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
        precision_diagonal=jnp.diagonal(known.reduction),
        log_evidence=log_evidence,
        status=status.astype(jnp.int32),
        jitter=jnp.zeros_like(y[0]),
        residual=found.residual,
        num_iterations=found.num_updates,
        log_loo=_log_cavity(model.likelihood, y, q.mean, q.variance, lam1, lam2, num_nodes),
    )


def at_sites(
    model: Model, X: Float[Array, "N D"], y: Float[Array, " N"], sites: Sites, num_nodes: int
) -> Conditioned:
    """Condition on sites that were found before: no search, and no evidence."""
    none = jnp.zeros((), jnp.int32)
    found = FixedPoint(jnp.stack([sites.lam1, sites.lam2]), jnp.zeros_like(y[0]), none, none)
    return assemble(model, X, y, found, None, num_nodes)


def _log_cavity(likelihood, y, mean, variance, lam1, lam2, num_nodes):
    """Log ∫ p(y_i | f) cavity_i(f) df for all points: ``log_ratio_from_cavity`` the other way round."""
    ratio = log_ratio(likelihood, y, mean, variance, lam1, lam2, 1.0, num_nodes)
    return ratio - log_ratio_from_cavity(jnp.zeros_like(mean), mean, variance, lam1, lam2, 1.0)
