r"""The choice of moves at a level: by name, or by the measurements of a pilot.

A move *mixes* by :math:`r = E\,|u'-u|^2 / 2v`, the mean over coordinates of the squared jump over twice the variance of
the particles: one minus the autocorrelation of the coordinates at lag one. If an independent proposal mixes by r, k of
them in a row mix by about :math:`1 - (1 - r)^k`.

*Auto*: the pilot measures Hamiltonian and independent moves at every level. It finds the number of proposals that mix
like a Hamiltonian move, and by 0.65 at least. The level uses independent moves if this number does not exceed the
leapfrogs of the Hamiltonian move: each proposal is one evaluation of the density, each leapfrog one with its gradient.
It then makes as many proposals as mix by 0.8, and no more than there were leapfrogs. Otherwise it uses Hamiltonian
moves: in many dimensions, and for separate modes. There both kinds mix by little of the total variance, which does not
tell how well they mix within the modes. With fewer than twenty particles a dimension independent moves are not
considered: a covariance estimated from so few is poor, particles in its tails do not move, and a mean jump does not
reveal it. The measurements of the pilot do not bias the evidence of the later populations, which use its choice.
No-U-turn moves are not among the candidates: on a normal in ten dimensions they need more evaluations for the same
error of the evidence (``benchmarks/smc_tempered.py``).

References:
    Pasarica and Gelman (2010), "Adaptively scaling the Metropolis algorithm using expected squared jumped distance".
    Buchholz, Chopin and Jacob (2021), "Adaptive tuning of Hamiltonian Monte Carlo within sequential Monte Carlo".
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.trees import select
from probinfer.core.types import Array, Bool, Float, Int, PRNGKey
from probinfer.smc.tempered.moves.hamiltonian import MoveResult, hmc_moves
from probinfer.smc.tempered.moves.independent import independent_moves
from probinfer.smc.tempered.moves.no_u_turn import nuts_moves
from probinfer.smc.tempered.schedule import LevelSettings

__all__ = ["MOVES", "measure_mixing", "move_particles", "tempered_logdensity", "tries_for_mixing"]

MOVES = ("auto", "hmc", "nuts", "independent")
_TARGET_MIXING = 0.8  # of independent moves
_MIN_MIXING = 0.65  # below, independent moves are not chosen
_MIN_PARTICLES_PER_DIMENSION = 20  # fewer do not determine a covariance
_MAX_MIXING = 0.95  # more proposals are not made for a better mixing
_MAX_TRIES = 16


def move_particles(
    moves: str,
    key: PRNGKey,
    bridge: Any,
    level: LevelSettings,
    positions: Float[Array, "n d"],
    learning: Bool[Array, ""],
    *,
    num_moves: int,
    mode: str,
) -> tuple[MoveResult, LevelSettings]:
    """Move every particle ``num_moves`` times at the temperature of a level, and return all states.

    Args:
        moves: one of ``MOVES``.
        key: random key.
        bridge: from the initial distribution to the target.
        level: settings of the level.
        positions: of the particles.
        learning: whether to measure the moves and to update the settings.
        num_moves: of each particle.
        mode: over particles.

    Returns:
        The result of the moves, and the settings.
    """
    if moves == "auto":
        return _auto_moves(key, bridge, level, positions, learning, num_moves, mode)
    if moves == "independent":
        result = _independent_moves(key, bridge, level, positions, learning, num_moves, mode)
        learned_tries = tries_for_mixing(_TARGET_MIXING, measure_mixing(result, level.factor))
        return result, level._replace(tries=jnp.where(learning, learned_tries, level.tries))
    result = _trajectory_moves(moves, key, bridge, level, positions, learning, num_moves, mode)
    return result, level._replace(step_size=result.step_size)


def tempered_logdensity(bridge: Any, temperature: Array, position: Float[Array, " d"]) -> tuple[Array, Array]:
    """Return log density and log ratio at a temperature.

    Args:
        bridge: from the initial distribution to the target.
        temperature: of the density.
        position: unconstrained.
    """
    log_initial, log_ratio = bridge.terms(position)
    return log_initial + temperature * log_ratio, log_ratio


def measure_mixing(result: MoveResult, factor: Float[Array, "..."]) -> Float[Array, ""]:
    """Return the mean squared jump of a move over twice the variance, between 0 and 1.

    Args:
        result: of the moves.
        factor: of the covariance.
    """
    variance = factor**2 if factor.ndim == 1 else jnp.sum(factor**2, axis=1)
    mixing = jnp.mean(jnp.diff(result.positions, axis=0) ** 2 / (2 * variance))
    return jnp.clip(mixing, 0, 1)


def tries_for_mixing(target: Float[Array, ""] | float, single: Float[Array, ""]) -> Int[Array, ""]:
    """Return how many proposals in a row mix by the target, from 1 to 16.

    Args:
        target: mixing, below 1.
        single: mixing of one proposal.
    """
    # 1 - (1 - r)^k = target, solved for k; r is kept away from 0 and 1, where the logarithm is not finite.
    eps = jnp.finfo(single.dtype).eps
    log_unmixed = jnp.log(jnp.clip(1 - single, eps, 1 - eps))
    tries = jnp.ceil(jnp.log1p(-jnp.minimum(jnp.asarray(target, single.dtype), _MAX_MIXING)) / log_unmixed)
    return jnp.clip(tries, 1, _MAX_TRIES).astype(jnp.int32)


def _trajectory_moves(moves, key, bridge, level, positions, learning, num_moves, mode):
    moves_fn = nuts_moves if moves == "nuts" else hmc_moves
    evaluate = jax.value_and_grad(partial(tempered_logdensity, bridge, level.temperature), has_aux=True)
    learning = jnp.asarray(learning).astype(level.step_size.dtype)
    return moves_fn(
        key, evaluate, positions, level.factor, level.step_size, learning, num_moves=num_moves, mode=mode
    )


def _independent_moves(key, bridge, level, positions, learning, num_moves, mode):
    density = partial(tempered_logdensity, bridge, level.temperature)
    tries = jnp.where(learning, 1, level.tries)
    return independent_moves(
        key, density, positions, level.loc, level.factor, tries, num_moves=num_moves, mode=mode
    )


def _auto_moves(key, bridge, level, positions, learning, num_moves, mode):
    """Make both moves while learning, and keep the Hamiltonian ones; else make those that were chosen."""
    key_hmc, key_independent = jax.random.split(key)
    settings = (bridge, level, positions, learning, num_moves, mode)

    def if_needed(needed, fn):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fn))
        return lax.cond(needed, fn, lambda: zeros)

    # Move
    by_trajectories = level.tries == 0
    hamiltonian = if_needed(learning | by_trajectories, lambda: _trajectory_moves("hmc", key_hmc, *settings))
    independent = if_needed(
        learning | ~by_trajectories, lambda: _independent_moves(key_independent, *settings)
    )
    # Choose by mixing and cost. Leapfrogs are those of one move, without the evaluation of every start.
    leapfrogs = (hamiltonian.num_gradients // positions.shape[0] - 1) // num_moves
    single = measure_mixing(independent, level.factor)
    target = jnp.maximum(measure_mixing(hamiltonian, level.factor), jnp.asarray(_MIN_MIXING, single.dtype))
    enough_particles = (
        positions.shape[0] * (num_moves + 1) >= _MIN_PARTICLES_PER_DIMENSION * positions.shape[1]
    )
    use_independent = enough_particles & (tries_for_mixing(target, single) <= leapfrogs)
    learned_tries = jnp.where(
        use_independent, jnp.clip(tries_for_mixing(_TARGET_MIXING, single), 1, leapfrogs), 0
    )
    # Select the states, and count the evaluations of both
    result = select(learning | by_trajectories, hamiltonian, independent)
    result = result._replace(
        num_gradients=hamiltonian.num_gradients + independent.num_gradients,
        num_densities=hamiltonian.num_densities + independent.num_densities,
    )
    step_size = jnp.where(learning | by_trajectories, hamiltonian.step_size, level.step_size)
    tries = jnp.where(learning, learned_tries, level.tries)
    return result, level._replace(step_size=step_size, tries=tries)
