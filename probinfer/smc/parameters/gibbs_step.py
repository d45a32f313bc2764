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
        Position, path, acceptance probability of the trajectory, and status of the conditional filter.
    """
    key_path, key_params = jax.random.split(key)
    # Draw the path given the parameters
    model, conditional = as_batched(model_at(target, position)), resampling.adaptive().conditional()
    path, sweep = gibbs_step(key_path, model, conditional, path, num_particles, "ancestor")
    # Move the parameters given the path
    value_and_grad_fn = jax.value_and_grad(lambda position: log_joint(target, position, path))
    state = IntegratorState(position, *value_and_grad_fn(position))
    uniforms = jax.random.uniform(key_params, (2 + position.shape[0],), position.dtype)
    state, log_acceptance_ratio = hmc_transition(
        uniforms, state, value_and_grad_fn, step_size, inverse_mass, NUM_LEAPFROGS
    )
    return state.position, path, jnp.exp(jnp.minimum(log_acceptance_ratio, 0)), sweep.status


def check_densities(target: Parameters) -> None:
    """Check that the joint density of parameters and path is known.

    Args:
        target: parameters and models.

    Raises:
        TypeError: the models are not those of one particle.
        ValueError: no ``log_initial`` or no ``log_transition``.
    """
    model = jax.eval_shape(target.model_fn, jax.eval_shape(target.constrain, target.template))
    if not isinstance(model, FeynmanKac):
        raise TypeError(
            f"ParticleGibbs needs the densities of one particle: model_fn must return a smc.FeynmanKac, got "
            f"{type(model).__name__}; or use smc.PMMH()"
        )
    densities = {
        "log_transition of the model": model.log_transition,
        "log_initial of Parameters": target.log_initial,
    }
    missing = [name for name, fn in densities.items() if fn is None]
    if missing:
        raise ValueError(
            f"ParticleGibbs needs the density of a path, and there is no {' and no '.join(missing)}; give it, or use "
            "smc.PMMH(), which only simulates"
        )
