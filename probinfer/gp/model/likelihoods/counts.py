"""Counts 0, 1, 2, ... with the exponential link: their mean is exp(f)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc, gammaincc, gammaln, ndtr
from numpyro.distributions import constraints

from probinfer.core.types import Array, Float, PRNGKey, field, pytree
from probinfer.gp.model.likelihoods.base import Likelihood, refuse_noise
from probinfer.gp.model.likelihoods.moments import derivatives
from probinfer.gp.prediction import CountMixture
from probinfer.numerics.quadrature import expectation

__all__ = ["NegativeBinomial", "Poisson", "log_gamma_ratio"]


_NUM_POINTS = 161
_GRID_END = 7.0  # in u: sinh(7) = 550 widths


class _Counts(Likelihood):
    log_concave: ClassVar[bool] = True
    discrete: ClassVar[bool] = True
    cdf_given: Callable  # P(Y <= y | f) for integer y >= 0

    def cdf(
        self, y: Float[Array, "..."], mean: Float[Array, "..."], variance: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """P(Y <= y) for f ~ N(mean, variance) and integer y >= 0, elementwise.

        P(Y <= y | f) = P(A > f) for a variable A with density (y + 1) p(y + 1 | a), so P(Y <= y) = E Φ((A − mean)/√v).
        The integral is taken over the narrower of A and f, because the other factor is smooth on its scale.
        """
        y, mean, variance = jnp.broadcast_arrays(y, mean, variance)
        center = jnp.log(y + 1)
        width = jax.lax.rsqrt(-derivatives(self, y + 1, center)[2])
        # Integrate over A
        u = np.linspace(-_GRID_END, _GRID_END, _NUM_POINTS).reshape(_NUM_POINTS, *(1,) * mean.ndim)
        a = center + width * jnp.asarray(np.sinh(u), mean.dtype)
        log_weights = self.log_density(y + 1, a) + jnp.asarray(np.log(np.cosh(u)), mean.dtype)
        weights = jax.nn.softmax(log_weights, axis=0)
        over_a = jnp.sum(weights * ndtr((a - mean) * jax.lax.rsqrt(variance)), axis=0)
        # Integrate over f; its variance is limited so that the branch that is not used is finite
        limited = jnp.minimum(variance, (0.3 * width) ** 2)
        over_f = expectation(lambda f: self.cdf_given(y, f), mean, limited, order=20)
        return jnp.where(variance < limited * 1.0001, over_f, over_a)

    def check_outputs(self, y: Any) -> Any:
        """Check that the outputs are nonnegative integers.

        Raises:
            ValueError: there are other values.
        """
        values = np.asarray(y)
        invalid = values[(values < 0) | (values != np.floor(values))]
        if invalid.size:
            raise ValueError(
                f"{type(self).__name__} needs counts 0, 1, 2, ..., got {invalid.flat[0]:g} ({invalid.size} of "
                f"{values.size} entries); rates and measurements need another likelihood, such as Gaussian or StudentT"
            )
        return y

    def predictive(
        self, mean: Float[Array, "S M"], variance: Float[Array, "S M"], noise: Any = None
    ) -> CountMixture:
        """The distribution of the count at M new points, S hyperparameter draws of equal weight.

        Raises:
            ValueError: a noise variance was passed, which is for ``KnownNoise`` only.
        """
        refuse_noise(self, noise)
        return CountMixture(self, mean, variance)


@pytree
class Poisson(_Counts):
    """p(y | f) = exp(y f − exp(f)) / y!, counts whose mean and variance are exp(f)."""

    def log_density(self, y: Float[Array, "..."], f: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log p(y | f), elementwise."""
        return y * f - _exp(f) - gammaln(y + 1)

    def closed_expected_log_density(
        self, y: Float[Array, " N"], m: Float[Array, " N"], v: Float[Array, " N"]
    ) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
        """Expectations of the log density and of its first two derivatives, by E exp(f) = exp(m + v/2)."""
        rate = _exp(m + 0.5 * v)
        return y * m - rate - gammaln(y + 1), y - rate, -rate

    def curvature_location(self, y: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """The f at which the rate is y + 1: on the right of it log p falls exponentially."""
        return jnp.log(y + 1), jnp.full_like(y, 4.0)

    def output_moments(
        self, mean: Float[Array, "..."], variance: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Mean and variance of y for f ~ N(mean, variance)."""
        rate = jnp.exp(mean + 0.5 * variance)
        return rate, rate + rate**2 * jnp.expm1(variance)

    def cdf_given(self, y: Float[Array, "..."], f: Float[Array, "..."]) -> Float[Array, "..."]:
        """P(Y <= y | f) for integer y >= 0."""
        return gammaincc(y + 1, _exp(f))

    def sample(self, key: PRNGKey, f: Float[Array, "..."]) -> Float[Array, "..."]:
        """A count for each entry of f."""
        return jax.random.poisson(key, jnp.exp(f)).astype(f.dtype)


@pytree
class NegativeBinomial(_Counts):
    """Counts of mean μ = exp(f) and variance μ + dispersion μ²: Poisson counts whose rate is Gamma distributed.

    Attributes:
        dispersion: positive; the limit 0 is Poisson.
    """

    dispersion: Any = field(default=0.5, constraint=constraints.positive, units=(0, 0))

    def log_density(self, y: Float[Array, "..."], f: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log p(y | f), elementwise."""
        # With r = 1/dispersion, x = f − log r:  log Γ(y + r)/(Γ(r) r^y) − log y! + y f − (y + r) log(1 + e^x)
        r = 1 / self.dispersion
        softplus = jnp.logaddexp(f + jnp.log(self.dispersion), 0.0)
        return log_gamma_ratio(y, r) - gammaln(y + 1) + y * f - (y + r) * softplus

    def curvature_location(self, y: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """The f at which the rate is 1/dispersion, where log p passes from one slope to another."""
        return jnp.full_like(y, -jnp.log(self.dispersion)), jnp.full_like(y, 7.0)

    def output_moments(
        self, mean: Float[Array, "..."], variance: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Mean and variance of y for f ~ N(mean, variance)."""
        rate = jnp.exp(mean + 0.5 * variance)
        return rate, rate + rate**2 * (jnp.expm1(variance) + self.dispersion * jnp.exp(variance))

    def cdf_given(self, y: Float[Array, "..."], f: Float[Array, "..."]) -> Float[Array, "..."]:
        """P(Y <= y | f) for integer y >= 0."""
        x = f + jnp.log(self.dispersion)
        return betainc(1 / self.dispersion, y + 1, jax.nn.sigmoid(-x))

    def sample(self, key: PRNGKey, f: Float[Array, "..."]) -> Float[Array, "..."]:
        """A count for each entry of f."""
        rate_key, count_key = jax.random.split(key)
        gamma = jax.random.gamma(rate_key, jnp.broadcast_to(1 / self.dispersion, f.shape))
        return jax.random.poisson(count_key, gamma * self.dispersion * jnp.exp(f)).astype(f.dtype)


def log_gamma_ratio(a: Float[Array, "..."], r: Float[Array, "..."]) -> Float[Array, "..."]:
    """Log Γ(r + a) − log Γ(r) − a log r, for r > 0, a >= 0, without cancellation for large r.

    References:
        Abramowitz and Stegun (1964), 6.1.41 (Stirling's series, from r = 10).
    """
    small, large = jnp.minimum(r, 10.0), jnp.maximum(r, 10.0)
    direct = gammaln(small + a) - gammaln(small) - a * jnp.log(small)
    stirling = (large + a - 0.5) * jnp.log1p(a / large) - a + _stirling(large + a) - _stirling(large)
    return jnp.where(r < 10, direct, stirling)


def _stirling(x):
    """Log Γ(x) − (x − ½) log x + x − ½ log 2π, for x >= 10: the first omitted term is 3e-15 there."""
    w = 1 / x**2
    series = -691 / 360360 * w + 1 / 1188
    for coefficient in (-1 / 1680, 1 / 1260, -1 / 360, 1 / 12):
        series = series * w + coefficient
    return series / x


def _exp(f):
    """exp(f), continued by its tangent near the end of the exponent range.

    The density there is 0 to any precision. The tangent keeps its log concave and finite, so 0 times its slope is 0.
    """
    end = 0.8 * math.log(float(jnp.finfo(f.dtype).max))
    return jnp.exp(jnp.minimum(f, end)) * (1 + jnp.maximum(f - end, 0.0))
