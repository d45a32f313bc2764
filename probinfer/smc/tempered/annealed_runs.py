r"""The runs of annealed importance sampling: moves along frozen temperatures, and the weights that they collect.

A step cuts 1 / ``refine`` of a level, forward or back; all runs take it together. Step i uses the i-th fold of the key,
so runs in one loop and runs step by step (with a bar or checkpoints) are the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.algorithms import Algorithm, algorithm
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey, Scalar, field, pytree
from probinfer.inference import engine
from probinfer.smc.tempered.bridge import flatten_one
from probinfer.smc.tempered.levels import resolved
from probinfer.smc.tempered.moves.choice import move_all
from probinfer.smc.tempered.schedule import Schedule, row

__all__ = ["Annealing", "Runs", "arrived", "forward_steps", "started"]


class Runs(NamedTuple):
    """Runs on their way: ``positions`` (N, d), ``log_weights`` and ``log_ratios`` (N,); counts of the whole."""

    positions: Any
    log_weights: Any
    log_ratios: Any
    step: Any
    num_undefined: Any
    num_gradients: Any
    num_densities: Any


@pytree
class Annealing:
    """A frozen annealing: a path with temperatures, moves, metrics and step sizes.

    Attributes:
        path: from base to target.
        schedule: of the tempered pilot.
        started_from: index of the base law in ``smc.base_law.STARTS``.
        num_gradients: that finding all this took.
        num_densities: evaluations of the density alone that it took.
        refine: steps into which each of its levels is cut.
        moves: as in ``Tempered``; all are reversible, as runs in reverse need.
        mode: "map", "vmap" or "auto" over the runs.
    """

    path: Any
    schedule: Schedule
    started_from: Any
    num_gradients: Any
    num_densities: Any
    refine: int = field(static=True)
    moves: str = field(static=True)
    mode: str = field(static=True)

    def forward(self, key: PRNGKey) -> Scalar:
        """Return the log weight of one run from the base law: log Z in expectation from below.

        Args:
            key: random key.
        """
        return _forward(self, key, 1).log_weights[0]

    def reverse(self, draws: ArrayTree) -> jax.tree_util.Partial:
        """Return ``key -> log weight`` of one run back from a random one of the draws: log Z from above.

        Args:
            draws: exact and independent draws of the target, unconstrained positions with a leading axis. On simulated
                data the parameters that made them are one.
        """
        flat = jax.vmap(flatten_one)(draws)
        return jax.tree_util.Partial(_one_back, self, flat)

    def reverse_all(self, key: PRNGKey, draws: ArrayTree) -> Float[Array, " n"]:
        """Return the log weights of runs back from each of the draws, in one program.

        Args:
            key: random key.
            draws: as in ``reverse``.
        """
        return _backward(self, key, jax.vmap(flatten_one)(draws)).log_weights

    def forward_all(self, key: PRNGKey, num: int) -> Float[Array, " n"]:
        """Return the log weights of independent runs from the base law, in one program.

        Args:
            key: random key.
            num: how many.
        """
        return _forward(self, key, num).log_weights


def forward_steps(frozen: Annealing) -> Algorithm:
    """Return runs as an algorithm; its state is that of ``started``.

    Args:
        frozen: the annealing.
    """
    return algorithm(_start, _step_forward, frozen)


def arrived(num_steps: Array, runs: Runs, info: Any) -> Array:
    """Whether so many steps were taken."""
    del info
    return runs.step >= num_steps


@partial(jax.jit, static_argnames="num")
def started(frozen: Annealing, key: PRNGKey, *, num: int) -> Runs:
    """Return runs at the base law.

    Args:
        frozen: the annealing.
        key: random key.
        num: how many runs.
    """
    return _start(frozen, key, num)


def _start(frozen: Annealing, key: PRNGKey, num: int) -> Runs:
    positions = engine.over(frozen.path.sample, "auto", jax.random.split(key, num))
    mode = resolved(frozen.mode, frozen.path, positions[0])
    raw = engine.over(lambda position: frozen.path.terms(position)[1], mode, positions)
    undefined = jnp.isnan(raw)
    runs = _at(positions, jnp.where(undefined, -jnp.inf, raw))
    return runs._replace(
        num_undefined=jnp.sum(undefined, dtype=jnp.int32), num_densities=runs.num_densities + num
    )


def _at(positions: Array, log_ratios: Array) -> Runs:
    zero = jnp.zeros((), jnp.int32)
    return Runs(positions, jnp.zeros_like(log_ratios), log_ratios, zero, zero, zero, zero)


@partial(jax.jit, static_argnames="num")
def _forward(frozen: Annealing, key: PRNGKey, num: int) -> Runs:
    key_draw, key_moves = jax.random.split(key)
    return _loop(frozen, key_moves, _start(frozen, key_draw, num), back=False)


@jax.jit
def _backward(frozen: Annealing, key: PRNGKey, positions: Float[Array, "n d"]) -> Runs:
    return _loop(frozen, key, _at(positions, jnp.zeros(positions.shape[0], positions.dtype)), back=True)


def _one_back(frozen: Annealing, draws: Float[Array, "s d"], key: PRNGKey) -> Scalar:
    key_choice, key_moves = jax.random.split(key)
    chosen = jax.random.randint(key_choice, (1,), 0, draws.shape[0])
    return _backward(frozen, key_moves, draws[chosen]).log_weights[0]


def _loop(frozen: Annealing, key: PRNGKey, runs: Runs, *, back: bool) -> Runs:
    def step(i, runs):
        return _step(frozen, jax.random.fold_in(key, i), runs, back=back)

    return lax.fori_loop(0, frozen.schedule.num_levels * frozen.refine, step, runs)


def _step_forward(frozen: Annealing, key: PRNGKey, runs: Runs) -> tuple[Runs, tuple[()]]:
    return _step(frozen, key, runs, back=False), ()


def _step(frozen: Annealing, key: PRNGKey, runs: Runs, *, back: bool) -> Runs:
    """Move at the next temperature and collect the weight: before the move, or (back) after it."""
    schedule, refine = frozen.schedule, frozen.refine
    index = schedule.num_levels * refine - 1 - runs.step if back else runs.step
    level = index // refine
    low = jnp.where(level == 0, 0, schedule.temperatures[level - 1])
    rise = (schedule.temperatures[level] - low) / refine
    plan = row(schedule, level)._replace(temperature=low + rise * (index % refine + 1).astype(rise.dtype))
    mode = resolved(frozen.mode, frozen.path, runs.positions[0])
    moved, _ = move_all(
        frozen.moves, key, frozen.path, plan, runs.positions, jnp.asarray(False), num_moves=1, mode=mode
    )
    factors = moved.log_ratios[-1] if back else runs.log_ratios
    # where the first ratio is minus infinity the weight stays zero, wherever the moves lead
    log_weights = jnp.where(runs.log_weights == -jnp.inf, -jnp.inf, runs.log_weights + rise * factors)
    return Runs(
        moved.positions[-1],
        log_weights,
        jnp.where(jnp.isnan(moved.log_ratios[-1]), -jnp.inf, moved.log_ratios[-1]),
        runs.step + 1,
        runs.num_undefined,
        runs.num_gradients + moved.num_gradients,
        runs.num_densities + moved.num_densities,
    )
