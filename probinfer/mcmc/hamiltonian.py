"""The leapfrog integrator of Hamiltonian dynamics with a diagonal metric, on positions (d,)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float

__all__ = ["DIVERGENCE_THRESHOLD", "IntegratorState", "energy", "leapfrog", "momentum_from_uniforms"]

DIVERGENCE_THRESHOLD = 1000.0  # nats of energy error


class IntegratorState(NamedTuple):
    """A point of a trajectory.

    Attributes:
        position: x.
        logdensity: log p(x).
        gradient: of log p at x.
    """

    position: Float[Array, " d"]
    logdensity: Float[Array, ""]
    gradient: Float[Array, " d"]


def momentum_from_uniforms(
    uniforms: Float[Array, " d"], inverse_mass: Float[Array, " d"]
) -> Float[Array, " d"]:
    """Return a normal momentum, by the quantile function.

    Args:
        uniforms: independent, in [0, 1).
        inverse_mass: diagonal of the inverse mass matrix.
    """
    dtype = uniforms.dtype
    # A uniform number may be 0, and erf_inv(-1) is minus infinity: stay one floating-point number above -1.
    lower = jnp.nextafter(jnp.asarray(-1, dtype), jnp.asarray(0, dtype))
    normal = jnp.sqrt(jnp.asarray(2, dtype)) * jax.lax.erf_inv(jnp.maximum(2 * uniforms - 1, lower))
    return normal / jnp.sqrt(inverse_mass)


def energy(
    logdensity: Float[Array, ""], momentum: Float[Array, " d"], inverse_mass: Float[Array, " d"]
) -> Float[Array, ""]:
    """Return kinetic energy minus log density, in nats."""
    return 0.5 * jnp.sum(inverse_mass * momentum**2) - logdensity


def leapfrog(
    value_and_grad_fn: Callable,
    state: IntegratorState,
    momentum: Float[Array, " d"],
    step_size: Float[Array, ""],
    inverse_mass: Float[Array, " d"],
) -> tuple[IntegratorState, Float[Array, " d"]]:
    """Take one leapfrog step.

    Args:
        value_and_grad_fn: position (d,) -> log density and its gradient.
        state: the start of the step; its log density is not used.
        momentum: at the start.
        step_size: negative for a step back in time.
        inverse_mass: diagonal of the inverse mass matrix.

    Returns:
        State and momentum at the end of the step.
    """
    momentum = momentum + 0.5 * step_size * state.gradient
    position = state.position + step_size * inverse_mass * momentum
    logdensity, gradient = value_and_grad_fn(position)
    return IntegratorState(position, logdensity, gradient), momentum + 0.5 * step_size * gradient
