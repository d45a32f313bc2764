r"""Finishing a cloud: a few trajectories of Hamiltonian Monte Carlo or NUTS a particle, or importance weights.

Both work in the coordinates of the cloud, which is nearly their stationary law, so neither needs a warm-up.

* ``"hmc"``: each particle takes 10 trajectories of about a quarter period. One step size serves all; between
  trajectories it follows the mean acceptance to 0.8. The widths that a collapsed cloud lost come back within a few.
* ``"nuts"``: the same with trajectories that end where they turn back, of 63 leapfrogs at most: dearer, and better
  where the density has more than one scale in the coordinates of the cloud (a funnel, a banana).
* ``"weights"``: each particle is replaced by a draw of a mixture of Student t laws around all particles, shrunk so that
  its covariance is theirs, with the Pareto-smoothed importance weight of the draw. Its Pareto shape says whether the
  weights may be trusted; above about 10 dimensions they may not.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.coin.cloud.table import masked_mean
from probinfer.core.types import Array, Bool, Float, Int, PRNGKey, Scalar
from probinfer.mcmc.hamiltonian import IntegratorState
from probinfer.mcmc.lanes.hmc import hmc_transition
from probinfer.mcmc.nuts_steps import sample_trajectory
from probinfer.numerics import importance

__all__ = ["NUM_TRAJECTORIES", "WAYS", "Polished", "with_hmc", "with_nuts", "with_weights"]

NUM_TRAJECTORIES = 10
_LEAPFROGS = 4
_MAX_DEPTH = 6
_ACCEPTANCE = 0.8
_DEGREES = 5.0


class Polished(NamedTuple):
    """Particles z ``(N, d)``, their log weights ``(N,)``, acceptance of the last trajectories, Pareto k-hat, gradients.

    What a way of polishing does not have is NaN.
    """

    z: Float[Array, "N d"]
    log_weights: Float[Array, " N"]
    acceptance: Scalar
    khat: Scalar
    num_gradients: Int[Array, ""] | int


def with_hmc(
    key: PRNGKey, value_and_grad_fn: Any, z: Float[Array, "N d"], keep: Bool[Array, " N"]
) -> Polished:
    """Move every particle that is kept by trajectories that leave the density invariant.

    Args:
        key: random key.
        value_and_grad_fn: of one particle (d,), in the coordinates of the cloud.
        z: the cloud.
        keep: the others stay, with weight zero.
    """
    size, dims = z.shape
    ones = jnp.ones(dims, z.dtype)

    def transition(key, places, step_size):
        uniforms = jax.random.uniform(key, (size, dims + 2), z.dtype)

        def one(uniforms, place):
            return hmc_transition(uniforms, place, value_and_grad_fn, step_size, ones, _LEAPFROGS)

        moved, gains = jax.vmap(one)(uniforms, places)
        return moved, jnp.exp(jnp.minimum(gains, 0)), jnp.int32(size * _LEAPFROGS)

    return _trajectories(key, transition, value_and_grad_fn, z, keep)


def with_nuts(
    key: PRNGKey, value_and_grad_fn: Any, z: Float[Array, "N d"], keep: Bool[Array, " N"]
) -> Polished:
    """Move every particle that is kept by trajectories that end where they turn back.

    Args:
        key: random key.
        value_and_grad_fn: of one particle (d,), in the coordinates of the cloud.
        z: the cloud.
        keep: the others stay, with weight zero.
    """
    size, dims = z.shape
    ones = jnp.ones(dims, z.dtype)

    def transition(key, places, step_size):
        def one(key, place, wanted):
            tree = sample_trajectory(key, place, value_and_grad_fn, step_size, ones, _MAX_DEPTH, wanted)
            return tree.chosen, tree.acceptance_sum / jnp.maximum(tree.num_leapfrogs, 1), tree.num_leapfrogs

        moved, accepted, counts = jax.vmap(one)(jax.random.split(key, size), places, keep)
        return moved, accepted, jnp.sum(counts)

    return _trajectories(key, transition, value_and_grad_fn, z, keep)


def _trajectories(key: PRNGKey, transition: Any, value_and_grad_fn: Any, z: Array, keep: Array) -> Polished:
    """Transitions of all particles, and a step size that follows their mean acceptance."""
    size, dims = z.shape
    values, gradients = jax.vmap(value_and_grad_fn)(z)

    def move(carry, key):
        places, step_size = carry
        moved, accepted, count = transition(key, places, step_size)
        moved = jax.tree.map(lambda a, b: jnp.where(_rows(keep, a), a, b), moved, places)
        rate = masked_mean(keep, accepted[:, None])[0]
        return (moved, step_size * jnp.exp(rate - _ACCEPTANCE)), (rate, count)

    # A quarter period of a standard normal is π/2 long; in d dimensions the acceptance asks for d^(-1/4).
    first = jnp.asarray(math.pi / 2 / _LEAPFROGS * min(1.0, 2 * dims**-0.25), z.dtype)
    carry = (IntegratorState(z, values, gradients), first)
    (places, _), (rates, counts) = jax.lax.scan(move, carry, jax.random.split(key, NUM_TRAJECTORIES))
    none = jnp.full((), jnp.nan, z.dtype)
    log_weights = jnp.where(keep, 0, -jnp.inf).astype(z.dtype)
    return Polished(places.position, log_weights, rates[-1], none, size + jnp.sum(counts, dtype=jnp.int32))


def _rows(keep: Array, like: Array) -> Array:
    return keep.reshape(keep.shape + (1,) * (like.ndim - 1))


def with_weights(
    key: PRNGKey, value_and_grad_fn: Any, z: Float[Array, "N d"], keep: Bool[Array, " N"]
) -> Polished:
    r"""Draw from :math:`q = \frac1N \sum_j t_5(m + a (z_j - m), h^2 C)`, :math:`a^2 + h^2 = 1`, and weigh by p/q.

    C is the covariance of the cloud and of each t law (five degrees of freedom), h the Scott bandwidth
    :math:`N^{-1/(d+4)}`. Memory O(N²).

    Args:
        key: random key.
        value_and_grad_fn: of one particle (d,), in the coordinates of the cloud.
        z: the cloud.
        keep: particles around which is drawn.

    References:
        West (1993), "Approximating posterior distributions by mixtures", for the shrunk mixture; Vehtari et al. (2024).
    """
    size, dims = z.shape
    mean = masked_mean(keep, z)
    centred = jnp.where(keep[:, None], z - mean, 0)
    count = jnp.maximum(jnp.sum(keep.astype(z.dtype)), 1)
    shrinkage = min(1.0, dims / size)
    covariance = centred.T @ centred / count
    covariance = (1 - shrinkage) * covariance + shrinkage * jnp.diag(jnp.diag(covariance))
    chol = jnp.linalg.cholesky(covariance)
    h = size ** (-1 / (dims + 4))
    white = math.sqrt(1 - h * h) * jax.scipy.linalg.solve_triangular(chol, centred.T, lower=True).T
    # Stratified: every particle is a centre as often as any other, up to one.
    order = jnp.argsort(~keep, stable=True)
    chosen = order[jnp.floor(jnp.arange(size) * (count / size)).astype(jnp.int32)]
    scale = h * math.sqrt((_DEGREES - 2) / _DEGREES)
    draws = white[chosen] + scale * _student(key, z)
    squares = jnp.sum((draws[:, None] - white[None]) ** 2, axis=-1) / scale**2
    log_q = -0.5 * (_DEGREES + dims) * jnp.log1p(squares / _DEGREES)
    log_q = jax.nn.logsumexp(jnp.where(keep, log_q, -jnp.inf), axis=1)
    moved = mean + draws @ chol.T
    values, _ = jax.vmap(value_and_grad_fn)(moved)
    ratios = jnp.where(jnp.isnan(values), -jnp.inf, values) - log_q
    smoothed = importance.psis(ratios)
    none = jnp.full((), jnp.nan, z.dtype)
    return Polished(moved, smoothed.log_weights, none, smoothed.khat, size)


def _student(key: PRNGKey, like: Array) -> Array:
    """Rows of a spherical Student t law."""
    key_normal, key_gamma = jax.random.split(key)
    normal = jax.random.normal(key_normal, like.shape, like.dtype)
    halves = jax.random.gamma(key_gamma, _DEGREES / 2, like.shape[:1], like.dtype)
    return normal * jnp.sqrt(_DEGREES / (2 * halves))[:, None]


WAYS = {"hmc": with_hmc, "nuts": with_nuts, "weights": with_weights}
