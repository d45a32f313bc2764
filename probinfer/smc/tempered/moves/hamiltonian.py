r"""Hamiltonian moves of many particles that share metric, step size and number of leapfrogs.

The momentum is normal with the metric :math:`(R R^\top)^{-1}`, R the factor of the particles' covariance, so that a
normal target has period :math:`2\pi` in every direction. The length of a trajectory is a quarter period times a
uniform number between 1/2 and 3/2, drawn once a move for all particles, so that no particle waits for another. Given
the lengths, which do not depend on the particles, every move is reversible for its target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.trees import map_or_vmap, select
from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.mcmc.hamiltonian import momentum_from_uniforms
from probinfer.numerics import covariance_factor

__all__ = [
    "MAX_TRAJECTORY_LENGTH",
    "MoveResult",
    "TemperedIntegratorState",
    "adapt_step_size",
    "hamiltonian_transition",
    "hmc_moves",
]

MAX_TRAJECTORY_LENGTH = 0.75 * float(jnp.pi)  # quarter period times 3/2
_MAX_LEAPFROGS = 100
_TARGET_ACCEPTANCE = 0.8
# Near 0.8 and for normal targets, acceptance falls by about 0.4 for a step e times longer: a bit less than the inverse.
_ADAPTATION_GAIN = 1.5


class TemperedIntegratorState(NamedTuple):
    r"""Position of a trajectory and the density there.

    Attributes:
        position: u.
        logdensity: :math:`\log\pi_t(u)`.
        gradient: of the log density.
        log_ratio: :math:`\Delta(u)`, which is computed with the density.
    """

    position: Float[Array, " d"]
    logdensity: Float[Array, ""]
    gradient: Float[Array, " d"]
    log_ratio: Float[Array, ""]


class MoveResult(NamedTuple):
    """All states of P - 1 moves of N particles, and what they cost.

    Attributes:
        positions: row 0 holds the starts.
        log_ratios: at these positions.
        acceptance: mean over particles of each move; row 0 is no move.
        step_size: after the last move.
        num_gradients: evaluations of the density with its gradient, of all particles together.
        num_densities: evaluations of the density alone, of all particles together.
    """

    positions: Float[Array, "P N d"]
    log_ratios: Float[Array, "P N"]
    acceptance: Float[Array, " P"]
    step_size: Float[Array, ""]
    num_gradients: Int[Array, ""]
    num_densities: Int[Array, ""]


def hmc_moves(
    key: PRNGKey,
    evaluate: Callable,
    positions: Float[Array, "n d"],
    factor: Float[Array, "..."],
    step_size: Float[Array, ""],
    learning: Float[Array, ""],
    *,
    num_moves: int,
    mode: str,
) -> MoveResult:
    """Move every particle ``num_moves`` times and return all states.

    Args:
        key: random key.
        evaluate: position (d,) -> ((log density, log ratio), gradient (d,)).
        positions: of the particles.
        factor: of their covariance, see ``numerics.covariance_factor``.
        step_size: in coordinates of unit covariance.
        learning: 1: adapt the step size towards an acceptance rate of 0.8 after every move; 0: keep it.
        num_moves: of each particle.
        mode: particles one after another ("map"), side by side ("vmap"), or whichever suits the device ("auto").
    """
    num_particles, dimension = positions.shape
    unevaluated = TemperedIntegratorState(
        positions,
        logdensity=jnp.zeros(num_particles, positions.dtype),
        gradient=jnp.zeros_like(positions),
        log_ratio=jnp.zeros(num_particles, positions.dtype),
    )

    def move(carry, inputs):
        states, step_size = carry
        uniforms, index = inputs
        # The first move has length zero and is accepted, so that the density is compiled once, for starts and moves.
        is_start = index == 0
        length = MAX_TRAJECTORY_LENGTH * (1 + 2 * uniforms[0, -1]) / 3
        num_leapfrogs = jnp.clip(jnp.ceil(length / step_size), 1, _MAX_LEAPFROGS)
        num_leapfrogs = jnp.where(is_start, 1, num_leapfrogs).astype(jnp.int32)
        leapfrog_size = jnp.where(is_start, 0, jnp.minimum(length / num_leapfrogs, step_size))
        leapfrog_size = leapfrog_size.astype(positions.dtype)

        def move_one(state, uniforms):
            initial_momentum = momentum_from_uniforms(
                uniforms[:dimension], jnp.ones(dimension, uniforms.dtype)
            )
            return hamiltonian_transition(
                evaluate,
                state,
                initial_momentum,
                uniforms[dimension],
                leapfrog_size,
                factor,
                num_leapfrogs,
                is_start,
            )

        states, acceptance = map_or_vmap(move_one, mode, states, uniforms)
        rate = jnp.mean(acceptance)
        step_size = adapt_step_size(step_size, rate, jnp.where(is_start, 0, learning))
        return (states, step_size), (states.position, states.log_ratio, rate, num_leapfrogs)

    # One call draws all random numbers, as each call is compiled by itself. The length is that of the first row.
    uniforms = jax.random.uniform(key, (num_moves + 1, num_particles, dimension + 2), positions.dtype)
    (_, step_size), (all_positions, log_ratios, rates, counts) = lax.scan(
        move, (unevaluated, step_size), (uniforms, jnp.arange(num_moves + 1))
    )
    num_gradients = num_particles * jnp.sum(counts, dtype=jnp.int32)
    return MoveResult(
        positions=all_positions,
        log_ratios=log_ratios,
        acceptance=rates,
        step_size=step_size,
        num_gradients=num_gradients,
        num_densities=jnp.zeros_like(num_gradients),
    )


def adapt_step_size(
    step_size: Float[Array, ""], rate: Float[Array, ""], learning: Float[Array, ""]
) -> Float[Array, ""]:
    """Return a step size nearer to the one whose acceptance rate is 0.8.

    Args:
        step_size: in coordinates of unit covariance.
        rate: the acceptance rate that it had.
        learning: 1, or 0: keep the step size.
    """
    log_change = learning * _ADAPTATION_GAIN * (rate - _TARGET_ACCEPTANCE)
    return jnp.minimum(step_size * jnp.exp(log_change), MAX_TRAJECTORY_LENGTH).astype(step_size.dtype)


def hamiltonian_transition(
    evaluate: Callable,
    state: TemperedIntegratorState,
    initial_momentum: Float[Array, " d"],
    uniform: Float[Array, ""],
    step_size: Float[Array, ""],
    factor: Float[Array, "..."],
    num_leapfrogs: Array,
    force_accept: Array,
) -> tuple[TemperedIntegratorState, Float[Array, ""]]:
    """Follow one trajectory; return the next state and the acceptance probability.

    A trajectory with a NaN is rejected. One that ends at a log ratio of plus infinity is accepted: the loop of levels
    then raises an error.

    Args:
        evaluate: as in ``hmc_moves``.
        state: at the start.
        initial_momentum: standard normal, in coordinates of unit covariance.
        uniform: decides on acceptance.
        step_size: in coordinates of unit covariance.
        factor: of the covariance.
        num_leapfrogs: one or more.
        force_accept: accept in any case.
    """

    # In coordinates z of unit covariance, u = R z, the leapfrog has unit mass and the gradient R' grad.
    def leapfrog_step(_, carry):
        state, momentum = carry
        momentum = momentum + 0.5 * step_size * covariance_factor.apply_transpose(factor, state.gradient)
        position = state.position + step_size * covariance_factor.apply(factor, momentum)
        (logdensity, log_ratio), gradient = evaluate(position)
        momentum = momentum + 0.5 * step_size * covariance_factor.apply_transpose(factor, gradient)
        return TemperedIntegratorState(position, logdensity, gradient, log_ratio), momentum

    proposal, final_momentum = lax.fori_loop(0, num_leapfrogs, leapfrog_step, (state, initial_momentum))
    # Accept or reject
    log_acceptance_ratio = (
        proposal.logdensity
        - state.logdensity
        + 0.5 * (jnp.sum(initial_momentum**2) - jnp.sum(final_momentum**2))
    )
    log_acceptance_ratio = jnp.where(jnp.isnan(log_acceptance_ratio), -jnp.inf, log_acceptance_ratio)
    accepted = force_accept | (jnp.log(uniform) < log_acceptance_ratio) | (proposal.log_ratio == jnp.inf)
    new_state = select(accepted, proposal, state)
    return new_state, jnp.exp(jnp.minimum(log_acceptance_ratio, 0))
