"""Likelihoods p(y | f), factorising over the data.

A likelihood is a registered class whose leaves are its parameters. Two methods serve every likelihood: ``log_prob``,
the log of the integral of p(y | f) against a Gaussian marginal of f, and ``predictive``, the distribution of a new y.
The Gaussian ones also give their ``noise_variance``, which makes exact inference possible.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from numpyro.distributions import constraints

from probinfer.gp.predictive import NormalMixture
from probinfer.types import Array, Float, field, pytree, strong_array

__all__ = ["Gaussian", "KnownNoise", "gaussian_log_prob"]


def gaussian_log_prob(
    y: Float[Array, "..."], mean: Float[Array, "..."], variance: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Log N(y; mean, variance), elementwise."""
    return -0.5 * (jnp.log(2 * jnp.pi * variance) + (y - mean) ** 2 / variance)


@pytree
class Gaussian:
    """p(y | f) = N(y; f, variance), one noise variance for all points.

    Attributes:
        variance: the noise variance, in squared units of y.

    Raises:
        ValueError: the variance is not a scalar; for one value a point use ``KnownNoise``.
    """

    variance: Any = field(default=1.0, constraint=constraints.positive)
    outputs_have_unit: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "variance", strong_array(self.variance))
        shape = getattr(self.variance, "shape", ())
        if isinstance(shape, tuple) and len(shape) > 0 and not hasattr(self.variance, "log_prob"):
            raise ValueError(
                f"Gaussian.variance must be a scalar, got shape {shape}; known noise per point is "
                "gp.likelihoods.KnownNoise(noise)"
            )

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
            ValueError: a noise variance was given, which this likelihood has of its own.
        """
        if noise is not None:
            raise ValueError(
                "noise_variance is for KnownNoise only; the Gaussian likelihood has its own variance"
            )
        return NormalMixture(mean, variance + self.variance[:, None])

    def rescale(self, factor: Any) -> Gaussian:
        """The same likelihood for outputs in other units: the parameter is stated in those units already."""
        return self


@pytree
class KnownNoise:
    """p(y_i | f_i) = N(y_i; f_i, noise_i), with a measured noise variance for each point.

    The noise is data, not a hyperparameter: ``gp.default_prior`` fixes it. Add ``kernels.White`` for noise beyond it.

    Attributes:
        noise: the noise variances ``(N,)``, in squared units of y.

    Raises:
        ValueError: ``noise`` is not a vector, or has a negative entry.
    """

    noise: Any = field(constraint=constraints.nonnegative)
    outputs_have_unit: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "noise", strong_array(self.noise))
        shape = getattr(self.noise, "shape", (1,))
        if isinstance(shape, tuple) and len(shape) == 0 and not hasattr(self.noise, "log_prob"):
            raise ValueError("KnownNoise.noise must be a vector with one variance a data point, got a scalar")

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
            ValueError: no noise variance was given.
        """
        if noise is None:
            raise ValueError(
                "with KnownNoise the noise at new points is not known to the model: pass noise_variance=(M,) or a "
                "scalar, or use predict for the noise-free function"
            )
        return NormalMixture(mean, variance + jnp.asarray(noise, mean.dtype))

    def rescale(self, factor: Any) -> KnownNoise:
        """The same noise for outputs divided by ``factor``."""
        return KnownNoise(self.noise / factor**2)
