r"""Which moves a level uses: by name, or as a pilot measured.

A move *mixes* by :math:`r = E\,|u'-u|^2 / 2v`, the mean over coordinates of the squared jump over twice the variance of
the cloud: one minus the autocorrelation of the coordinates at lag one. Where a proposal from the independent law mixes
by r, k of them in a row mix by about :math:`1 - (1 - r)^k`.

*Auto*: the pilot measures Hamiltonian and independent moves in every level. The level uses independent moves where so
many proposals as mix like a Hamiltonian move, and by 0.65 at least, are no more than that move has leapfrogs: each
proposal is one evaluation of the density, each leapfrog one with its gradient. It then makes as many as mix by 0.8,
and no more than the leapfrogs were. Else it uses Hamiltonian moves: in many dimensions, and where modes lie apart.
There both mix by little of the whole spread, which says nothing of how well they mix within the modes. With fewer
than twenty particles a dimension it does not ask: a covariance from so few is poor, particles in its tails stay where
they are, and a mean jump does not show it. What the pilot measured does not touch the evidence of the populations
after it, which keep its choice. No-U-turn moves are not among the candidates: on a normal in ten dimensions the same
error of the evidence costs more evaluations with them (``benchmarks/smc_tempered.py``).

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

from probinfer.core.types import Array, Bool, Float, Int, PRNGKey
from probinfer.smc.tempered.moves.hamiltonian import Moved, hmc_moves
from probinfer.smc.tempered.moves.independent import independent_moves
from probinfer.smc.tempered.moves.no_u_turn import nuts_moves
from probinfer.smc.tempered.schedule import Plan

__all__ = ["MOVES", "evaluate", "jump", "move_all", "tries_for"]

MOVES = ("auto", "hmc", "nuts", "independent")
_ENOUGH = 0.8  # mixing that independent moves aim at
_LEAST = 0.65  # mixing without which they are not taken
_CROWD = 20  # particles a dimension, fewer of which do not tell a covariance
_MOST = 0.95  # mixing beyond which more proposals are not asked for
_MOST_TRIES = 16


def move_all(
    moves: str,
    key: PRNGKey,
    path: Any,
    plan: Plan,
    positions: Float[Array, "n d"],
    learning: Bool[Array, ""],
    *,
    num_moves: int,
    mode: str,
) -> tuple[Moved, Plan]:
    """Move every particle ``num_moves`` times at the temperature of a plan, and keep all states.

    Args:
        moves: one of ``MOVES``.
        key: random key.
        path: from base to target.
        plan: of the level.
        positions: of the particles.
        learning: whether to measure, and to write into the plan what follows from it.
        num_moves: how many.
        mode: over particles.

    Returns:
        The states with their accounts, and the plan.
    """
    if moves == "auto":
        return _either(key, path, plan, positions, learning, num_moves, mode)
    if moves == "independent":
        moved = _independent(key, path, plan, positions, learning, num_moves, mode)
        tries = jnp.where(learning, tries_for(_ENOUGH, jump(moved, plan.root)), plan.tries)
        return moved, plan._replace(tries=tries)
    moved = _trajectories(moves, key, path, plan, positions, learning, num_moves, mode)
    return moved, plan._replace(step_size=moved.step_size)


def evaluate(path: Any, temperature: Array, position: Float[Array, " d"]) -> tuple[Array, Array]:
    """Return log density and log ratio at a temperature.

    Args:
        path: from base to target.
        temperature: of the density.
        position: where.
    """
    log_base, log_ratio = path.terms(position)
    return log_base + temperature * log_ratio, log_ratio


def jump(moved: Moved, root: Float[Array, "..."]) -> Float[Array, ""]:
    """Return the mean squared jump of a move over twice the variance, between 0 and 1.

    Args:
        moved: states of every particle.
        root: of the covariance.
    """
    variance = root**2 if root.ndim == 1 else jnp.sum(root**2, axis=1)
    found = jnp.mean(jnp.diff(moved.positions, axis=0) ** 2 / (2 * variance))
    return jnp.clip(found, 0, 1)


def tries_for(wanted: Float[Array, ""] | float, single: Float[Array, ""]) -> Int[Array, ""]:
    """Return how many proposals in a row mix as wanted, from 1 to 16.

    Args:
        wanted: mixing, below 1.
        single: that of one proposal.
    """
    least = jnp.finfo(single.dtype).eps
    stay = jnp.log(jnp.clip(1 - single, least, 1 - least))
    need = jnp.ceil(jnp.log1p(-jnp.minimum(jnp.asarray(wanted, single.dtype), _MOST)) / stay)
    return jnp.clip(need, 1, _MOST_TRIES).astype(jnp.int32)


def _trajectories(moves, key, path, plan, positions, learning, num_moves, mode):
    function = nuts_moves if moves == "nuts" else hmc_moves
    gradient = jax.value_and_grad(partial(evaluate, path, plan.temperature), has_aux=True)
    learn = jnp.asarray(learning).astype(plan.step_size.dtype)
    return function(
        key, gradient, positions, plan.root, plan.step_size, learn, num_moves=num_moves, mode=mode
    )


def _independent(key, path, plan, positions, learning, num_moves, mode):
    density = partial(evaluate, path, plan.temperature)
    tries = jnp.where(learning, 1, plan.tries)
    return independent_moves(
        key, density, positions, plan.loc, plan.root, tries, num_moves=num_moves, mode=mode
    )


def _either(key, path, plan, positions, learning, num_moves, mode):
    """Both while learning, else the one that was chosen; a learning population goes on with Hamiltonian moves."""
    key_hmc, key_independent = jax.random.split(key)
    settings = (path, plan, positions, learning, num_moves, mode)

    def if_needed(needed, fn):
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fn))
        return lax.cond(needed, fn, lambda: nothing)

    steep = plan.tries == 0
    hamiltonian = if_needed(learning | steep, lambda: _trajectories("hmc", key_hmc, *settings))
    independent = if_needed(learning | ~steep, lambda: _independent(key_independent, *settings))
    # of one move: the first gradient of every particle is that of its start
    leapfrogs = (hamiltonian.num_gradients // positions.shape[0] - 1) // num_moves
    single = jump(independent, plan.root)
    wanted = jnp.maximum(jump(hamiltonian, plan.root), jnp.asarray(_LEAST, single.dtype))
    crowd = positions.shape[0] * (num_moves + 1) >= _CROWD * positions.shape[1]
    as_good = crowd & (tries_for(wanted, single) <= leapfrogs)
    tries = jnp.where(as_good, jnp.clip(tries_for(_ENOUGH, single), 1, leapfrogs), 0)
    kept = jax.tree.map(lambda a, b: jnp.where(learning | steep, a, b), hamiltonian, independent)
    kept = kept._replace(
        num_gradients=hamiltonian.num_gradients + independent.num_gradients,
        num_densities=hamiltonian.num_densities + independent.num_densities,
    )
    step_size = jnp.where(learning | steep, hamiltonian.step_size, plan.step_size)
    return kept, plan._replace(step_size=step_size, tries=jnp.where(learning, tries, plan.tries))
