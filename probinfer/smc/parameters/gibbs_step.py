"""One iteration of particle Gibbs for parameters and path: each is drawn given the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from probinfer import resampling
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey
from probinfer.mcmc.hamiltonian import IntegratorState
from probinfer.mcmc.lanes.hmc import hmc_transition
from probinfer.smc.conditional.gibbs import gibbs_step
from probinfer.smc.models.feynman_kac import FeynmanKac, as_batched
from probinfer.smc.parameters.model import Parameters, log_joint, model_at

__all__ = ["NUM_LEAPFROGS", "check_densities", "parameter_gibbs_step"]

NUM_LEAPFROGS = 5


def parameter_gibbs_step(
    key: PRNGKey,
    target: Parameters,
    position: Float[Array, " d"],
    path: ArrayTree,
    step_size: Float[Array, ""],
    inverse_mass: Float[Array, " d"],
    num_particles: int,
) -> tuple[Array, ArrayTree, Array, Array]:
    """Draw the path given the parameters, then move the parameters given the path.

    Args:
        key: random key.
        target: parameters and models.
        position: of the parameters.
        path: leaves (T, ...).
        step_size: of the leapfrogs.
        inverse_mass: diagonal of the inverse mass matrix.
        num_particles: N, the path included.

    Returns:
        Position, path, acceptance probability of the trajectory, and the status of the conditional filter.
    """
    key_path, key_theta = jax.random.split(key)
    model, conditional = as_batched(model_at(target, position)), resampling.adaptive().conditional()
    path, sweep = gibbs_step(key_path, model, conditional, path, num_particles, "ancestor")
    value_and_grad_fn = jax.value_and_grad(lambda position: log_joint(target, position, path))
    place = IntegratorState(position, *value_and_grad_fn(position))
    uniforms = jax.random.uniform(key_theta, (2 + position.shape[0],), position.dtype)
    place, gain = hmc_transition(uniforms, place, value_and_grad_fn, step_size, inverse_mass, NUM_LEAPFROGS)
    return place.position, path, jnp.exp(jnp.minimum(gain, 0)), sweep.status


def check_densities(target: Parameters) -> None:
    """Refuse a target whose joint density of parameters and path is not known.

    Args:
        target: parameters and models.

    Raises:
        TypeError: its models are not of one particle.
        ValueError: no ``log_initial`` or no ``log_transition``.
    """
    model = jax.eval_shape(target.model_fn, jax.eval_shape(target.constrain, target.like))
    if not isinstance(model, FeynmanKac):
        raise TypeError(
            f"ParticleGibbs needs the densities of one particle: model_fn must return a smc.FeynmanKac, got "
            f"{type(model).__name__}; or take smc.PMMH()"
        )
    missing = {
        "log_transition of the model": model.log_transition,
        "log_initial of Parameters": target.log_initial,
    }
    lacking = [name for name, fn in missing.items() if fn is None]
    if lacking:
        raise ValueError(
            f"ParticleGibbs needs the density of a path, and there is no {' and no '.join(lacking)}; give it, or take "
            "smc.PMMH(), which only simulates"
        )
