"""Populations of tempered SMC run to the target: a pilot that learns the schedule, and those that keep it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.algorithms import Algorithm
from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import PRNGKey
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.driver import run_until
from probinfer.smc.tempered import levels
from probinfer.smc.tempered.initial_distribution import STARTS, Start
from probinfer.smc.tempered.levels import Level, Settings, TemperedState
from probinfer.smc.tempered.schedule import Schedule, empty_schedule

__all__ = ["MAX_LEVELS", "Population", "child", "learn_schedule"]

MAX_LEVELS = 200


def learn_schedule(
    config: Any,
    found: Start,
    key: PRNGKey,
    progress: bool | str | None = None,
    checkpoint: Checkpoint | None = None,
) -> TemperedState:
    """Return the end of a pilot population, its schedule filled.

    Args:
        config: a ``Tempered``.
        found: where to start.
        key: random key.
        progress: a bar.
        checkpoint: where to keep checkpoints.

    Raises:
        NumericalError: all particles died, a log ratio of plus infinity, or the target was not reached.
    """
    pilot, _ = Population(config, found.path, progress, checkpoint).run(key, None, "pilot")
    if int(pilot.status) != Status.OK:
        raise NumericalError(
            f"all particles of the pilot died at level {int(pilot.level) + 1}: the likelihood is zero or undefined at "
            f"every one of {config.num_particles} draws ({int(pilot.num_undefined)} draws of the {STARTS[found.kind]} "
            f"undefined); {advice(int(pilot.status))}",
            Status.DEGENERATE_WEIGHTS,
        )
    if not pilot.temperature >= 1:
        raise NumericalError(
            f"the pilot reached the temperature {float(pilot.temperature):.2g} in {MAX_LEVELS} levels, not 1: the "
            f"target is too far from the {STARTS[found.kind]} they start from; give a prior nearer to it, "
            "rescale the problem, or lower ess_fraction",
            Status.MAX_ITERATIONS,
        )
    return pilot


class Population(NamedTuple):
    """One population after another: all share one compiled program."""

    config: Any
    path: Any
    progress: bool | str | None
    checkpoint: Checkpoint | None

    def run(self, key: PRNGKey, schedule: Schedule | None, name: str) -> tuple[TemperedState, Level]:
        """Run a population to the target; learn the schedule if none is given.

        Raises:
            NumericalError: a log ratio of plus infinity.
        """
        key_begin, key_levels = jax.random.split(key)
        algorithm = self.algorithm()
        learning = jnp.asarray(schedule is None)
        if schedule is None:
            dimension = sum(leaf.size for leaf in jax.tree.leaves(self.path.like))
            schedule = empty_schedule(dimension, MAX_LEVELS)
        state = levels.begin(
            algorithm, key_begin, schedule, learning, num_particles=self.config.num_particles
        )
        if np.any(np.isposinf(state.log_ratios)):
            raise NumericalError(
                f"the log likelihood, or log density over base density, is plus infinity at draws of the base law; "
                f"{advice(Status.NON_FINITE)}",
                Status.NON_FINITE,
            )
        state, history = run_until(
            key_levels,
            algorithm,
            state,
            levels.is_over,
            MAX_LEVELS,
            progress=bars.label(self.progress, name),
            collect=levels.record,
            checkpoint=child(self.checkpoint, name.replace(" ", "-")),
        )
        history.check()
        count = int(history.num_steps)
        return state, jax.tree.map(lambda values: np.asarray(values)[:count], history.records)

    def algorithm(self) -> Algorithm:
        """The algorithm that they run."""
        fraction = jnp.asarray(self.config.ess_fraction, jnp.result_type(float))
        return levels.tempering(
            self.path, Settings(fraction, self.config.moves, self.config.waste_free, self.config.mode)
        )


def child(checkpoint: Checkpoint | None, name: str) -> Checkpoint | None:
    """Return the checkpoint of a part of a run, None of None."""
    return None if checkpoint is None else checkpoint.child(name)
