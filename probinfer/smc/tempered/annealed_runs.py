r"""The runs of annealed importance sampling: moves along frozen temperatures, and the weights that they collect.

A step covers 1 / ``refine`` of a level, forward or in reverse; all runs take it together. Step i uses the i-th fold of
the key, so runs in one loop and runs step by step (with a bar or checkpoints) are the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.algorithms import Algorithm, algorithm
from probinfer.core.trees import map_or_vmap
from probinfer.core.types import Array, ArrayTree, Float, Int, PRNGKey, Scalar, field, pytree
from probinfer.smc.tempered.bridge import flatten_position
from probinfer.smc.tempered.levels import resolve_mode
from probinfer.smc.tempered.moves.choice import move_particles
from probinfer.smc.tempered.schedule import Schedule, level_settings

__all__ = ["Annealing", "RunsState", "forward_steps", "has_taken", "init_runs"]


class RunsState(NamedTuple):
    r"""Runs after some steps.

    Attributes:
        positions: :math:`u` of each run.
        log_weights: :math:`\sum_k (t_k - t_{k-1})\,\Delta(u_{k-1})`.
        log_ratios: :math:`\Delta(u)`; minus infinity where it is undefined.
        step: steps taken.
        num_undefined: draws of the initial distribution with a log ratio of NaN.
        num_gradients: evaluations of the density with its gradient, of all runs together.
        num_densities: evaluations of the density alone, of all runs together.
    """

    positions: Float[Array, "N d"]
    log_weights: Float[Array, " N"]
    log_ratios: Float[Array, " N"]
    step: Int[Array, ""]
    num_undefined: Int[Array, ""]
    num_gradients: Int[Array, ""]
    num_densities: Int[Array, ""]


@pytree
class Annealing:
    """A frozen annealing: a bridge with temperatures, moves, metrics and step sizes.

    Attributes:
        bridge: from the initial distribution to the target.
        schedule: of the tempered pilot.
        started_from: index of the initial distribution in ``initial_distribution.INITIAL_DISTRIBUTIONS``.
        num_gradients: evaluations of the density with its gradient that the pilot made.
        num_densities: evaluations of the density alone that the pilot made.
        refine: steps into which each level of the schedule is divided.
        moves: as in ``Tempered``; all are reversible, as runs in reverse require.
        mode: "map", "vmap" or "auto" over the runs.
    """

    bridge: Any
    schedule: Schedule
    started_from: Any
    num_gradients: Any
    num_densities: Any
    refine: int = field(static=True)
    moves: str = field(static=True)
    mode: str = field(static=True)

    def forward(self, key: PRNGKey) -> Scalar:
        """Return the log weight of one run from the initial distribution: at most log Z in expectation.

        Args:
            key: random key.
        """
        return _forward(self, key, 1).log_weights[0]

    def reverse(self, draws: ArrayTree) -> jax.tree_util.Partial:
        """Return ``key -> log weight`` of one reverse run from a random draw: at least log Z in expectation.

        Args:
            draws: exact and independent draws of the target, unconstrained positions with a leading axis. For simulated
                data, the parameters that they were simulated with are one.
        """
        flat = jax.vmap(flatten_position)(draws)
        return jax.tree_util.Partial(_reverse_run, self, flat)

    def reverse_all(self, key: PRNGKey, draws: ArrayTree) -> Float[Array, " n"]:
        """Return the log weights of reverse runs from each of the draws, in one program.

        Args:
            key: random key.
            draws: as in ``reverse``.
        """
        return _reverse(self, key, jax.vmap(flatten_position)(draws)).log_weights

    def forward_all(self, key: PRNGKey, num: int) -> Float[Array, " n"]:
        """Return the log weights of independent runs from the initial distribution, in one program.

        Args:
            key: random key.
            num: how many runs.
        """
        return _forward(self, key, num).log_weights


def forward_steps(annealing: Annealing) -> Algorithm:
    """Return forward runs as an algorithm; its state is that of ``init_runs``.

    Args:
        annealing: frozen.
    """
    return algorithm(_init, _step_forward, annealing)


def has_taken(num_steps: Array, state: RunsState, info: Any) -> Array:
    """Return whether the runs have taken this number of steps."""
    del info
    return state.step >= num_steps


@partial(jax.jit, static_argnames="num_runs")
def init_runs(annealing: Annealing, key: PRNGKey, *, num_runs: int) -> RunsState:
    """Draw the starts of runs from the initial distribution.

    Args:
        annealing: frozen.
        key: random key.
        num_runs: N.
    """
    return _init(annealing, key, num_runs)


def _init(annealing: Annealing, key: PRNGKey, num_runs: int) -> RunsState:
    positions = map_or_vmap(annealing.bridge.sample, "auto", jax.random.split(key, num_runs))
    mode = resolve_mode(annealing.mode, annealing.bridge, positions[0])
    raw_log_ratios = map_or_vmap(lambda position: annealing.bridge.terms(position)[1], mode, positions)
    undefined = jnp.isnan(raw_log_ratios)
    state = _with_zero_weights(positions, jnp.where(undefined, -jnp.inf, raw_log_ratios))
    return state._replace(
        num_undefined=jnp.sum(undefined, dtype=jnp.int32), num_densities=state.num_densities + num_runs
    )


def _with_zero_weights(positions: Array, log_ratios: Array) -> RunsState:
    count = jnp.zeros((), jnp.int32)
    return RunsState(
        positions=positions,
        log_weights=jnp.zeros_like(log_ratios),
        log_ratios=log_ratios,
        step=count,
        num_undefined=count,
        num_gradients=count,
        num_densities=count,
    )


@partial(jax.jit, static_argnames="num_runs")
def _forward(annealing: Annealing, key: PRNGKey, num_runs: int) -> RunsState:
    key_init, key_moves = jax.random.split(key)
    return _all_steps(annealing, key_moves, _init(annealing, key_init, num_runs), reverse=False)


@jax.jit
def _reverse(annealing: Annealing, key: PRNGKey, positions: Float[Array, "n d"]) -> RunsState:
    log_ratios = jnp.zeros(positions.shape[0], positions.dtype)  # not used in reverse
    return _all_steps(annealing, key, _with_zero_weights(positions, log_ratios), reverse=True)


def _reverse_run(annealing: Annealing, draws: Float[Array, "s d"], key: PRNGKey) -> Scalar:
    key_choice, key_moves = jax.random.split(key)
    chosen = jax.random.randint(key_choice, (1,), 0, draws.shape[0])
    return _reverse(annealing, key_moves, draws[chosen]).log_weights[0]


def _all_steps(annealing: Annealing, key: PRNGKey, state: RunsState, *, reverse: bool) -> RunsState:
    def step(i, state):
        return _step(annealing, jax.random.fold_in(key, i), state, reverse=reverse)

    return lax.fori_loop(0, annealing.schedule.num_levels * annealing.refine, step, state)


def _step_forward(annealing: Annealing, key: PRNGKey, state: RunsState) -> tuple[RunsState, tuple[()]]:
    return _step(annealing, key, state, reverse=False), ()


def _step(annealing: Annealing, key: PRNGKey, state: RunsState, *, reverse: bool) -> RunsState:
    """Move at the next temperature and update the weights: with the log ratios before, in reverse after the move."""
    schedule, refine = annealing.schedule, annealing.refine
    # Temperature: levels are divided into equal steps
    index = schedule.num_levels * refine - 1 - state.step if reverse else state.step
    level = index // refine
    level_start = jnp.where(level == 0, 0, schedule.temperatures[level - 1])
    temperature_step = (schedule.temperatures[level] - level_start) / refine
    temperature = level_start + temperature_step * (index % refine + 1).astype(temperature_step.dtype)
    # Move
    result, _ = move_particles(
        annealing.moves,
        key,
        annealing.bridge,
        level_settings(schedule, level)._replace(temperature=temperature),
        state.positions,
        jnp.asarray(False),
        num_moves=1,
        mode=resolve_mode(annealing.mode, annealing.bridge, state.positions[0]),
    )
    # Weigh: a weight of zero stays zero wherever the run moves afterwards
    log_ratios = result.log_ratios[-1] if reverse else state.log_ratios
    log_weights = jnp.where(
        state.log_weights == -jnp.inf, -jnp.inf, state.log_weights + temperature_step * log_ratios
    )
    return RunsState(
        positions=result.positions[-1],
        log_weights=log_weights,
        log_ratios=jnp.where(jnp.isnan(result.log_ratios[-1]), -jnp.inf, result.log_ratios[-1]),
        step=state.step + 1,
        num_undefined=state.num_undefined,
        num_gradients=state.num_gradients + result.num_gradients,
        num_densities=state.num_densities + result.num_densities,
    )
