"""The conditioned Gaussian process: everything that inference finds, computed once.

An inference method ends in sites t_i(f) (see ``sites``). With S = diag(scale) and L Lᵀ the factored matrix, every
method of this package has R = (K + Λ⁻¹)⁻¹ = S L⁻ᵀ L⁻¹ S and α = R(ỹ − m): exact inference with S = I and
L Lᵀ = K + noise, the others with S = Λ^½ and L Lᵀ = I + S K S. Prediction needs only L, S and α, and where some sites
have a negative precision the factor that takes them in (see ``precision``).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from probinfer.base import Status
from probinfer.gp.sites import Sites
from probinfer.gp.validate import check_inputs
from probinfer.types import Array, Float, pytree

__all__ = ["Conditioned", "failed"]


@pytree
class Conditioned:
    """A Gaussian process given data, or its Gaussian approximation.

    Attributes:
        model: the model, in the dtype of the data.
        X: training inputs ``(N, D)``.
        sites: the Gaussian factors in place of the likelihood.
        mean: posterior means of f at ``X``, shape ``(N,)``: m + K α.
        variance: posterior variances of f at ``X``, shape ``(N,)``: diag(K − K R K).
        alpha: R(ỹ − m), shape ``(N,)``.
        chol: lower Cholesky factor L, shape ``(N, N)``.
        scale: diagonal of S, shape ``(N,)``.
        precision_diagonal: diag(R), shape ``(N,)``.
        log_evidence: log p(y | X), or its approximation; NaN when the status is bad.
        status: a ``Status``.
        jitter: what was added to the diagonal of the factored matrix, 0 where nothing was needed.
        residual: the largest change of a site that another sweep would make, in posterior standard deviations.
        num_iterations: sweeps until the sites stopped moving (0 for exact inference).
        log_loo: leave-one-out log predictive densities ``(N,)`` of the training outputs.
        negative: N ``(N,)`` and the factor ``(N, N)`` of sites with negative precision, None where there cannot be any.
    """

    model: Any
    X: Any
    sites: Sites
    mean: Any
    variance: Any
    alpha: Any
    chol: Any
    scale: Any
    precision_diagonal: Any
    log_evidence: Any
    status: Any
    jitter: Any
    residual: Any
    num_iterations: Any
    log_loo: Any
    negative: Any = None

    def predict(self, X_new: Any) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
        """Mean and variance of the latent function at new inputs: m + k*ᵀα and k** − |L⁻¹ S k*|².

        Raises:
            ValueError: ``X_new`` has another number of columns than the training inputs, or is not finite.
        """
        mean, half, more = self._project(X_new)
        prior = self.model.kernel.diag(X_new)
        # The difference of two numbers of the size of the prior variance: below its rounding level it is zero.
        return mean, jnp.maximum(prior - jnp.sum(half * half, 0) + jnp.sum(more * more, 0), 0)

    def predict_joint(self, X_new: Any) -> tuple[Float[Array, " M"], Float[Array, "M M"]]:
        """Mean and covariance matrix of the latent function at new inputs."""
        mean, half, more = self._project(X_new)
        return mean, self.model.kernel.gram(X_new) - half.T @ half + more.T @ more

    def _project(self, X_new):
        """The mean, and roots of what the positive sites take from the prior covariance and the negative ones give."""
        X_new = check_inputs(X_new, columns=self.X.shape[1], dtype=self.X.dtype)
        cross = self.model.kernel.gram(self.X, X_new)
        mean = self.model.mean(X_new) + cross.T @ self.alpha
        half = solve_triangular(self.chol, self.scale[:, None] * cross, lower=True)
        if self.negative is None:
            return mean, half, jnp.zeros((0, cross.shape[1]), cross.dtype)
        n, chol = self.negative
        given_positive = solve_triangular(self.chol, half, lower=True, trans=1) / self.scale[:, None]
        return mean, half, solve_triangular(chol, n[:, None] * given_positive, lower=True)


def failed(status: Any) -> Any:
    """Whether a status means that the numbers are not to be used."""
    return status >= Status.NOT_POSITIVE_DEFINITE
