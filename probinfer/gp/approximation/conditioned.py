"""The conditioned Gaussian process: the result of an inference method, with what prediction needs.

An inference method results in sites t_i(f) (see ``sites``). With S = diag(scale) and L Lᵀ the factored matrix, every
method of this package has R = (K + Λ⁻¹)⁻¹ = S L⁻ᵀ L⁻¹ S and α = R(ỹ − m): exact inference with S = I and
L Lᵀ = K + noise, the others with S = Λ^½ and L Lᵀ = I + S K S. Prediction needs only L, S and α, and if some sites have
a negative precision the factor that adds them (see ``structure.dense``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from probinfer.core.status import Status
from probinfer.core.types import Array, Float, pytree
from probinfer.gp.approximation.sites import Sites
from probinfer.gp.model.validation import check_inputs
from probinfer.gp.prediction import LatentMoments
from probinfer.gp.structure.rounding import Factorization, lower_covariance, resolve
from probinfer.numerics.semidefinite import clear_rounding

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
        log_evidence: log p(y | X), or its approximation; NaN if the status is bad, if the search ended far from a fixed
            point, or if the number is larger than any evidence can be (``POOR_APPROXIMATION``).
        status: a ``Status``.
        jitter: added to the diagonal of the factored matrix; 0 if nothing was needed.
        residual: largest change of a site that another update would make, in posterior standard deviations.
        num_iterations: updates until the sites stopped moving (0 for exact inference).
        log_loo: leave-one-out log predictive densities ``(N,)`` of the training outputs.
        negative: N ``(N,)`` and the factor ``(N, N)`` of sites with negative precision; None if there cannot be any.
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

    def predict(self, X_new: Any) -> LatentMoments:
        """Mean m + k*ᵀα and variance k** − |L⁻¹ S k*|² of the latent function at new inputs, as a pair.

        A variance that is lost in the rounding of k** is replaced by the lower bound of ``structure.rounding``;
        ``.status`` and ``.floor`` of the pair report this, and a variance that is mostly due to a jitter.

        Raises:
            ValueError: ``X_new`` has another number of columns than the training inputs, or is not finite.
        """
        projection = self._project(X_new)
        prior_variance = self.model.kernel.diag(projection.X_new)
        difference = prior_variance - jnp.sum(projection.reduction_root**2, 0)
        variance, error = resolve(self._factorization(), projection.scaled_cross, prior_variance, difference)
        return LatentMoments(
            projection.mean,
            variance + jnp.sum(projection.increase_root**2, 0),
            jnp.maximum(error, projection.mean_error),
        )

    def predict_joint(self, X_new: Any) -> tuple[Float[Array, " M"], Float[Array, "M M"]]:
        """Mean and covariance matrix of the latent function at new inputs; positive semi-definite."""
        projection = self._project(X_new)
        prior_covariance = self.model.kernel.gram(projection.X_new)
        difference = prior_covariance - projection.reduction_root.T @ projection.reduction_root
        covariance = clear_rounding(
            difference, lower_covariance, self._factorization(), projection.scaled_cross
        )
        return projection.mean, covariance + projection.increase_root.T @ projection.increase_root

    def _factorization(self):
        lam2 = self.sites.lam2
        # The noise is S² Λ⁻¹: that of the data for exact inference, 1 for approximations. Sites whose scale was
        # bounded away from zero have S² > Λ, and a noise of 1 all the same.
        is_resolved = lam2 > float(jnp.finfo(lam2.dtype).tiny) ** 0.5
        noise = jnp.where(is_resolved, self.scale**2 / jnp.where(is_resolved, lam2, 1), 1)
        return Factorization(
            chol=self.chol,
            scale=self.scale,
            noise=noise,
            prior_variance=self.model.kernel.diag(self.X),
            jitter=jnp.asarray(self.jitter, lam2.dtype),
        )

    def _project(self, X_new):
        """The mean, and roots of the changes of the prior covariance by the positive and by the negative sites."""
        X_new = check_inputs(X_new, columns=self.X.shape[1], dtype=self.X.dtype)
        cross = self.model.kernel.gram(self.X, X_new)
        mean = self.model.mean(X_new) + cross.T @ self.alpha
        eps = float(jnp.finfo(cross.dtype).eps)
        mean_error = jax.lax.stop_gradient(jnp.sum((eps * cross * self.alpha[:, None]) ** 2, 0))
        scaled_cross = self.scale[:, None] * cross
        reduction_root = solve_triangular(self.chol, scaled_cross, lower=True)
        if self.negative is None:
            increase_root = jnp.zeros((0, cross.shape[1]), cross.dtype)
        else:
            n, chol = self.negative
            # S⁻¹ L⁻ᵀ L⁻¹ S k* = M₊ k*: the cross covariance given the positive sites
            cross_positive = (
                solve_triangular(self.chol, reduction_root, lower=True, trans=1) / self.scale[:, None]
            )
            increase_root = solve_triangular(chol, n[:, None] * cross_positive, lower=True)
        return _Projection(
            X_new=X_new,
            mean=mean,
            mean_error=mean_error,
            scaled_cross=scaled_cross,
            reduction_root=reduction_root,
            increase_root=increase_root,
        )


class _Projection(NamedTuple):
    X_new: Float[Array, "M D"]
    mean: Float[Array, " M"]
    mean_error: Float[Array, " M"]  # squared rounding error of the sum k*ᵀα
    scaled_cross: Float[Array, "N M"]  # S k*
    reduction_root: Float[Array, "N M"]  # L⁻¹ S k*
    increase_root: Float[Array, "_ M"]  # C^-½ N M₊ k*, without rows if no site can be negative


def failed(status: Any) -> Any:
    """Whether a status means that the numbers must not be used."""
    return status >= Status.NOT_POSITIVE_DEFINITE
