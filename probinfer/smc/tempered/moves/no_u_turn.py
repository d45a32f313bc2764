"""No-U-turn moves of many particles that share metric and step size.

The trajectories of ``mcmc.nuts_steps``, in coordinates of unit covariance around each particle. Given step size and
metric the move is reversible for its target: the next state is selected from a trajectory by a rule that is symmetric
in its start. Side by side, all particles wait for the longest trajectory among them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.trees import map_or_vmap
from probinfer.core.types import Array, Float, PRNGKey
from probinfer.mcmc.hamiltonian import IntegratorState
from probinfer.mcmc.nuts_steps import sample_trajectory
from probinfer.numerics import covariance_factor
from probinfer.smc.tempered.moves.hamiltonian import MoveResult, adapt_step_size

__all__ = ["nuts_moves"]

_MAX_DEPTH = 6  # 63 leapfrogs


def nuts_moves(
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

    Returns:
        The states; the start of every trajectory is evaluated again, and counted.
    """
    num_particles = positions.shape[0]

    def move(carry, inputs):
        positions, step_size = carry
        key, index = inputs
        is_last = index == num_moves  # only evaluates the last positions, for their log ratios

        def move_one(key, position):
            return _trajectory(key, evaluate, position, factor, step_size, is_last)

        ends, log_ratios, acceptance, counts = map_or_vmap(
            move_one, mode, jax.random.split(key, num_particles), positions
        )
        rate = jnp.mean(acceptance)
        step_size = adapt_step_size(step_size, rate, jnp.where(is_last, 0, learning))
        return (ends, step_size), (positions, log_ratios, rate, jnp.sum(counts, dtype=jnp.int32))

    keys = jax.random.split(key, num_moves + 1)
    (_, step_size), (all_positions, log_ratios, rates, counts) = lax.scan(
        move, (positions, step_size), (keys, jnp.arange(num_moves + 1))
    )
    num_gradients = jnp.sum(counts, dtype=jnp.int32) + num_particles * (num_moves + 1)
    return MoveResult(
        positions=all_positions,
        log_ratios=log_ratios,
        acceptance=jnp.roll(rates, 1),  # row 0 is no move: here the last row was none
        step_size=step_size,
        num_gradients=num_gradients,
        num_densities=jnp.zeros_like(num_gradients),
    )


def _trajectory(
    key: PRNGKey, evaluate: Callable, position: Array, factor: Array, step_size: Array, is_last: Array
) -> tuple[Array, Array, Array, Array]:
    """Return the end of one trajectory, the log ratio at its start, its acceptance rate and its leapfrogs."""
    (logdensity, log_ratio), gradient = evaluate(position)
    ones = jnp.ones_like(position)

    def standardized_logdensity(z):
        (logdensity, _), gradient = evaluate(position + covariance_factor.apply(factor, z))
        return logdensity, covariance_factor.apply_transpose(factor, gradient)

    start_gradient = covariance_factor.apply_transpose(factor, gradient)
    place = IntegratorState(jnp.zeros_like(position), logdensity, start_gradient)
    tree = sample_trajectory(key, place, standardized_logdensity, step_size, ones, _MAX_DEPTH, ~is_last)
    acceptance = tree.acceptance_sum / jnp.maximum(tree.num_leapfrogs, 1)
    end = position + covariance_factor.apply(factor, tree.chosen.position)
    return end, log_ratio, acceptance, tree.num_leapfrogs
