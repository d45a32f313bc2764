"""Outputs of any likelihood: mixtures over hyperparameter draws of p(y | f) integrated over a Gaussian f.

The likelihood computes the integrals: always ``log_prob(y, mean, variance)``, and ``output_moments``, ``cdf`` and
``sample`` if it has them; the error for a missing method names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from probinfer.core.types import Array, Float, PRNGKey, pytree
from probinfer.gp.prediction.bisection import bisect, check_levels

__all__ = ["CountMixture", "LatentMixture"]


class _Mixture:
    """The common part of counts and densities. Draws are processed one after another: memory does not grow with S."""

    likelihood: Any
    means: Any
    variances: Any
    _quantile: Callable  # maps a scalar q to the quantile of each point

    @property
    def mean(self) -> Float[Array, " M"]:
        """The mean of y; NaN if it does not exist.

        Raises:
            TypeError: the likelihood has no ``output_moments``.
        """
        return self._moments()[0].mean(0)

    @property
    def variance(self) -> Float[Array, " M"]:
        """The variance of y: mean of the variances plus variance of the means.

        Raises:
            TypeError: the likelihood has no ``output_moments``.
        """
        means, variances = self._moments()
        return variances.mean(0) + means.var(0)

    @property
    def stddev(self) -> Float[Array, " M"]:
        """The standard deviation of y."""
        return jnp.sqrt(self.variance)

    def log_prob(self, y: Any) -> Float[Array, " M"]:
        """Log (1/S) Σ_s ∫ p(y | f, s) N(f; ·) df, pointwise."""
        return _log_prob(self, jnp.asarray(y, self.means.dtype))

    def cdf(self, y: Float[Array, " M"]) -> Float[Array, " M"]:
        """P(Y <= y), pointwise.

        Raises:
            TypeError: the likelihood has no ``cdf``.
        """
        return _cdf(self, jnp.asarray(y, self.means.dtype))

    def quantile(self, q: Any) -> Float[Array, "..."]:
        """The ``q``-quantile of each point; for counts the smallest count with P(Y <= count) >= q.

        Args:
            q: a probability strictly between 0 and 1, or a vector ``(Q,)`` of them.

        Returns:
            ``(M,)`` for a scalar ``q``, ``(Q, M)`` for a vector.

        Raises:
            ValueError: a concrete ``q`` is outside (0, 1).
            TypeError: the likelihood has no ``cdf``.
        """
        q = check_levels(q, self.means.dtype)
        if q.ndim == 0:
            return self._quantile(q)
        return jax.lax.map(self._quantile, q)

    def sample(self, key: PRNGKey, num: int) -> Float[Array, "num M"]:
        """``num`` independent draws at each point.

        Raises:
            TypeError: the likelihood has no ``sample``.
        """
        _method(self.likelihood, "sample")
        component_key, latent_key, output_key = jax.random.split(key, 3)
        num_components, num_points = self.means.shape
        component = jax.random.randint(component_key, (num, num_points), 0, num_components)
        point = jnp.arange(num_points)
        noise = jax.random.normal(latent_key, (num, num_points), self.means.dtype)
        f = self.means[component, point] + jnp.sqrt(self.variances[component, point]) * noise
        likelihood = jax.tree.map(lambda leaf: leaf[component], self.likelihood)
        return likelihood.sample(output_key, f)

    def _moments(self):
        _method(self.likelihood, "output_moments")
        return jax.vmap(lambda likelihood, m, v: likelihood.output_moments(m, v))(
            self.likelihood, self.means, self.variances
        )


@pytree
class LatentMixture(_Mixture):
    """p(y_m) = (1/S) Σ_s ∫ p(y_m | f, s) N(f; means[s, m], variances[s, m]) df for a real y.

    Attributes:
        likelihood: the likelihood at each draw, leaves ``(S, ...)``.
        means: latent means ``(S, M)``.
        variances: latent variances ``(S, M)``.
        shift: y = shift + scale · (the likelihood's output).
        scale: see ``shift``; positive.
    """

    likelihood: Any
    means: Any
    variances: Any
    shift: Any = 0.0
    scale: Any = 1.0

    @property
    def mean(self) -> Float[Array, " M"]:
        """The mean of y; NaN if it does not exist."""
        return self.shift + self.scale * super().mean

    @property
    def variance(self) -> Float[Array, " M"]:
        """The variance of y; infinite or NaN if it does not exist."""
        return self.scale**2 * super().variance

    def log_prob(self, y: Any) -> Float[Array, " M"]:
        """Log density of y, pointwise."""
        return super().log_prob((y - self.shift) / self.scale) - jnp.log(jnp.asarray(self.scale, y.dtype))

    def cdf(self, y: Float[Array, " M"]) -> Float[Array, " M"]:
        """P(Y <= y), pointwise."""
        return super().cdf((y - self.shift) / self.scale)

    def quantile(self, q: Any) -> Float[Array, "..."]:
        """The ``q``-quantile of each point, by bisection; see the base class."""
        return self.shift + self.scale * super().quantile(q)

    def sample(self, key: PRNGKey, num: int) -> Float[Array, "num M"]:
        """``num`` independent draws at each point."""
        return self.shift + self.scale * super().sample(key, num)

    def affine(self, shift: Any, scale: Any) -> LatentMixture:
        """The distribution of ``shift + scale · y``."""
        return LatentMixture(
            self.likelihood, self.means, self.variances, shift + scale * self.shift, scale * self.scale
        )

    def _quantile(self, q):
        center = self.means.mean(0)
        spread = jnp.sqrt(self.variances.mean(0) + self.means.var(0))
        return _real_quantile(self, q, center, spread)


@pytree
class CountMixture(_Mixture):
    """P(y_m) = (1/S) Σ_s ∫ p(y_m | f, s) N(f; means[s, m], variances[s, m]) df for y = 0, 1, 2, ...

    Attributes:
        likelihood: the likelihood at each draw, leaves ``(S, ...)``.
        means: latent means ``(S, M)``.
        variances: latent variances ``(S, M)``.
    """

    likelihood: Any
    means: Any
    variances: Any
    discrete: ClassVar[bool] = True

    def log_prob(self, y: Any) -> Float[Array, " M"]:
        """Log P(y), pointwise; minus infinity if y is no count."""
        y = jnp.asarray(y, self.means.dtype)
        is_count = (y >= 0) & (y == jnp.floor(y))
        return jnp.where(is_count, super().log_prob(jnp.where(is_count, y, 0)), -jnp.inf)

    def cdf(self, y: Float[Array, " M"]) -> Float[Array, " M"]:
        """P(Y <= y), pointwise; 0 below 0."""
        y = jnp.floor(y)
        return jnp.where(y < 0, 0.0, super().cdf(jnp.maximum(y, 0.0))).astype(self.means.dtype)

    def _quantile(self, q):
        return _count_quantile(self, q)


def _method(likelihood, name):
    method = getattr(likelihood, name, None)
    if method is None:
        raise TypeError(
            f"{type(likelihood).__name__} has no {name}; define it to get this part of the predictive distribution "
            "(see probinfer.gp.likelihoods.base)"
        )
    return method


@jax.jit
def _log_prob(mixture, y):
    def component_log_prob(component):
        likelihood, mean, variance = component
        return likelihood.log_prob(y, mean, variance)

    values = jax.lax.map(component_log_prob, (mixture.likelihood, mixture.means, mixture.variances))
    return logsumexp(values, axis=0) - jnp.log(jnp.asarray(values.shape[0], values.dtype))


@jax.jit
def _cdf(mixture, y):
    def component_cdf(component):
        return _method(component[0], "cdf")(y, *component[1:])

    return jax.lax.map(component_cdf, (mixture.likelihood, mixture.means, mixture.variances)).mean(0)


@jax.jit
def _real_quantile(mixture, q, center, spread):
    # Bisection of t in y = center + spread sinh(t), which covers the whole range of the dtype.
    end, num_steps = (300.0, 64) if center.dtype == jnp.float64 else (80.0, 36)

    def is_below(t):
        return _cdf(mixture, center + spread * jnp.sinh(t)) < q

    low, high = jnp.full_like(center, -end), jnp.full_like(center, end)
    return center + spread * jnp.sinh(bisect(is_below, low, high, num_steps=num_steps))


@jax.jit
def _count_quantile(mixture, q):
    # Invariant P(Y <= low) < q <= P(Y <= high): high doubles until it holds, then the bracket of integers is halved.
    def is_unfinished(state):
        low, high, is_doubling = state
        return jnp.any(is_doubling | (high - low > 1))

    def step(state):
        low, high, is_doubling = state
        point = jnp.where(is_doubling, high, jnp.floor(0.5 * (low + high)))
        is_below = mixture.cdf(point) < q
        doubled = jnp.where(is_doubling & is_below, 2 * high + 1, high)
        return jnp.where(is_below, point, low), jnp.where(is_below, doubled, point), is_doubling & is_below

    low = jnp.full_like(mixture.means[0], -1.0)
    is_doubling = jnp.ones(low.shape, bool)
    return jax.lax.while_loop(is_unfinished, step, (low, jnp.zeros_like(low), is_doubling))[1]
