"""The conditioned Gaussian process: everything that inference finds, computed once.

An inference method ends in sites t_i(f) (see ``sites``). With S = diag(scale) and L Lᵀ the factored matrix, every
method of this package has R = (K + Λ⁻¹)⁻¹ = S L⁻ᵀ L⁻¹ S and α = R(ỹ − m): exact inference with S = I and
L Lᵀ = K + noise, the others with S = Λ^½ and L Lᵀ = I + S K S. Prediction needs only L, S and α, and where some sites
have a negative precision the factor that takes them in (see ``precision``).
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
from probinfer.gp.structure.rounding import Factored, lower_covariance, resolve
from probinfer.numerics.semidefinite import cleared_of_rounding

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
        log_evidence: log p(y | X), or its approximation; NaN where there is none: the status is bad, the search ended
            far from a fixed point, or the number is larger than any evidence can be (``POOR_APPROXIMATION``).
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

    def predict(self, X_new: Any) -> LatentMoments:
        """Mean m + k*ᵀα and variance k** − |L⁻¹ S k*|² of the latent function at new inputs, as a pair.

        A variance that is lost in the rounding of k** is replaced by the lower bound of ``rounding``; ``.status`` and
        ``.floor`` of the pair say so, and where a jitter makes most of a variance.

        Raises:
            ValueError: ``X_new`` has another number of columns than the training inputs, or is not finite.
        """
        given = self._project(X_new)
        prior = self.model.kernel.diag(given.X_new)
        positive = prior - jnp.sum(given.half * given.half, 0)
        variance, error = resolve(self._factored(), given.right, prior, positive)
        return LatentMoments(
            given.mean, variance + jnp.sum(given.more * given.more, 0), jnp.maximum(error, given.mean_error)
        )

    def predict_joint(self, X_new: Any) -> tuple[Float[Array, " M"], Float[Array, "M M"]]:
        """Mean and covariance matrix of the latent function at new inputs; positive semi-definite."""
        given = self._project(X_new)
        positive = self.model.kernel.gram(given.X_new) - given.half.T @ given.half
        covariance = cleared_of_rounding(positive, lower_covariance, self._factored(), given.right)
        return given.mean, covariance + given.more.T @ given.more

    def _factored(self):
        lam2 = self.sites.lam2
        # I for approximations, the noise for exact inference; sites kept off zero have a noise of 1, too.
        known = lam2 > float(jnp.finfo(lam2.dtype).tiny) ** 0.5
        noise = jnp.where(known, self.scale**2 / jnp.where(known, lam2, 1), 1)
        return Factored(
            self.chol, self.scale, noise, self.model.kernel.diag(self.X), jnp.asarray(self.jitter, lam2.dtype)
        )

    def _project(self, X_new):
        """The mean, and roots of what the positive sites take from the prior covariance and the negative ones give."""
        X_new = check_inputs(X_new, columns=self.X.shape[1], dtype=self.X.dtype)
        cross = self.model.kernel.gram(self.X, X_new)
        mean = self.model.mean(X_new) + cross.T @ self.alpha
        eps = float(jnp.finfo(cross.dtype).eps)
        mean_error = jax.lax.stop_gradient(jnp.sum((eps * cross * self.alpha[:, None]) ** 2, 0))
        right = self.scale[:, None] * cross
        half = solve_triangular(self.chol, right, lower=True)
        if self.negative is None:
            more = jnp.zeros((0, cross.shape[1]), cross.dtype)
            return _Projected(X_new, mean, mean_error, right, half, more)
        n, chol = self.negative
        given_positive = solve_triangular(self.chol, half, lower=True, trans=1) / self.scale[:, None]
        more = solve_triangular(chol, n[:, None] * given_positive, lower=True)
        return _Projected(X_new, mean, mean_error, right, half, more)


class _Projected(NamedTuple):
    X_new: Any
    mean: Any
    mean_error: Any  # squared rounding error of the sum k*ᵀα
    right: Any  # S k*
    half: Any  # L⁻¹ S k*
    more: Any  # what negative sites give back


def failed(status: Any) -> Any:
    """Whether a status means that the numbers are not to be used."""
    return status >= Status.NOT_POSITIVE_DEFINITE
