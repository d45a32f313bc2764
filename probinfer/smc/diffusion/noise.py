r"""The two usual noising processes, :math:`x_t = \alpha_t x_0 + \sigma_t\varepsilon`.

Both are one process in the coordinates :math:`y = x/\alpha`, where noise of standard deviation
:math:`\sigma_t/\alpha_t` is added. They differ in the times at which a trained score expects the noise levels.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import shortened
from probinfer.core.types import Array, Float, pytree, strong_array

__all__ = ["VarianceExploding", "VariancePreserving"]


@pytree
class VarianceExploding:
    r""":math:`x_t = x_0 + t\varepsilon`: time is the standard deviation of the noise.

    Args:
        noise_min: the smallest, at which sampling ends; small compared with the finest structure of the data.
        noise_max: the largest, at which sampling starts; large compared with the scale of the data.

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon and Poole (2021), section 3.4;
        Karras, Aittala, Aila and Laine (2022).
    """

    noise_min: Any
    noise_max: Any

    def __post_init__(self):
        """Check the levels.

        Raises:
            ValueError: they are not numbers with 0 < noise_min < noise_max.
        """
        _check_increasing(self, "noise_min", "noise_max")

    def noise_range(self) -> tuple[Array, Array]:
        """Return the smallest and the largest standard deviation of the noise, relative to the signal."""
        return self.noise_min, self.noise_max

    def time(self, level: Float[Array, ""]) -> Float[Array, ""]:
        """Return the time at which the ratio of noise to signal is ``level``."""
        return level

    def signal(self, time: Float[Array, ""]) -> Float[Array, ""]:
        r"""Return :math:`\alpha_t`."""
        return jnp.ones_like(time)


@pytree
class VariancePreserving:
    r""":math:`dx = -\tfrac12\beta_t x\,dt + \sqrt{\beta_t}\,dW`, t from 0 to 1, :math:`\beta_t` linear in t.

    :math:`\log\alpha_t = -\tfrac12(\beta_{\min}t+\tfrac12(\beta_{\max}-\beta_{\min})t^2)` and
    :math:`\sigma_t^2 = 1-\alpha_t^2`.

    Args:
        beta_min: :math:`\beta_t` at t = 0.
        beta_max: :math:`\beta_t` at t = 1.
        time_min: time at which sampling ends.

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon and Poole (2021), equation 33.
    """

    beta_min: Any = 0.1
    beta_max: Any = 20.0
    time_min: Any = 1e-3

    def __post_init__(self):
        """Check the numbers.

        Raises:
            ValueError: they are not numbers with 0 < beta_min < beta_max and 0 < time_min < 1.
        """
        _check_increasing(self, "beta_min", "beta_max")
        object.__setattr__(self, "time_min", _number("time_min", self.time_min))
        if not isinstance(self.time_min, jax.core.Tracer) and not 0 < float(self.time_min) < 1:
            raise ValueError(f"time_min must lie between 0 and 1, got {float(self.time_min)}")

    def noise_range(self) -> tuple[Array, Array]:
        """Return the smallest and the largest standard deviation of the noise, relative to the signal."""
        low = jnp.sqrt(jnp.expm1(self._integral(self.time_min)))
        return low, jnp.sqrt(jnp.expm1(self._integral(jnp.ones_like(self.time_min))))

    def time(self, level: Float[Array, ""]) -> Float[Array, ""]:
        """Return the time at which the ratio of noise to signal is ``level``."""
        integral, slope = jnp.log1p(level**2), self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * slope * integral))

    def signal(self, time: Float[Array, ""]) -> Float[Array, ""]:
        r"""Return :math:`\alpha_t`."""
        return jnp.exp(-0.5 * self._integral(time))

    def _integral(self, time: Array) -> Array:
        return self.beta_min * time + 0.5 * (self.beta_max - self.beta_min) * time**2


def _check_increasing(diffusion: Any, low_name: str, high_name: str) -> None:
    """Turn two fields into arrays and check that they are positive and increasing."""
    low, high = (_number(name, getattr(diffusion, name)) for name in (low_name, high_name))
    object.__setattr__(diffusion, low_name, low)
    object.__setattr__(diffusion, high_name, high)
    if any(isinstance(value, jax.core.Tracer) for value in (low, high)):
        return
    if not 0 < float(low) < float(high) < float("inf"):
        raise ValueError(
            f"{type(diffusion).__name__} needs 0 < {low_name} < {high_name}, finite, got {float(low)} and {float(high)}"
        )


def _number(name: str, value: Any) -> Any:
    if isinstance(value, (int, float, np.number, jax.Array)) and jnp.shape(value) == ():
        return strong_array(jnp.asarray(value, jnp.result_type(float)))
    raise ValueError(f"{name} must be a number, got {shortened(value)}")
