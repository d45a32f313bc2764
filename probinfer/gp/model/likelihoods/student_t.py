"""Student-t noise: regression that is robust against outliers."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp, ndtr
from numpyro.distributions import constraints

from probinfer.core.types import Array, Float, PRNGKey, field, pytree
from probinfer.gp.model.likelihoods.base import Likelihood
from probinfer.gp.model.likelihoods.counts import log_gamma_ratio

__all__ = ["StudentT"]

_NUM_POINTS = 256


@pytree
class StudentT(Likelihood):
    """p(y | f) ∝ (1 + (y − f)²/(df scale²))^(−(df + 1)/2).

    Both parameters are learned; to keep the degrees of freedom, fix them in the prior:
    ``gp.replace(prior, {"likelihood.df": gp.fixed})``. Not log-concave in f.

    Attributes:
        scale: positive, in units of y; the standard deviation is scale · √(df / (df − 2)).
        df: degrees of freedom, positive; the limit ∞ is Gaussian noise.
    """

    scale: Any = field(default=1.0, constraint=constraints.positive, units=(0, 1))
    df: Any = field(default=4.0, constraint=constraints.positive, units=(0, 0))
    outputs_have_unit: ClassVar[bool] = True

    def log_density(self, y: Float[Array, "..."], f: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log p(y | f), elementwise."""
        half = 0.5 * self.df
        log_norm = log_gamma_ratio(jnp.full_like(half, 0.5), half) - 0.5 * math.log(2 * math.pi)
        square = ((y - f) / self.scale) ** 2
        return log_norm - jnp.log(self.scale) - (half + 0.5) * jnp.log1p(square / self.df)

    def peak(self, y: Float[Array, "..."]) -> Float[Array, "..."]:
        """The f that maximizes the density: the output."""
        return y

    def curvature_location(self, y: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """The output, over some scales: log p has its singularities at y ± i √df scale."""
        return y, jnp.broadcast_to(2 * self.scale * jnp.sqrt(self.df), y.shape)

    def log_prob(
        self, y: Float[Array, "..."], mean: Float[Array, "..."], variance: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Log ∫ p(y | f) N(f; mean, variance) df, elementwise.

        The log of the mean of N(y; mean, variance + scale²/w) over w ~ Gamma(df/2, rate df/2), for df >= 0.5.
        """
        y, mean, variance = jnp.broadcast_arrays(y, mean, variance)
        log_weights, w = self._gamma_nodes((y - mean) ** 2 / self.scale**2)
        total = variance + self.scale**2 / w
        return logsumexp(log_weights - 0.5 * (jnp.log(2 * jnp.pi * total) + (y - mean) ** 2 / total), axis=0)

    def cdf(
        self, y: Float[Array, "..."], mean: Float[Array, "..."], variance: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """P(Y <= y) for f ~ N(mean, variance), elementwise."""
        y, mean, variance = jnp.broadcast_arrays(y, mean, variance)
        log_weights, w = self._gamma_nodes((y - mean) ** 2 / self.scale**2)
        return jnp.sum(
            jnp.exp(log_weights) * ndtr((y - mean) / jnp.sqrt(variance + self.scale**2 / w)), axis=0
        )

    def output_moments(
        self, mean: Float[Array, "..."], variance: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Mean and variance of y for f ~ N(mean, variance); infinite or NaN if they do not exist."""
        noise = jnp.where(
            self.df > 2, self.scale**2 * self.df / jnp.where(self.df > 2, self.df - 2, 1), jnp.inf
        )
        return jnp.where(self.df > 1, mean, jnp.nan), jnp.where(self.df > 1, variance + noise, jnp.nan)

    def sample(self, key: PRNGKey, f: Float[Array, "..."]) -> Float[Array, "..."]:
        """An output for each entry of f."""
        return f + self.scale * jax.random.t(key, jnp.broadcast_to(self.df, f.shape), dtype=f.dtype)

    def _gamma_nodes(self, square):
        """Log weights and nodes w of w ~ Gamma(df/2, rate df/2), by the trapezoid rule in u = log w.

        With x = 36 / (df/2) the density of u has fallen by exp(−36) at log(1 + x + √2x) and, left of the smallest w
        that an output at that distance makes likely, at −(x + √2x).
        """
        half = 0.5 * self.df
        x = 36.0 / half
        drop = x + jnp.sqrt(2.0 * x)
        low = -jnp.log1p(jnp.maximum(square - 1, 0) / (self.df + 1)) - drop
        low = jnp.maximum(low, 0.9 * float(np.log(jnp.finfo(square.dtype).tiny)))
        shape = (_NUM_POINTS, *(1,) * square.ndim)
        grid = jnp.asarray(np.linspace(0.0, 1.0, _NUM_POINTS).reshape(shape), square.dtype)
        u = low + (jnp.log1p(drop) - low) * grid
        log_weights = half * (u - jnp.expm1(u))
        return log_weights - logsumexp(log_weights, axis=0), jnp.exp(u)
