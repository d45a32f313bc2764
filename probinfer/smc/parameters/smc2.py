"""SMC^2 as an engine: parameters of a state-space model and an unbiased evidence with its error."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.arguments import check_counts
from probinfer.core.status import Status
from probinfer.core.types import Array, Float, Int, PRNGKey, PyTree, field, pytree
from probinfer.inference import engine
from probinfer.inference.findings import Finding, combined, undefined
from probinfer.inference.posterior import Posterior
from probinfer.mcmc import report
from probinfer.running import interrupts
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.smc import islands
from probinfer.smc.parameters import parameter_particles
from probinfer.smc.parameters.model import Parameters, check_parameters
from probinfer.smc.parameters.parameter_particles import ParameterPopulation, SMC2StepInfo
from probinfer.smc.parameters.pilot import Pilot, learn_pilot, run_population
from probinfer.smc.tempered.bridge import unflatten

__all__ = ["SMC2", "SMC2Info"]

_MIN_PARAMETERS = 32


class SMC2Info(NamedTuple):
    """Report of R islands of M parameters.

    Attributes:
        num_moves: of every parameter after each observation, as the pilot chose them.
        acceptance: shares of independent and of local proposals accepted; NaN if there were no moves.
        parameter_ess: effective sample sizes before the moves.
        log_evidences: of the islands.
        log_evidence_error: standard error of the log evidence.
        num_particles: of each filter, chosen so that the log evidence at a central parameter has a variance of about 1
            to 1.5.
        log_evidence_variance: that variance, as measured.
        num_undefined: filters with a log weight of NaN or plus infinity: their parameters have weight zero.
        num_filter_steps: observations times filters, the pilot included.
        rhat, ess, ess_tail: trees shaped like one unconstrained position; each island is a chain.
        status: ``OK``; ``CHAINS_DISAGREE``: R-hat, ESS or evidences of the islands; ``DEGENERATE_WEIGHTS``: all
            parameters of an island died; ``NON_FINITE``: one filter in a hundred is undefined.
    """

    num_moves: Int[Array, " T"]
    acceptance: Float[Array, "R T 2"]
    parameter_ess: Float[Array, "R T"]
    log_evidences: Float[Array, " R"]
    log_evidence_error: Float[Array, ""]
    num_particles: Int[Array, ""]
    log_evidence_variance: Float[Array, ""]
    num_undefined: Int[Array, ""]
    num_filter_steps: Float[Array, ""]
    rhat: PyTree
    ess: PyTree
    ess_tail: PyTree
    status: Status

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return an interval that contains the log evidence with this probability, see ``islands.interval``.

        Args:
            level: of the interval.
        """
        return islands.interval(np.asarray(self.log_evidences, float), level)


