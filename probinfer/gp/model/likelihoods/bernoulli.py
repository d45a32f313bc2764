"""Classes 0 and 1."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.types import Array, Float, field, pytree
from probinfer.gp.model.likelihoods.base import Likelihood, refuse_noise
from probinfer.gp.model.likelihoods.cavities import cavity, log_ratio_from_cavity
from probinfer.gp.model.likelihoods.probit import (
    inverse_mills,
    log_ndtr,
    log_ndtr_derivatives,
    truncated_variance,
)
from probinfer.gp.prediction import BernoulliMixture

__all__ = ["Bernoulli"]


@pytree
class Bernoulli(Likelihood):
    """p(y = 1 | f) = Φ(f) or 1/(1 + exp(−f)), exact in both tails.

    Attributes:
        link: ``"probit"`` (closed forms for expectation propagation and prediction) or ``"logit"``.

    Raises:
        ValueError: the link is unknown.
    """

    link: str = field(static=True, default="probit")
    log_concave: ClassVar[bool] = True
    discrete: ClassVar[bool] = True
    saturates_at: ClassVar[float] = 100.0  # latent standard deviations: probabilities are 0 and 1

    def __post_init__(self):
        if self.link not in ("probit", "logit"):
            raise ValueError(f"Bernoulli.link must be 'probit' or 'logit', got {self.link!r}")

    def log_density(self, y: Float[Array, "..."], f: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log p(y | f) for y in {0, 1}, elementwise."""
        z = (2 * y - 1) * f
        return log_ndtr(z) if self.link == "probit" else _log_sigmoid(z)

    def curvature_location(self, y: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """F = 0: both links pass from one asymptote to the other within some units around it."""
        return jnp.zeros_like(y), jnp.full_like(y, 7.0)

    def closed_derivatives(
        self, y: Float[Array, "..."], f: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]] | None:
        """Log p and its first three derivatives in f, for the probit from one continued fraction."""
        if self.link != "probit":
            return None
        sign = 2 * y - 1
        value, first, second, third = log_ndtr_derivatives(sign * f)
        return value, sign * first, second, sign * third

    def check_outputs(self, y: Any) -> Any:
        """Check labels in {0, 1}; −1 and +1 are converted to 0 and 1, with a warning.

        Raises:
            ValueError: there are other values.
        """
        values = np.asarray(y)
        labels = np.unique(values)
        if -1 in labels and np.isin(labels, (-1, 1)).all():
            warnings.warn(
                "the labels are -1 and +1: read as classes 0 and 1. Pass (y + 1) / 2 to avoid this warning",
                stacklevel=3,
            )
            y, values = (y + 1) / 2, (values + 1) / 2
        elif not np.isin(labels, (0, 1)).all():
            shown = ", ".join(f"{value:g}" for value in labels[:5])
            raise ValueError(
                f"Bernoulli needs labels 0 and 1, got {shown}{', ...' if len(labels) > 5 else ''}; for two classes "
                "with other names pass (labels == the_second).astype(X.dtype)"
            )
        if values.size and (values == values.flat[0]).all():
            warnings.warn(
                f"all labels are {values.flat[0]:g}: with one class only, the data do not determine the "
                "hyperparameters, and the prior decides",
                stacklevel=3,
            )
        return y

    def log_prob(
        self, y: Float[Array, "..."], mean: Float[Array, "..."], variance: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Log ∫ p(y | f) N(f; mean, variance) df: log Φ(±mean/√(1 + variance)), or quadrature for the logit."""
        if self.link == "probit":
            return log_ndtr((2 * y - 1) * mean / jnp.sqrt(1 + variance))
        return super().log_prob(y, mean, variance)

    def predictive(
        self, mean: Float[Array, "S M"], variance: Float[Array, "S M"], noise: Any = None
    ) -> BernoulliMixture:
        """The distribution of the class at M new points, S hyperparameter draws of equal weight.

        Raises:
            ValueError: a noise variance was passed, which is for ``KnownNoise`` only.
        """
        refuse_noise(self, noise)
        return BernoulliMixture(*_log_probabilities(self, mean, variance))

    def closed_log_ratio(
        self,
        y: Float[Array, " N"],
        m: Float[Array, " N"],
        v: Float[Array, " N"],
        lam1: Float[Array, " N"],
        lam2: Float[Array, " N"],
        power: float,
    ) -> Float[Array, " N"] | None:
        """Log E[p/t] from the normalizer of cavity times likelihood, for the probit with power 1 (eq. 3.58 of R&W)."""
        if self.link != "probit" or power != 1:
            return None
        mean, variance, _ = cavity(m, v, lam1, lam2, power)
        return log_ratio_from_cavity(self.log_prob(y, mean, variance), m, v, lam1, lam2, power)

    def closed_tilted_moments(
        self,
        y: Float[Array, " N"],
        m: Float[Array, " N"],
        v: Float[Array, " N"],
        lam1: Float[Array, " N"],
        lam2: Float[Array, " N"],
        power: float,
    ) -> tuple[Float[Array, " N"], Float[Array, " N"]] | None:
        """Moments of p(y | f) times the cavity, for the probit with power 1 (Rasmussen and Williams 2006, eq. 3.58)."""
        if self.link != "probit" or power != 1:
            return None
        mean, variance, _ = cavity(m, v, lam1, lam2, power)
        sign, total = 2 * y - 1, 1 + variance
        z = sign * mean / jnp.sqrt(total)
        # variance² d2 + variance, with 1 + d2 (1 + variance) = truncated_variance(z): nothing cancels
        return (
            mean + variance * sign * inverse_mills(z) / jnp.sqrt(total),
            variance * (1 + variance * truncated_variance(z)) / total,
        )


@jax.jit
def _log_probabilities(likelihood, mean, variance):
    def log_probabilities(moments):
        return tuple(likelihood.log_prob(jnp.full_like(moments[0], label), *moments) for label in (0.0, 1.0))

    # Draws one after another: the quadrature nodes of all draws at once would not fit into memory.
    return jax.lax.map(log_probabilities, (mean, variance))


@jax.custom_jvp
def _sigmoid(x):
    return jax.nn.sigmoid(x)


@jax.custom_jvp
def _log_sigmoid(x):
    return -jnp.logaddexp(-x, 0.0)


@_sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return _sigmoid(x), _sigmoid(x) * _sigmoid(-x) * dx  # not s (1 - s), which is 0 where s rounds to 1


@_log_sigmoid.defjvp
def _log_sigmoid_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return _log_sigmoid(x), _sigmoid(-x) * dx
