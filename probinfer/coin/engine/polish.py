r"""Polishing a cloud: a few trajectories of Hamiltonian Monte Carlo or NUTS per particle, or importance weights.

All work in the coordinates of the cloud, which is nearly distributed like the density, so none needs a warm-up.

* ``"hmc"``: each particle takes 10 trajectories of about a quarter period, with a common step size that is adapted
  after each trajectory to a mean acceptance of 0.8. A few trajectories restore the width of a collapsed cloud.
* ``"nuts"``: the same with trajectories that end where they turn back, of at most 63 leapfrog steps: more expensive,
  and better if the density has several scales in the coordinates of the cloud (a funnel, a banana).
* ``"weights"``: each particle is replaced by a draw from a mixture of Student t distributions around all particles,
  shrunk so that its covariance is theirs, with the Pareto-smoothed importance weight of the draw. The Pareto shape
  tells whether the weights are reliable; above about 10 dimensions they are not.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.coin.cloud.particles import masked_mean
from probinfer.core.types import Array, Bool, Float, Int, PRNGKey, Scalar
from probinfer.mcmc.hamiltonian import IntegratorState
from probinfer.mcmc.lanes.hmc import hmc_transition
from probinfer.mcmc.nuts_steps import sample_trajectory
from probinfer.numerics import importance

__all__ = ["NUM_TRAJECTORIES", "POLISH_FNS", "Polished", "with_hmc", "with_nuts", "with_weights"]

NUM_TRAJECTORIES = 10
_NUM_LEAPFROGS = 4
_MAX_DEPTH = 6
_TARGET_ACCEPTANCE = 0.8
_DEGREES = 5.0  # of freedom


class Polished(NamedTuple):
    """A polished cloud.

    Attributes:
        z: the particles in the coordinates of the cloud.
        log_weights: minus infinity for particles outside the mask.
        acceptance: mean acceptance rate of the last trajectories; NaN for weights.
        khat: Pareto shape of the weights; NaN for trajectories.
        num_gradients: number of gradients of the log density.
    """

    z: Float[Array, "N d"]
    log_weights: Float[Array, " N"]
    acceptance: Scalar
    khat: Scalar
    num_gradients: Int[Array, ""] | int


def with_hmc(
    key: PRNGKey, value_and_grad_fn: Any, z: Float[Array, "N d"], mask: Bool[Array, " N"]
) -> Polished:
    """Move the particles by Hamiltonian Monte Carlo transitions, which leave the density invariant.

    Args:
        key: random key.
        value_and_grad_fn: value and gradient of the log density of one particle (d,) in the coordinates of the cloud.
        z: the cloud.
        mask: which particles move; the others get weight zero.
    """
    num_particles, num_dims = z.shape
    ones = jnp.ones(num_dims, z.dtype)

    def transition(key, states, step_size):
        uniforms = jax.random.uniform(key, (num_particles, num_dims + 2), z.dtype)

        def transition_one(uniforms, state):
            return hmc_transition(uniforms, state, value_and_grad_fn, step_size, ones, _NUM_LEAPFROGS)

        proposed, log_ratios = jax.vmap(transition_one)(uniforms, states)
        acceptance = jnp.exp(jnp.minimum(log_ratios, 0))
        return proposed, acceptance, jnp.int32(num_particles * _NUM_LEAPFROGS)

    return _run_transitions(key, transition, value_and_grad_fn, z, mask)


def with_nuts(
    key: PRNGKey, value_and_grad_fn: Any, z: Float[Array, "N d"], mask: Bool[Array, " N"]
) -> Polished:
    """Move the particles by No-U-Turn transitions, which leave the density invariant.

    Args:
        key: random key.
        value_and_grad_fn: value and gradient of the log density of one particle (d,) in the coordinates of the cloud.
        z: the cloud.
        mask: which particles move; the others get weight zero.
    """
    num_particles, num_dims = z.shape
    ones = jnp.ones(num_dims, z.dtype)

    def transition(key, states, step_size):
        def transition_one(key, place, wanted):
            tree = sample_trajectory(key, place, value_and_grad_fn, step_size, ones, _MAX_DEPTH, wanted)
            return tree.chosen, tree.acceptance_sum / jnp.maximum(tree.num_leapfrogs, 1), tree.num_leapfrogs

        keys = jax.random.split(key, num_particles)
        proposed, acceptance, counts = jax.vmap(transition_one)(keys, states, mask)
        return proposed, acceptance, jnp.sum(counts)

    return _run_transitions(key, transition, value_and_grad_fn, z, mask)


def _run_transitions(
    key: PRNGKey, transition: Any, value_and_grad_fn: Any, z: Array, mask: Array
) -> Polished:
    """Run transitions of all particles, and adapt the step size to their mean acceptance."""
    num_particles, num_dims = z.shape
    values, gradients = jax.vmap(value_and_grad_fn)(z)

    def step(carry, key):
        states, step_size = carry
        proposed, acceptance, count = transition(key, states, step_size)
        states = jax.tree.map(lambda new, old: jnp.where(_expand_mask(mask, new), new, old), proposed, states)
        rate = masked_mean(mask, acceptance[:, None])[0]
        return (states, step_size * jnp.exp(rate - _TARGET_ACCEPTANCE)), (rate, count)

    # A quarter period of a standard normal has length π/2; a constant acceptance needs d^(-1/4) in d dimensions.
    step_size = jnp.asarray(math.pi / 2 / _NUM_LEAPFROGS * min(1.0, 2 * num_dims**-0.25), z.dtype)
    carry = (IntegratorState(z, values, gradients), step_size)
    (states, _), (rates, counts) = jax.lax.scan(step, carry, jax.random.split(key, NUM_TRAJECTORIES))
    return Polished(
        z=states.position,
        log_weights=jnp.where(mask, 0, -jnp.inf).astype(z.dtype),
        acceptance=rates[-1],
        khat=jnp.full((), jnp.nan, z.dtype),
        num_gradients=num_particles + jnp.sum(counts, dtype=jnp.int32),
    )


def _expand_mask(mask: Array, leaf: Array) -> Array:
    """Return the mask (N,) with trailing axes, to broadcast against a leaf (N, ...)."""
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - 1))


def with_weights(
    key: PRNGKey, value_and_grad_fn: Any, z: Float[Array, "N d"], mask: Bool[Array, " N"]
) -> Polished:
    r"""Draw from :math:`q = \frac1N \sum_j t_5(m + a (z_j - m), h^2 C)`, :math:`a^2 + h^2 = 1`, and weigh by p/q.

    C is the covariance of the cloud and of each t distribution (with five degrees of freedom), h the Scott bandwidth
    :math:`N^{-1/(d+4)}`. Memory O(N²).

    Args:
        key: random key.
        value_and_grad_fn: value and gradient of the log density of one particle (d,) in the coordinates of the cloud.
        z: the cloud.
        mask: which particles are centers of the mixture.

    References:
        West (1993), "Approximating posterior distributions by mixtures", for the shrunk mixture; Vehtari et al. (2024).
    """
    num_particles, num_dims = z.shape

    # Shrunk covariance and whitened centers of the mixture
    mean = masked_mean(mask, z)
    centered = jnp.where(mask[:, None], z - mean, 0)
    count = jnp.maximum(jnp.sum(mask.astype(z.dtype)), 1)
    shrinkage = min(1.0, num_dims / num_particles)
    covariance = centered.T @ centered / count
    covariance = (1 - shrinkage) * covariance + shrinkage * jnp.diag(jnp.diag(covariance))
    chol = jnp.linalg.cholesky(covariance)
    h = num_particles ** (-1 / (num_dims + 4))
    centers = math.sqrt(1 - h * h) * jax.scipy.linalg.solve_triangular(chol, centered.T, lower=True).T

    # Draw, stratified: the numbers of draws around the particles differ at most by one
    order = jnp.argsort(~mask, stable=True)
    components = order[jnp.floor(jnp.arange(num_particles) * (count / num_particles)).astype(jnp.int32)]
    scale = h * math.sqrt((_DEGREES - 2) / _DEGREES)
    whitened = centers[components] + scale * _draw_student(key, z)

    # Weigh
    squares = jnp.sum((whitened[:, None] - centers[None]) ** 2, axis=-1) / scale**2
    log_q = -0.5 * (_DEGREES + num_dims) * jnp.log1p(squares / _DEGREES)
    log_q = jax.nn.logsumexp(jnp.where(mask, log_q, -jnp.inf), axis=1)
    draws = mean + whitened @ chol.T
    values, _ = jax.vmap(value_and_grad_fn)(draws)
    log_ratios = jnp.where(jnp.isnan(values), -jnp.inf, values) - log_q
    smoothed = importance.psis(log_ratios)
    return Polished(
        z=draws,
        log_weights=smoothed.log_weights,
        acceptance=jnp.full((), jnp.nan, z.dtype),
        khat=smoothed.khat,
        num_gradients=num_particles,
    )


def _draw_student(key: PRNGKey, template: Array) -> Array:
    """Draw rows from a spherical Student t distribution, in the shape and dtype of ``template``."""
    key_normal, key_gamma = jax.random.split(key)
    normal = jax.random.normal(key_normal, template.shape, template.dtype)
    halves = jax.random.gamma(key_gamma, _DEGREES / 2, template.shape[:1], template.dtype)
    return normal * jnp.sqrt(_DEGREES / (2 * halves))[:, None]


POLISH_FNS = {"hmc": with_hmc, "nuts": with_nuts, "weights": with_weights}
