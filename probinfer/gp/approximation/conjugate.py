"""Exact inference: the likelihood is Gaussian, so the sites are the likelihood itself."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from probinfer.core.types import Array, Float, pytree
from probinfer.gp.approximation.conditioned import Conditioned
from probinfer.gp.approximation.sites import Sites
from probinfer.gp.model.likelihoods import gaussian_log_prob
from probinfer.gp.model.model import Model
from probinfer.gp.structure.exact_evidence import gaussian_evidence
from probinfer.numerics.linalg import inverse_from_cholesky

__all__ = ["Exact"]


@pytree
class Exact:
    """Exact inference for Gaussian likelihoods (Rasmussen and Williams 2006, algorithm 2.1)."""

    def condition(
        self, model: Model, X: Float[Array, "N D"], y: Float[Array, " N"], sites: Any = None
    ) -> Conditioned:
        """Condition on checked data; ``sites`` are not used.

        Raises:
            ValueError: the likelihood has no ``noise_variance``.
        """
        if not hasattr(model.likelihood, "noise_variance"):
            raise ValueError(
                f"exact inference needs a Gaussian likelihood, got {type(model.likelihood).__name__}; use an "
                "approximation (gp.EP(), gp.Laplace(), gp.VI())"
            )
        noise = model.likelihood.noise_variance(X.shape[0])
        evidence = gaussian_evidence(model.kernel, X, y - model.mean(X), noise)
        # diag(R): only read by the marginals and leave-one-out, so compiled away where neither is used.
        precision = _inverse_diagonal(evidence.chol)
        total = noise + evidence.jitter  # jitter acts as noise
        # Leave one out: y_i | y_-i ~ N(y_i − α_i / R_ii, 1 / R_ii) (Rasmussen and Williams 2006, eq. 5.12).
        loo_mean, loo_variance = y - evidence.alpha / precision, 1 / precision
        return Conditioned(
            model=model,
            X=X,
            sites=Sites(y / total, 1 / total),
            mean=y - total * evidence.alpha,
            variance=jnp.maximum(total - total**2 * precision, 0),
            alpha=evidence.alpha,
            chol=evidence.chol,
            scale=jnp.ones_like(y),
            precision_diagonal=precision,
            log_evidence=evidence.log_evidence,
            status=evidence.status,
            jitter=evidence.jitter,
            residual=jnp.zeros_like(y[0]),
            num_iterations=jnp.zeros((), jnp.int32),
            log_loo=gaussian_log_prob(y, loo_mean, loo_variance),
        )


def _inverse_diagonal(chol):
    return jnp.diagonal(inverse_from_cholesky(chol))
