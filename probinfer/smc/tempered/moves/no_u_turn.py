"""No-U-turn moves of many particles that share metric and step size.

The trajectories of ``mcmc.nuts_steps``, in coordinates of unit covariance around each particle. Given step size and
metric the move is reversible for its target: the states of a trajectory are chosen from by a rule that is symmetric in
where it began. Side by side all particles wait for the longest trajectory among them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.types import Array, Float, PRNGKey
from probinfer.inference.engine import over
from probinfer.mcmc.hamiltonian import IntegratorState
from probinfer.mcmc.nuts_steps import sample_trajectory
from probinfer.numerics.covariance_factor import pull, push
from probinfer.smc.tempered.moves.hamiltonian import Moved, adapted

__all__ = ["nuts_moves"]

_MAX_DEPTH = 6  # 63 leapfrogs


def nuts_moves(
    key: PRNGKey,
    evaluate: Callable,
    positions: Float[Array, "n d"],
    root: Float[Array, "..."],
    step_size: Float[Array, ""],
    learning: Float[Array, ""],
    *,
    num_moves: int,
    mode: str,
) -> Moved:
    """Move every particle ``num_moves`` times and keep all states.

    Args:
        key: random key.
        evaluate: position (d,) -> ((log density, log ratio), gradient (d,)).
        positions: of the particles.
        root: of their covariance, see ``spread``.
        step_size: in coordinates of unit covariance.
        learning: 1: the step size goes towards the acceptance rate 0.8 after every move; 0: it stays.
        num_moves: how many.
        mode: particles one after another ("map"), side by side ("vmap"), or as the device asks ("auto").

    Returns:
        The states and their accounts; the start of every trajectory is evaluated anew, and counted.
    """
    num = positions.shape[0]

    def move(carry, pack):
        positions, step_size = carry
        key, index = pack
        last = index == num_moves  # is evaluated, for its log ratio, and goes nowhere

        def one(key, position):
            return _trajectory(key, evaluate, position, root, step_size, last)

        ends, log_ratios, acceptance, counts = over(one, mode, jax.random.split(key, num), positions)
        rate = jnp.mean(acceptance)
        step_size = adapted(step_size, rate, jnp.where(last, 0, learning))
        return (ends, step_size), (positions, log_ratios, rate, jnp.sum(counts, dtype=jnp.int32))

    keys = jax.random.split(key, num_moves + 1)
    (_, step_size), (states, log_ratios, rates, counts) = lax.scan(
        move, (positions, step_size), (keys, jnp.arange(num_moves + 1))
    )
    spent = jnp.sum(counts, dtype=jnp.int32) + num * (num_moves + 1)
    return Moved(states, log_ratios, jnp.roll(rates, 1), step_size, spent, jnp.zeros_like(spent))


def _trajectory(key, evaluate, position, root, step_size, last):
    """Where one trajectory leads; the log ratio at its start, its acceptance rate and its leapfrogs."""
    (logdensity, log_ratio), gradient = evaluate(position)
    ones = jnp.ones_like(position)

    def around(z):
        (logdensity, _), gradient = evaluate(position + push(root, z))
        return logdensity, pull(root, gradient)

    place = IntegratorState(jnp.zeros_like(position), logdensity, pull(root, gradient))
    tree = sample_trajectory(key, place, around, step_size, ones, _MAX_DEPTH, ~last)
    acceptance = tree.acceptance_sum / jnp.maximum(tree.num_leapfrogs, 1)
    return position + push(root, tree.chosen.position), log_ratio, acceptance, tree.num_leapfrogs