@pytree
class SMC2:
    r"""Parameters from the prior, each with a particle filter, weighed observation by observation and moved.

    A pilot population chooses when and how often to move, the proposals, and the number of state particles. All are
    then frozen, and R islands of M parameters run from the prior, one after another: their evidences are independent
    and unbiased, so the log of their mean comes with a standard error. Draws are weighted by the evidence of their
    island. Memory: M times N states of two generations.

    Args:
        num_parameters: M, the budget.
        num_islands: R, 2 or more.

    References:
        Chopin, Jacob and Papaspiliopoulos (2013), "SMC^2: an efficient algorithm for sequential analysis of
        state-space models".
    """

    num_parameters: int = field(static=True, default=256)
    num_islands: int = field(static=True, default=4)

    def __post_init__(self):
        """Check the settings.

        Raises:
            TypeError: a count is not an integer.
            ValueError: a count is out of range.
        """
        check_counts(self, ("num_parameters", "num_islands"))
        if self.num_islands < 2:
            raise ValueError(f"num_islands must be 2 or more, to be compared, got {self.num_islands}")
        if self.num_parameters < _MIN_PARAMETERS:
            raise ValueError(f"num_parameters must be {_MIN_PARAMETERS} or more, got {self.num_parameters}")

    def sample(
        self,
        key: PRNGKey,
        target: Parameters,
        *,
        progress: bool | str | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Posterior:
        """Draw parameters of ``smc.Parameters`` and estimate the evidence.

        Returns:
            A posterior with leading axes (island, parameter), weights and ``log_evidence``. Its ``info`` is an
            ``SMC2Info``.

        Raises:
            TypeError: not ``Parameters``.
            NumericalError: the likelihood is zero or undefined at all parameters of the pilot.

        Warns:
            ConvergenceWarning: the islands disagree, one of them died, or Ctrl-C ended the run after some of the
                islands.
        """
        check_parameters(key, target, "SMC2")
        Checkpoint.check(checkpoint)
        key_pilot, key_islands = jax.random.split(key)
        with bars.task("SMC2", None, bars.label(progress, "SMC2")):
            pilot = learn_pilot(key_pilot, target, self.num_parameters, progress, checkpoint)
            numbered_keys = enumerate(jax.random.split(key_islands, self.num_islands), 1)
            runs = interrupts.each(
                lambda item, _: _run_island(self, item[1], target, pilot, item[0], progress, checkpoint),
                numbered_keys,
            )
        return _posterior(self, target, pilot, runs)


def _run_island(
    config: SMC2,
    key: PRNGKey,
    target: Parameters,
    pilot: Pilot,
    number: int,
    progress: bool | str | None,
    checkpoint: Checkpoint | None,
) -> tuple[ParameterPopulation, SMC2StepInfo]:
    key_init, key_run = jax.random.split(key)
    population = parameter_particles.init_population(
        key_init,
        target,
        pilot.population.schedule,
        jnp.asarray(False),
        num_parameters=config.num_parameters,
    )
    name = f"island {number}"
    return run_population(key_run, target, population, pilot.num_particles, name, progress, checkpoint)


def _posterior(config: SMC2, target: Parameters, pilot: Pilot, runs: list) -> Posterior:
    populations, infos = zip(*runs)
    dtype = pilot.center.dtype
    dead = [int(population.status) != Status.OK for population in populations]
    log_evidences = np.asarray(
        [-np.inf if is_dead else float(info.log_evidence[-1]) for is_dead, info in zip(dead, infos)]
    )
    positions = unflatten(target.template, jnp.stack([population.positions for population in populations]))
    num_filter_steps = pilot.num_filter_steps + sum(
        float(population.num_filter_steps) for population in populations
    )
    num_undefined = sum(int(population.num_undefined) for population in (pilot.population, *populations))
    # Judge the islands
    convergence = report.convergence(positions, populations=True)
    undefined_filters = undefined(num_undefined, num_filter_steps / target.num_steps, "particle filters")
    verdict = combined([undefined_filters, _verdict(config, convergence, dead, log_evidences)])
    if len(runs) < config.num_islands:  # Ctrl-C
        finished = f"{len(runs)} of {config.num_islands} islands were finished"
        verdict = Finding(*engine.interrupted_part(finished, verdict.status, verdict.details))
    # Report
    info = SMC2Info(
        num_moves=pilot.population.schedule.num_moves,
        acceptance=islands.stack_padded([info.acceptance for info in infos], (target.num_steps, 2), dtype),
        parameter_ess=islands.stack_padded([info.ess for info in infos], (target.num_steps,), dtype),
        log_evidences=jnp.asarray(log_evidences, dtype),
        log_evidence_error=jnp.asarray(islands.log_mean_error(log_evidences), dtype),
        num_particles=jnp.int32(pilot.num_particles),
        log_evidence_variance=pilot.variance,
        num_undefined=jnp.int32(num_undefined),
        num_filter_steps=jnp.asarray(num_filter_steps, dtype),
        **convergence._replace(status=verdict.status)._asdict(),
    )
    engine.warn(verdict.status, verdict.details, "SMC2", verdict.advised)
    return engine.finish(
        target.target,
        positions,
        target.template,
        info,
        log_weights=islands.broadcast_log_weights(log_evidences, config.num_parameters, dtype),
        log_evidence=jnp.asarray(islands.log_mean(log_evidences), dtype),
    )


def _verdict(
    config: SMC2, convergence: report.Convergence, dead: list, log_evidences: np.ndarray
) -> Finding | None:
    """Return a finding if islands died or disagree."""
    if any(dead):
        details = f"all parameters of {sum(dead)} of {len(dead)} islands died"
        return Finding(Status.DEGENERATE_WEIGHTS, details)
    advised = f"raise num_parameters (it is {config.num_parameters})"
    return islands.disagreement(log_evidences, convergence, config.num_parameters, advised)
