"""Gaussian noise, of unknown or of known variance.

The Gaussian likelihoods also have a ``noise_variance``, which makes exact inference possible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from numpyro.distributions import constraints

from probinfer.core.types import Array, Float, field, pytree, strong_array
from probinfer.gp.model.likelihoods.base import Likelihood, refuse_noise
from probinfer.gp.prediction import NormalMixture

__all__ = ["Gaussian", "KnownNoise", "gaussian_log_prob"]


def gaussian_log_prob(
    y: Float[Array, "..."], mean: Float[Array, "..."], variance: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Log N(y; mean, variance), elementwise."""
    return -0.5 * (jnp.log(2 * jnp.pi * variance) + (y - mean) ** 2 / variance)


class _Closed(Likelihood):
    """Closed forms for log p(y | f) = const − ½ (y − f)²/s², with f = m + δ, δ ~ N(0, v)."""

    log_concave: ClassVar[bool] = True
    outputs_have_unit: ClassVar[bool] = True
    _noise: Callable  # the variances of the noise

    def log_density(self, y: Float[Array, "..."], f: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log N(y; f, noise variance), elementwise."""
        return gaussian_log_prob(y, f, self._noise())

    def closed_expected_log_density(
        self, y: Float[Array, " N"], m: Float[Array, " N"], v: Float[Array, " N"]
    ) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
        """Expectations of the log density and of its first two derivatives."""
        noise = jnp.broadcast_to(self._noise(), m.shape)
        return gaussian_log_prob(y, m, noise) - 0.5 * v / noise, (y - m) / noise, -1 / noise

    def closed_log_ratio(
        self,
        y: Float[Array, " N"],
        m: Float[Array, " N"],
        v: Float[Array, " N"],
        lam1: Float[Array, " N"],
        lam2: Float[Array, " N"],
        power: float,
    ) -> Float[Array, " N"]:
        """Log E[(p/t)^power]: log p/t is at m plus slope δ − ½ curvature δ²."""
        noise = self._noise()
        slope, curvature = (y - m) / noise - (lam1 - lam2 * m), 1 / noise - lam2
        at_mean = gaussian_log_prob(y, m, noise) - (lam1 - 0.5 * lam2 * m) * m
        c = 1 + power * curvature * v
        return power * at_mean - 0.5 * jnp.log(c) + 0.5 * power**2 * slope**2 * v / c

    def closed_tilted_moments(
        self,
        y: Float[Array, " N"],
        m: Float[Array, " N"],
        v: Float[Array, " N"],
        lam1: Float[Array, " N"],
        lam2: Float[Array, " N"],
        power: float,
    ) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
        """Mean and variance of N(f; m, v) (p/t)^power, a Gaussian."""
        noise = self._noise()
        slope, curvature = (y - m) / noise - (lam1 - lam2 * m), 1 / noise - lam2
        c = 1 + power * curvature * v
        return m + power * slope * v / c, v / c


@pytree
class Gaussian(_Closed):
    """p(y | f) = N(y; f, variance), one noise variance for all points.

    Attributes:
        variance: the noise variance, in squared units of y.

    Raises:
        ValueError: the variance is not a scalar; for one value per point use ``KnownNoise``.
    """

    variance: Any = field(default=1.0, constraint=constraints.positive, units=(0, 2))

    def __post_init__(self):
        object.__setattr__(self, "variance", strong_array(self.variance))
        shape = getattr(self.variance, "shape", ())
        if isinstance(shape, tuple) and len(shape) > 0 and not hasattr(self.variance, "log_prob"):
            raise ValueError(
                f"Gaussian.variance must be a scalar, got shape {shape}; known noise per point is "
                "gp.likelihoods.KnownNoise(noise)"
            )

    def _noise(self):
        return self.variance

    def noise_variance(self, num: int) -> Float[Array, " N"]:
        """The noise variance of each of ``num`` training points."""
        return jnp.broadcast_to(self.variance, (num,))

    def log_prob(
        self, y: Float[Array, "..."], mean: Float[Array, "..."], variance: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Log ∫ p(y | f) N(f; mean, variance) df, elementwise."""
        return gaussian_log_prob(y, mean, variance + self.variance)

    def predictive(
        self, mean: Float[Array, "S M"], variance: Float[Array, "S M"], noise: Any = None
    ) -> NormalMixture:
        """The distribution of y at M new points, S hyperparameter draws of equal weight.

        Raises:
            ValueError: a noise variance was passed, although this likelihood has its own.
        """
        refuse_noise(self, noise)
        return NormalMixture(mean, variance + self.variance[:, None])


@pytree
class KnownNoise(_Closed):
    """p(y_i | f_i) = N(y_i; f_i, noise_i), with a measured noise variance for each point.

    The noise is data, not a hyperparameter: ``gp.default_prior`` fixes it. Add ``kernels.White`` for noise beyond it.

    Attributes:
        noise: the noise variances ``(N,)``, in squared units of y.

    Raises:
        ValueError: ``noise`` is not a vector, or has a negative entry.
    """

    noise: Any = field(constraint=constraints.nonnegative, units=(0, 2))

    def __post_init__(self):
        object.__setattr__(self, "noise", strong_array(self.noise))
        shape = getattr(self.noise, "shape", (1,))
        if isinstance(shape, tuple) and len(shape) == 0 and not hasattr(self.noise, "log_prob"):
            raise ValueError(
                "KnownNoise.noise must be a vector with one variance per data point, got a scalar"
            )

    def _noise(self):
        return self.noise

    def noise_variance(self, num: int) -> Float[Array, " N"]:
        """The noise variance of each of ``num`` training points.

        Raises:
            ValueError: there are not ``num`` of them.
        """
        if self.noise.shape != (num,):
            raise ValueError(
                f"KnownNoise.noise has shape {self.noise.shape}, the data have {num} rows; give one each"
            )
        return self.noise

    def log_prob(
        self, y: Float[Array, "..."], mean: Float[Array, "..."], variance: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Log ∫ p(y | f) N(f; mean, variance) df at the training points."""
        return gaussian_log_prob(y, mean, variance + self.noise)

    def predictive(
        self, mean: Float[Array, "S M"], variance: Float[Array, "S M"], noise: Any = None
    ) -> NormalMixture:
        """The distribution of y at M new points whose noise variances are ``noise``, shape ``(M,)`` or a scalar.

        Raises:
            ValueError: no noise variance was passed.
        """
        if noise is None:
            raise ValueError(
                "with KnownNoise the model does not know the noise at new points: pass noise_variance=(M,) or a "
                "scalar, or use predict for the noise-free function"
            )
        return NormalMixture(mean, variance + jnp.asarray(noise, mean.dtype))
