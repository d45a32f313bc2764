"""A first population of parameters, which learns what the engines for state-space models keep fixed afterwards."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import Array, PRNGKey
from probinfer.numerics import weights
from probinfer.numerics.covariance_factor import root_of
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.driver import run_until
from probinfer.smc.parameters import parameter_particles
from probinfer.smc.parameters.likelihood import MOST_PARTICLES, choose_particles
from probinfer.smc.parameters.model import Parameters
from probinfer.smc.parameters.parameter_particles import Population, Step

__all__ = ["Pilot", "learn_pilot", "run_population"]

_FEWEST, _MOST = 8, 512  # state particles to start with
_LEAST_ACCEPTANCE = 0.2  # Chopin et al. (2013), section 3.6


class Pilot(NamedTuple):
    """What was learned.

    ``population`` after all observations; ``centre`` (d,) and ``root`` of the covariance; ``num_particles`` of a state,
    a power of two, with which the log evidence at the centre has the ``variance``; ``num_filter_steps`` spent,
    observations times filters.
    """

    population: Population
    centre: Array
    root: Array
    num_particles: int
    variance: Array
    num_filter_steps: float


def learn_pilot(
    key: PRNGKey,
    target: Parameters,
    num: int,
    progress: bool | str | None = None,
    checkpoint: Checkpoint | None = None,
) -> Pilot:
    """Run a learning population of parameters from the prior through all observations.

    The filters start with about T / 2 particles (the variance of a log evidence grows like T / N), and get twice as
    many whenever fewer than a fifth of the proposals are accepted.

    Args:
        key: random key.
        target: parameters and models.
        num: parameters in the population.
        progress: a bar.
        checkpoint: where to keep checkpoints.

    Raises:
        NumericalError: the likelihood is zero or undefined at all parameters.
    """
    key_begin, key_run, key_choose = jax.random.split(key, 3)
    plan = parameter_particles.empty_plan(target.num_steps, target.dimension)
    population = parameter_particles.begin(key_begin, target, plan, jnp.asarray(True), num=num)
    num_particles = _first_number(target.num_steps)
    while True:
        key_run, key = jax.random.split(key_run)
        name = f"pilot, {num_particles} particles"
        population, _ = run_population(key, target, population, num_particles, name, progress, checkpoint)
        if not bool(population.crowded):
            break
        num_particles *= 2
    _check_alive(population, num)
    centre = weights.mean(population.log_weights, population.positions)
    root = root_of(population.log_weights, population.positions)
    chosen = choose_particles(key_choose, target, centre, num_particles)
    spent = float(population.num_filter_steps) + chosen.num_filters * target.num_steps
    return Pilot(population, centre, root, chosen.num_particles, chosen.variance, spent)


def _first_number(num_steps: int) -> int:
    """The power of two next to T / 2 from above, within limits."""
    return min(max(2 ** (max(num_steps - 1, 1).bit_length() - 1), _FEWEST), _MOST)


def _check_alive(population: Population, num: int) -> None:
    if int(population.status) == Status.OK:
        return
    raise NumericalError(
        f"the likelihood of the first {int(population.num_seen)} observations is zero or undefined at all of {num} "
        f"parameters ({int(population.num_undefined)} filters had a log weight of NaN or plus infinity): "
        f"{advice(Status.DEGENERATE_WEIGHTS)}",
        Status.DEGENERATE_WEIGHTS,
    )


def run_population(
    key: PRNGKey,
    target: Parameters,
    population: Population,
    num_particles: int,
    name: str,
    progress: bool | str | None,
    checkpoint: Checkpoint | None,
) -> tuple[Population, Step]:
    """Give a population filters of so many particles and run it; returns it with what its steps did.

    Args:
        key: random key.
        target: parameters and models.
        population: of ``begin``, or one that is crowded.
        num_particles: N.
        name: of the bar and the checkpoint.
        progress: a bar.
        checkpoint: where to keep checkpoints.

    Raises:
        NumericalError: a position became non-finite.
    """
    key_attach, key_steps = jax.random.split(key)
    population = parameter_particles.attach(key_attach, target, population, num_particles=num_particles)
    least = _LEAST_ACCEPTANCE if num_particles < MOST_PARTICLES else 0.0
    algorithm = parameter_particles.smc2(target, jnp.asarray(least, population.positions.dtype))
    if int(population.status) != Status.OK:
        return population, empty_steps(population)
    population, history = run_until(
        key_steps,
        algorithm,
        population,
        parameter_particles.is_over,
        target.num_steps,
        progress=bars.label(progress, name),
        collect=parameter_particles.record,
        checkpoint=None
        if checkpoint is None
        else checkpoint.child(name.replace(", ", "-").replace(" ", "-")),
    )
    history.check()
    return population, history.filled()


def empty_steps(population: Population) -> Any:
    """The record of a population that died at once."""
    none = jnp.zeros(0, population.positions.dtype)
    return Step(none, jnp.zeros(0, jnp.int32), jnp.zeros((0, 2), none.dtype), none)
