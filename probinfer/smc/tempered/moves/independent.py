r"""Independent moves of many particles: proposals from one frozen Student-t, no gradient.

The proposal q is a Student-t with the mean of the pilot's weighted particles at the level, scaled by the factor of
their covariance. A proposal :math:`u' \sim q` is accepted with probability :math:`\min(1, w(u')/w(u))`,
:math:`w = \pi/q`: reversible for :math:`\pi`. A move consists of several such tries. The tails of q are heavier than
those of a log-concave density, for which w is bounded; where w is not, a particle may stay for long. One proposal
covers separate modes, so particles can move between them.

References:
    South, Pettitt and Drovandi (2019), "Sequential Monte Carlo samplers with independent Markov chain Monte Carlo
    proposals". Mengersen and Tweedie (1996), theorem 2.1 (bounded w).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.trees import map_or_vmap
from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.numerics import covariance_factor
from probinfer.smc.tempered.bridge import DEGREES_OF_FREEDOM
from probinfer.smc.tempered.moves.hamiltonian import MoveResult

__all__ = ["independent_moves"]


class _ParticleStates(NamedTuple):
    r"""Positions with log ratio and log importance weight :math:`\log\pi - \log q`."""

    position: Float[Array, "N d"]
    log_ratio: Float[Array, " N"]
    log_weight: Float[Array, " N"]


def independent_moves(
    key: PRNGKey,
    density: Callable,
    positions: Float[Array, "n d"],
    loc: Float[Array, " d"],
    factor: Float[Array, "..."],
    tries: Int[Array, ""],
    *,
    num_moves: int,
    mode: str,
) -> MoveResult:
    """Move every particle ``num_moves`` times and return all states.

    Args:
        key: random key.
        density: position (d,) -> (log density, log ratio).
        positions: of the particles.
        loc: location of the proposals.
        factor: of the covariance of the particles, see ``numerics.covariance_factor``; the scale of the proposals.
        tries: proposals in a move, 1 or more.
        num_moves: of each particle.
        mode: particles one after another ("map"), side by side ("vmap"), or whichever suits the device ("auto").

    Returns:
        The states; ``acceptance`` is that of a single proposal, the step size NaN.
    """
    num_particles, dimension = positions.shape
    start_z = covariance_factor.solve_rows(factor, positions - loc)

    def propose_and_accept(key, states, is_start):
        # Propose: z sqrt(df / chi2_df), with the chi-squared as a sum of squared normals
        normal = jax.random.normal(key, (num_particles, dimension + DEGREES_OF_FREEDOM + 1), positions.dtype)
        z, chi_normals, decision = normal[:, :dimension], normal[:, dimension:-1], normal[:, -1]
        z = jnp.where(is_start, start_z, z / jnp.sqrt(jnp.mean(chi_normals**2, axis=1, keepdims=True)))
        steps = jax.vmap(lambda z: covariance_factor.apply(factor, z))(z)
        proposed = jnp.where(is_start, positions, loc + steps)
        # Weigh: log q without its constant
        logdensity, log_ratio = map_or_vmap(density, mode, proposed)
        log_proposal = (
            -(DEGREES_OF_FREEDOM + dimension) / 2 * jnp.log1p(jnp.sum(z**2, axis=1) / DEGREES_OF_FREEDOM)
        )
        # Accept or reject: Phi of the last normal is uniform
        log_acceptance_ratio = logdensity - log_proposal - states.log_weight
        log_acceptance_ratio = jnp.where(jnp.isnan(log_acceptance_ratio), -jnp.inf, log_acceptance_ratio)
        accepted = (
            is_start | (jax.scipy.special.log_ndtr(decision) < log_acceptance_ratio) | (log_ratio == jnp.inf)
        )
        proposals = _ParticleStates(proposed, log_ratio, logdensity - log_proposal)
        new_states = jax.tree.map(
            lambda new, old: jnp.where(accepted.reshape(-1, *(1,) * (new.ndim - 1)), new, old),
            proposals,
            states,
        )
        return new_states, jnp.mean(jnp.exp(jnp.minimum(log_acceptance_ratio, 0)))

    def move(states, inputs):
        key, index = inputs
        # The first move proposes the starts and accepts them, so that the density is compiled once.
        num_tries = jnp.where(index == 0, 1, tries)

        def one_try(i, carry):
            states, total = carry
            states, rate = propose_and_accept(jax.random.fold_in(key, i), states, index == 0)
            return states, total + rate

        states, total = lax.fori_loop(0, num_tries, one_try, (states, jnp.zeros((), positions.dtype)))
        return states, (states.position, states.log_ratio, total / num_tries.astype(total.dtype), num_tries)

    unevaluated = _ParticleStates(
        positions,
        log_ratio=jnp.zeros(num_particles, positions.dtype),
        log_weight=jnp.zeros(num_particles, positions.dtype),
    )
    _, (all_positions, log_ratios, rates, counts) = lax.scan(
        move, unevaluated, (jax.random.split(key, num_moves + 1), jnp.arange(num_moves + 1))
    )
    num_densities = num_particles * jnp.sum(counts, dtype=jnp.int32)
    return MoveResult(
        positions=all_positions,
        log_ratios=log_ratios,
        acceptance=rates,
        step_size=jnp.full((), jnp.nan, positions.dtype),
        num_gradients=jnp.zeros_like(num_densities),
        num_densities=num_densities,
    )
