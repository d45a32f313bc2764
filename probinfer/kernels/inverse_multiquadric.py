"""The inverse multiquadric kernel, the standard choice for kernel Stein discrepancies."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from numpyro.distributions import constraints

from probinfer.core.types import Array, field, pytree
from probinfer.kernels.base import cast, parameter
from probinfer.kernels.stationary import Stationary

__all__ = ["InverseMultiquadric"]


@pytree
class InverseMultiquadric(Stationary):
    """``variance · (1 + r²)^(−exponent)``, with tails so heavy that distant points still interact.

    With an exponent in (0, 1) the kernel Stein discrepancy detects whether draws converge to their target; with a
    squared exponential it does not in three or more dimensions. Equal to ``RationalQuadratic`` with
    ``alpha = exponent`` and ``2 alpha lengthscale²`` in place of ``lengthscale²``.

    Attributes:
        variance: scalar, k(x, x).
        lengthscale: scalar, or ``(D,)`` with one for each column, in units of that column: the ``c`` of
            ``(c² + |x − z|²)^(−exponent)``.
        exponent: scalar, ``−β``.

    References:
        Gorham and Mackey (2017), Measuring sample quality with kernels, theorem 8.
    """

    variance: Any = field(default=1.0, constraint=constraints.positive, units=(0, 2))
    lengthscale: Any = field(default=1.0, constraint=constraints.positive, units=(1, 0))
    exponent: Any = field(default=0.5, constraint=constraints.positive, units=(0, 0))

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "exponent", parameter("exponent", self.exponent))

    def profile(self, squared: Array) -> Array:
        """``variance · exp(−exponent log1p(r²))``."""
        return cast(self.variance, squared) * jnp.exp(-cast(self.exponent, squared) * jnp.log1p(squared))
