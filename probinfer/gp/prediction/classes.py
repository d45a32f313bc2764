"""Class probabilities, averaged over hyperparameter draws."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from probinfer.core.types import Array, Float, PRNGKey, pytree

__all__ = ["BernoulliMixture"]


@pytree
class BernoulliMixture:
    """P(y_m = 1) = (1/S) Σ_s exp(log_ones[s, m]); both logs are stored, so that neither tail loses digits.

    Attributes:
        log_zeros: log P(y_m = 0 | draw s), shape ``(S, M)``.
        log_ones: log P(y_m = 1 | draw s), shape ``(S, M)``.
    """

    log_zeros: Any
    log_ones: Any
    discrete: ClassVar[bool] = True

    @property
    def probability(self) -> Float[Array, " M"]:
        """P(y = 1), the mean over draws."""
        return jnp.exp(self.log_ones).mean(0)

    @property
    def mean(self) -> Float[Array, " M"]:
        """The mean of y, which is P(y = 1)."""
        return self.probability

    @property
    def variance(self) -> Float[Array, " M"]:
        """The variance of y, P(y = 1) P(y = 0)."""
        return self.probability * jnp.exp(self.log_zeros).mean(0)

    @property
    def stddev(self) -> Float[Array, " M"]:
        """The standard deviation of y."""
        return jnp.sqrt(self.variance)

    def log_prob(self, y: Any) -> Float[Array, " M"]:
        """Log P(y), pointwise, for labels 0 and 1; −1 is read as class 0, and any other label has probability 0."""
        y = jnp.asarray(y)
        num = jnp.log(jnp.asarray(self.log_ones.shape[0], self.log_ones.dtype))
        zero, one = logsumexp(self.log_zeros, axis=0) - num, logsumexp(self.log_ones, axis=0) - num
        return jnp.where(y == 1, one, jnp.where((y == 0) | (y == -1), zero, -jnp.inf))

    def cdf(self, y: Float[Array, " M"]) -> Float[Array, " M"]:
        """P(Y <= y), pointwise, for Y in {0, 1}: 0 at y = −1."""
        zero = jnp.exp(self.log_zeros).mean(0)
        return jnp.where(y < 0, 0.0, jnp.where(y < 1, zero, 1.0)).astype(zero.dtype)

    def sample(self, key: PRNGKey, num: int) -> Float[Array, "num M"]:
        """``num`` independent labels at each point."""
        probability = self.probability
        uniform = jax.random.uniform(key, (num, *probability.shape), probability.dtype)
        return (uniform < probability).astype(probability.dtype)
