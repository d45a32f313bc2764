"""The leapfrog of Hamiltonian dynamics with a diagonal metric, on positions (d,)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float

__all__ = ["DIVERGENT", "Place", "energy", "leapfrog", "momentum"]

DIVERGENT = 1000.0  # nats of energy error


class Place(NamedTuple):
    """A position (d,), its log density and the gradient (d,)."""

    position: Any
    logdensity: Any
    gradient: Any


def momentum(uniforms: Float[Array, " d"], inverse_mass: Float[Array, " d"]) -> Float[Array, " d"]:
    """Return a normal momentum.

    Args:
        uniforms: independent, in [0, 1).
        inverse_mass: diagonal of the inverse mass matrix.
    """
    dtype = uniforms.dtype
    least = jnp.nextafter(jnp.asarray(-1, dtype), jnp.asarray(0, dtype))
    normal = jnp.sqrt(jnp.asarray(2, dtype)) * jax.lax.erf_inv(jnp.maximum(2 * uniforms - 1, least))
    return normal / jnp.sqrt(inverse_mass)


def energy(
    logdensity: Float[Array, ""], momentum: Float[Array, " d"], inverse_mass: Float[Array, " d"]
) -> Float[Array, ""]:
    """Return kinetic energy minus log density, nats."""
    return 0.5 * jnp.sum(inverse_mass * momentum**2) - logdensity


def leapfrog(
    value_and_grad_fn: Callable,
    place: Place,
    momentum: Float[Array, " d"],
    step_size: Float[Array, ""],
    inverse_mass: Float[Array, " d"],
) -> tuple[Place, Float[Array, " d"]]:
    """Take one step.

    Args:
        value_and_grad_fn: position (d,) -> log density and its gradient.
        place: where it starts; its log density is not used.
        momentum: at the start.
        step_size: negative for a step back.
        inverse_mass: diagonal of the inverse mass matrix.
    """
    momentum = momentum + 0.5 * step_size * place.gradient
    position = place.position + step_size * inverse_mass * momentum
    logdensity, gradient = value_and_grad_fn(position)
    return Place(position, logdensity, gradient), momentum + 0.5 * step_size * gradient
