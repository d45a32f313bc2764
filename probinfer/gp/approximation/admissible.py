"""When an energy is an evidence: near its fixed point, and not larger than any evidence can be.

The energies of EP, of the hybrid and of Laplace's approximation are defined at any sites. Away from their fixed points
they estimate nothing and have no bound: a search that takes them for evidences ends at the worst failure of the
approximation. A single evaluation allows two checks: the distance from the fixed point; and, since the evidence is the
mean of the likelihood over the prior, the bound log p(y) = log E Π p(y_i | f_i) <= Σ sup_f log p(y_i | f), which is at
most 0 if y is discrete.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.status import Status
from probinfer.core.types import Array, Float, Int
from probinfer.gp.approximation.fixed_point import FixedPoint
from probinfer.gp.model.likelihoods.support import largest_log_density

__all__ = ["evidence_status", "has_bound", "largest_log_evidence"]

# In posterior standard deviations; the energies of EP and VI are then off by some 1e-4 a point.
_MAX_RESIDUAL = 1e-2
_ROUNDING = 1e3  # machine epsilons of the bound


def largest_log_evidence(
    likelihood: Any, y: Float[Array, " N"], prior_mean: Float[Array, " N"], prior_variance: Float[Array, " N"]
) -> Float[Array, ""]:
    """An upper bound on log p(y): 0 for masses, else the sum of the largest log densities.

    These are known if the likelihood has a ``peak`` or is log-concave; otherwise the bound is infinite.
    """
    if likelihood.discrete:
        return jnp.zeros((), y.dtype)
    peak = getattr(likelihood, "peak", None)
    if peak is not None:
        return jax.lax.stop_gradient(jnp.sum(likelihood.log_density(y, peak(y))))
    if likelihood.log_concave:
        largest = largest_log_density(likelihood, y, prior_mean, jnp.sqrt(prior_variance))
        return jax.lax.stop_gradient(jnp.sum(largest))
    return jnp.full((), jnp.inf, y.dtype)


def has_bound(likelihood: Any) -> bool:
    """Whether ``largest_log_evidence`` is finite: for masses, densities with a ``peak``, and log-concave ones."""
    return likelihood.discrete or getattr(likelihood, "peak", None) is not None or likelihood.log_concave


def evidence_status(
    log_evidence: Float[Array, ""], bound: Float[Array, ""], fixed_point: FixedPoint
) -> Int[Array, ""]:
    """Decide whether an energy is an evidence.

    Args:
        log_evidence: the energy.
        bound: from ``largest_log_evidence``.
        fixed_point: the end of the search for the fixed point.

    Returns:
        ``OK``; ``MAX_ITERATIONS``: too far from a fixed point; ``POOR_APPROXIMATION``: larger than any evidence;
        ``NON_FINITE``.
    """
    size = jnp.where(jnp.isfinite(bound), 1 + jnp.abs(bound), 1)
    is_above = log_evidence > bound + _ROUNDING * float(jnp.finfo(size.dtype).eps) * size
    status = jnp.where(fixed_point.residual <= _MAX_RESIDUAL, int(Status.OK), int(Status.MAX_ITERATIONS))
    status = jnp.where(is_above, int(Status.POOR_APPROXIMATION), status)
    return jnp.where(jnp.isfinite(log_evidence), status, int(Status.NON_FINITE)).astype(jnp.int32)
