"""Populations of tempered SMC run to the target: a pilot that learns the schedule, and islands that follow it."""

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
from probinfer.smc.tempered.initial_distribution import InitialDistribution
from probinfer.smc.tempered.levels import LevelInfo, TemperedState, TemperingSettings
from probinfer.smc.tempered.schedule import Schedule, empty_schedule

__all__ = ["MAX_LEVELS", "PopulationRunner", "child_checkpoint", "learn_schedule"]

MAX_LEVELS = 200


def learn_schedule(
    config: Any,
    initial: InitialDistribution,
    key: PRNGKey,
    progress: bool | str | None = None,
    checkpoint: Checkpoint | None = None,
) -> TemperedState:
    """Run a pilot population and return its last state, which holds the schedule that it chose.

    Args:
        config: a ``Tempered``.
        initial: distribution to start from.
        key: random key.
        progress: a bar.
        checkpoint: where to keep checkpoints.

    Raises:
        NumericalError: all particles died, a log ratio is plus infinity, or the target was not reached.
    """
    pilot, _ = PopulationRunner(config, initial.bridge, progress, checkpoint).run(key, None, "pilot")
    if int(pilot.status) != Status.OK:
        raise NumericalError(
            f"all particles of the pilot died at level {int(pilot.num_levels) + 1}: the likelihood is zero or "
            f"undefined at every one of {config.num_particles} draws ({int(pilot.num_undefined)} draws of the "
            f"{initial.name} undefined); {advice(int(pilot.status))}",
            Status.DEGENERATE_WEIGHTS,
        )
    if not pilot.temperature >= 1:
        raise NumericalError(
            f"the pilot reached the temperature {float(pilot.temperature):.2g} in {MAX_LEVELS} levels, not 1: the "
            f"target is too far from the {initial.name} that the particles start from; give a prior nearer to it, "
            "rescale the problem, or lower ess_fraction",
            Status.MAX_ITERATIONS,
        )
    return pilot


class PopulationRunner(NamedTuple):
    """Runs one population after another; all share one compiled program.

    Attributes:
        config: a ``Tempered``.
        bridge: from the initial distribution to the target.
        progress: a bar.
        checkpoint: where to keep checkpoints.
    """

    config: Any
    bridge: Any
    progress: bool | str | None
    checkpoint: Checkpoint | None

    def run(self, key: PRNGKey, schedule: Schedule | None, name: str) -> tuple[TemperedState, LevelInfo]:
        """Run a population to the target; learn the schedule if none is given.

        Raises:
            NumericalError: a log ratio is plus infinity.
        """
        key_init, key_levels = jax.random.split(key)
        algorithm = self.algorithm()
        learning = jnp.asarray(schedule is None)
        if schedule is None:
            dimension = sum(leaf.size for leaf in jax.tree.leaves(self.bridge.template))
            schedule = empty_schedule(dimension, MAX_LEVELS)
        # Sample the initial distribution
        state = levels.init_population(
            algorithm, key_init, schedule, learning, num_particles=self.config.num_particles
        )
        if np.any(np.isposinf(state.log_ratios)):
            raise NumericalError(
                f"the log likelihood, or log density over initial density, is plus infinity at draws of the initial "
                f"distribution; {advice(Status.NON_FINITE)}",
                Status.NON_FINITE,
            )
        # Temper
        state, history = run_until(
            key_levels,
            algorithm,
            state,
            levels.is_finished,
            MAX_LEVELS,
            progress=bars.label(self.progress, name),
            collect=levels.record_info,
            checkpoint=child_checkpoint(self.checkpoint, name),
        )
        history.check()
        num_levels = int(history.num_steps)
        return state, jax.tree.map(lambda values: np.asarray(values)[:num_levels], history.records)

    def algorithm(self) -> Algorithm:
        """Return the algorithm that the populations run."""
        settings = TemperingSettings(
            ess_fraction=jnp.asarray(self.config.ess_fraction, jnp.result_type(float)),
            moves=self.config.moves,
            waste_free=self.config.waste_free,
            mode=self.config.mode,
        )
        return levels.tempering(self.bridge, settings)


def child_checkpoint(checkpoint: Checkpoint | None, name: str) -> Checkpoint | None:
    """Return the checkpoint of a part of a run, or None if there are no checkpoints.

    Args:
        checkpoint: of the run.
        name: of the part, as its progress bar shows it.
    """
    return None if checkpoint is None else checkpoint.child(name.replace(", ", "-").replace(" ", "-"))
