"""Mean functions: registered classes called on the inputs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from numpyro.distributions import constraints

from probinfer.core.types import Array, Float, field, pytree, strong_array

__all__ = ["Constant", "Linear", "Zero"]


@pytree
class Zero:
    """m(x) = 0."""

    def __call__(self, X: Float[Array, "N D"]) -> Float[Array, " N"]:
        """Evaluate at the rows of ``X``."""
        return jnp.zeros(X.shape[0], X.dtype)


@pytree
class Constant:
    """m(x) = c.

    Attributes:
        value: c, in units of y.
    """

    value: Any = field(default=0.0, constraint=constraints.real, units=(0, 1))

    def __post_init__(self):
        object.__setattr__(self, "value", strong_array(self.value))

    def __call__(self, X: Float[Array, "N D"]) -> Float[Array, " N"]:
        """Evaluate at the rows of ``X``."""
        return jnp.full(X.shape[0], 1, X.dtype) * self.value.astype(X.dtype)


@pytree
class Linear:
    """m(x) = a + bᵀx.

    Attributes:
        slope: b, shape ``(D,)`` or a scalar shared by all columns.
        intercept: a, in units of y.
    """

    slope: Any = field(default=0.0, constraint=constraints.real, units=(-1, 1))
    intercept: Any = field(default=0.0, constraint=constraints.real, units=(0, 1))

    def __post_init__(self):
        object.__setattr__(self, "slope", strong_array(self.slope))
        object.__setattr__(self, "intercept", strong_array(self.intercept))

    def __call__(self, X: Float[Array, "N D"]) -> Float[Array, " N"]:
        """Evaluate at the rows of ``X``.

        Raises:
            ValueError: ``slope`` has another length than the rows of ``X``.
        """
        slope = jnp.asarray(self.slope, X.dtype)
        if slope.ndim == 1 and slope.shape[0] not in (1, X.shape[1]):
            raise ValueError(
                f"Linear.slope has {slope.shape[0]} entries but X has {X.shape[1]} columns; give one slope per column"
            )
        return X @ jnp.broadcast_to(slope, (X.shape[1],)) + jnp.asarray(self.intercept, X.dtype)
