"""A pilot population of parameters, which learns the settings that the engines for state-space models keep fixed."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import Array, Float, PRNGKey
from probinfer.numerics import covariance_factor, weights
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.driver import run_until
from probinfer.smc.parameters import parameter_particles
from probinfer.smc.parameters.likelihood import MAX_PARTICLES, choose_num_particles
from probinfer.smc.parameters.model import Parameters
from probinfer.smc.parameters.parameter_particles import ParameterPopulation, SMC2StepInfo
from probinfer.smc.tempered.populations import child_checkpoint

__all__ = ["Pilot", "learn_pilot", "run_population"]

_MIN_INITIAL_PARTICLES, _MAX_INITIAL_PARTICLES = 8, 512
_MIN_ACCEPTANCE = 0.2  # Chopin et al. (2013), section 3.6


class Pilot(NamedTuple):
    """Settings that a pilot learned.

    Attributes:
        population: after all observations.
        center: mean of the parameters.
        factor: of their covariance, (d, d) or (d,).
        num_particles: of a filter, a power of two.
        variance: of the log evidence at the center with this number of particles.
        num_filter_steps: observations times filters that the pilot used.
    """

    population: ParameterPopulation
    center: Float[Array, " d"]
    factor: Float[Array, "..."]
    num_particles: int
    variance: Float[Array, ""]
    num_filter_steps: float


def learn_pilot(
    key: PRNGKey,
    target: Parameters,
    num_parameters: int,
    progress: bool | str | None = None,
    checkpoint: Checkpoint | None = None,
) -> Pilot:
    """Run a learning population of parameters from the prior through all observations.

    The filters start with about T / 2 particles (the variance of a log evidence grows like T / N). The number is
    doubled whenever fewer than a fifth of the proposals are accepted.

    Args:
        key: random key.
        target: parameters and models.
        num_parameters: M.
        progress: a bar.
        checkpoint: where to keep checkpoints.

    Raises:
        NumericalError: the likelihood is zero or undefined at all parameters.
    """
    key_init, key_run, key_choose = jax.random.split(key, 3)
    schedule = parameter_particles.empty_schedule(target.num_steps, target.dimension)
    population = parameter_particles.init_population(
        key_init, target, schedule, jnp.asarray(True), num_parameters=num_parameters
    )
    # Run, with more state particles while the filters are too noisy
    num_particles = _initial_num_particles(target.num_steps)
    while True:
        key_run, key = jax.random.split(key_run)
        name = f"pilot, {num_particles} particles"
        population, _ = run_population(key, target, population, num_particles, name, progress, checkpoint)
        if not bool(population.needs_more_state_particles):
            break
        num_particles *= 2
    _check_alive(population, num_parameters)
    # Learn the proposal and the number of particles
    center = weights.mean(population.log_weights, population.positions)
    factor = covariance_factor.estimate(population.log_weights, population.positions)
    choice = choose_num_particles(key_choose, target, center, num_particles)
    return Pilot(
        population=population,
        center=center,
        factor=factor,
        num_particles=choice.num_particles,
        variance=choice.variance,
        num_filter_steps=float(population.num_filter_steps) + choice.num_filters * target.num_steps,
    )


def _initial_num_particles(num_steps: int) -> int:
    """Return the smallest power of two that is not below T / 2, within limits."""
    power_of_two = 2 ** (max(num_steps - 1, 1).bit_length() - 1)
    return min(max(power_of_two, _MIN_INITIAL_PARTICLES), _MAX_INITIAL_PARTICLES)


def _check_alive(population: ParameterPopulation, num_parameters: int) -> None:
    if int(population.status) == Status.OK:
        return
    raise NumericalError(
        f"the likelihood of the first {int(population.num_observed)} observations is zero or undefined at all of "
        f"{num_parameters} parameters ({int(population.num_undefined)} filters had a log weight of NaN or plus "
        f"infinity): {advice(Status.DEGENERATE_WEIGHTS)}",
        Status.DEGENERATE_WEIGHTS,
    )


def run_population(
    key: PRNGKey,
    target: Parameters,
    population: ParameterPopulation,
    num_particles: int,
    name: str,
    progress: bool | str | None,
    checkpoint: Checkpoint | None,
) -> tuple[ParameterPopulation, SMC2StepInfo]:
    """Give a population new filters and run it; return it with the records of its steps.

    Args:
        key: random key.
        target: parameters and models.
        population: of ``init_population``, or one that needs more state particles.
        num_particles: N.
        name: of the bar and the checkpoint.
        progress: a bar.
        checkpoint: where to keep checkpoints.

    Raises:
        NumericalError: a position became non-finite.
    """
    key_attach, key_steps = jax.random.split(key)
    population = parameter_particles.attach_filters(
        key_attach, target, population, num_particles=num_particles
    )
    # With the largest number of particles there is no use in stopping
    min_acceptance = _MIN_ACCEPTANCE if num_particles < MAX_PARTICLES else 0.0
    algorithm = parameter_particles.smc2_steps(
        target, jnp.asarray(min_acceptance, population.positions.dtype)
    )
    if int(population.status) != Status.OK:
        return population, _empty_record(population)
    population, history = run_until(
        key_steps,
        algorithm,
        population,
        parameter_particles.is_finished,
        target.num_steps,
        progress=bars.label(progress, name),
        collect=parameter_particles.record_info,
        checkpoint=child_checkpoint(checkpoint, name),
    )
    history.check()
    return population, history.filled()


def _empty_record(population: ParameterPopulation) -> SMC2StepInfo:
    """Return the record of a population that died before its first step."""
    dtype = population.positions.dtype
    return SMC2StepInfo(
        ess=jnp.zeros(0, dtype),
        num_moves=jnp.zeros(0, jnp.int32),
        acceptance=jnp.zeros((0, 2), dtype),
        log_evidence=jnp.zeros(0, dtype),
    )
