"""Mixtures of normals: the latent function, and outputs with Gaussian noise."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp, ndtr, ndtri

from probinfer.core.types import Array, Float, PRNGKey, pytree
from probinfer.gp.prediction.bisection import bisect, check_levels

__all__ = ["NormalMixture"]


@pytree
class NormalMixture:
    """p(y_m) = (1/S) Σ_s N(y_m; means[s, m], variances[s, m]), one mixture for each point.

    Attributes:
        means: component means ``(S, M)``.
        variances: component variances ``(S, M)``.
    """

    means: Any
    variances: Any

    @property
    def mean(self) -> Float[Array, " M"]:
        """The mixture mean."""
        return self.means.mean(0)

    @property
    def variance(self) -> Float[Array, " M"]:
        """The mixture variance: mean of the variances plus variance of the means."""
        return self.variances.mean(0) + self.means.var(0)

    @property
    def stddev(self) -> Float[Array, " M"]:
        """The standard deviation of the mixture."""
        return jnp.sqrt(self.variance)

    def log_prob(self, y: Float[Array, " M"]) -> Float[Array, " M"]:
        """Log (1/S) Σ_s N(y_m; ·), pointwise."""
        quadratic = (y - self.means) ** 2 / self.variances
        component = -0.5 * (quadratic + jnp.log(2 * jnp.pi * self.variances))
        return logsumexp(component, axis=0) - jnp.log(jnp.asarray(self.means.shape[0], self.means.dtype))

    def cdf(self, y: Float[Array, " M"]) -> Float[Array, " M"]:
        """The distribution function at ``y``, pointwise."""
        return ndtr((y - self.means) / jnp.sqrt(self.variances)).mean(0)

    def quantile(self, q: Any) -> Float[Array, "..."]:
        """The ``q``-quantile of each point, by bisection between the smallest and largest component quantile.

        Args:
            q: a probability strictly between 0 and 1, or a vector ``(Q,)`` of them.

        Returns:
            ``(M,)`` for a scalar ``q``, ``(Q, M)`` for a vector.

        Raises:
            ValueError: a concrete ``q`` is outside (0, 1).
        """
        q = check_levels(q, self.means.dtype)
        if q.ndim == 0:
            return _quantile(self.means, self.variances, q)
        return jax.lax.map(lambda level: _quantile(self.means, self.variances, level), q)

    def sample(self, key: PRNGKey, num: int) -> Float[Array, "num M"]:
        """``num`` independent draws at each point."""
        component_key, noise_key = jax.random.split(key)
        num_components, num_points = self.means.shape
        component = jax.random.randint(component_key, (num, num_points), 0, num_components)
        noise = jax.random.normal(noise_key, (num, num_points), self.means.dtype)
        point = jnp.arange(num_points)
        return self.means[component, point] + jnp.sqrt(self.variances[component, point]) * noise

    def affine(self, shift: Any, scale: Any) -> NormalMixture:
        """The distribution of ``shift + scale · y``."""
        return NormalMixture(shift + scale * self.means, scale**2 * self.variances)


@jax.jit
def _quantile(means, variances, q):
    stddev = jnp.sqrt(variances)
    component_quantiles = means + stddev * ndtri(q)
    num_steps = 60 if means.dtype == jnp.float64 else 30  # halvings until the bracket is at rounding level

    def is_below(y):
        return ndtr((y - means) / stddev).mean(0) < q

    return bisect(is_below, component_quantiles.min(0), component_quantiles.max(0), num_steps=num_steps)
