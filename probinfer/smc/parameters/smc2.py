"""SMC^2 as an engine: parameters of a state-space model and an unbiased evidence with its error."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.status import Status
from probinfer.core.types import PRNGKey, field, pytree
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
from probinfer.smc.parameters.pilot import Pilot, learn_pilot, run_population
from probinfer.smc.tempered.bridge import unflatten

__all__ = ["SMC2", "SMC2Info"]

_LEAST = 32


class SMC2Info(NamedTuple):
    """Report of R islands of M parameters.

    ``num_moves`` (T,): moves of every parameter after each observation, as the pilot chose them. By island:
    ``acceptance`` (R, T, 2), shares of independent and of local proposals accepted, NaN where nothing moved;
    ``parameter_ess`` (R, T), effective sample sizes before the moves; ``log_evidences`` (R,).
    ``log_evidence_error`` is the standard error of the log evidence. ``num_particles`` of each filter, chosen so that
    the log evidence at a central parameter has a variance of about 1 to 1.5: ``log_evidence_variance`` as measured.
    ``num_undefined`` counts filters with a log weight of NaN or plus infinity: those parameters get no weight.
    ``num_filter_steps`` counts observations times filters, the pilot included. ``rhat``, ``ess`` and ``ess_tail`` are
    trees shaped like one unconstrained position; each island is a chain. ``status`` is ``OK``; ``CHAINS_DISAGREE``:
    R-hat, ESS or evidences of the islands; ``DEGENERATE_WEIGHTS``: all parameters of an island died; ``NON_FINITE``:
    one filter in a hundred is undefined.
    """

    num_moves: Any
    acceptance: Any
    parameter_ess: Any
    log_evidences: Any
    log_evidence_error: Any
    num_particles: Any
    log_evidence_variance: Any
    num_undefined: Any
    num_filter_steps: Any
    rhat: Any
    ess: Any
    ess_tail: Any
    status: Any

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Between which the log evidence lies with this probability: the hull of two readings (t, lognormal).

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
            ValueError: a count out of range.
        """
        engine.check_counts(self, ("num_parameters", "num_islands"))
        if self.num_islands < 2:
            raise ValueError(f"num_islands must be 2 or more, to be compared, got {self.num_islands}")
        if self.num_parameters < _LEAST:
            raise ValueError(f"num_parameters must be {_LEAST} or more, got {self.num_parameters}")

    def sample(
        self,
        key: PRNGKey,
        target: Parameters,
        *,
        progress: bool | str | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Posterior:
        """Draw parameters and estimate the evidence.

        Args:
            key: random key.
            target: ``smc.Parameters``.
            progress: a bar; ``None`` means on a terminal.
            checkpoint: where to keep checkpoints; the same call continues from there to the same draws.

        Returns:
            A posterior with leading axes (island, parameter), weights and ``log_evidence``. Its ``info`` is an
            ``SMC2Info``.

        Raises:
            TypeError: not a key, or not ``Parameters``.
            NumericalError: the likelihood is zero or undefined at all parameters of the pilot.

        Warns:
            ConvergenceWarning: the islands disagree, or one of them died; or Ctrl-C left some of the islands.
        """
        check_parameters(key, target, "SMC2")
        Checkpoint.check(checkpoint)
        key_pilot, key_islands = jax.random.split(key)
        with bars.task("SMC2", None, bars.label(progress, "SMC2")):
            pilot = learn_pilot(key_pilot, target, self.num_parameters, progress, checkpoint)
            keys = enumerate(jax.random.split(key_islands, self.num_islands))
            runs = interrupts.each(
                lambda one, _: _island(self, one[1], target, pilot, one[0], progress, checkpoint), keys
            )
        return _posterior(self, target, pilot, runs)


def _island(config: SMC2, key: PRNGKey, target: Parameters, pilot: Pilot, number: int, *loop: Any) -> tuple:
    key_begin, key_run = jax.random.split(key)
    plan, frozen = pilot.population.plan, jnp.asarray(False)
    population = parameter_particles.begin(key_begin, target, plan, frozen, num=config.num_parameters)
    return run_population(key_run, target, population, pilot.num_particles, f"island {number + 1}", *loop)


def _posterior(config: SMC2, target: Parameters, pilot: Pilot, runs: list) -> Posterior:
    populations, steps = zip(*runs)
    dtype = pilot.centre.dtype
    dead = [int(population.status) != Status.OK for population in populations]
    logs = np.asarray([-np.inf if lost else float(step.log_evidence[-1]) for lost, step in zip(dead, steps)])
    positions = unflatten(target.like, jnp.stack([population.positions for population in populations]))
    judged = report.convergence(positions, populations=True)
    spent = pilot.num_filter_steps + sum(float(population.num_filter_steps) for population in populations)
    num_undefined = sum(int(population.num_undefined) for population in (pilot.population, *populations))
    broken = undefined(num_undefined, spent / target.num_steps, "particle filters")
    verdict = combined([broken, _verdict(config, judged, dead, logs)])
    if len(runs) < config.num_islands:  # Ctrl-C
        said = f"{len(runs)} of {config.num_islands} islands were finished"
        verdict = Finding(*engine.part(said, verdict.status, verdict.details))
    info = SMC2Info(
        num_moves=pilot.population.plan.num_moves,
        acceptance=_padded([step.acceptance for step in steps], (target.num_steps, 2), dtype),
        parameter_ess=_padded([step.ess for step in steps], (target.num_steps,), dtype),
        log_evidences=jnp.asarray(logs, dtype),
        log_evidence_error=jnp.asarray(islands.log_mean_error(logs), dtype),
        num_particles=jnp.int32(pilot.num_particles),
        log_evidence_variance=pilot.variance,
        num_undefined=jnp.int32(num_undefined),
        num_filter_steps=jnp.asarray(spent, dtype),
        **judged._replace(status=verdict.status)._asdict(),
    )
    engine.warn(verdict.status, verdict.details, "SMC2", verdict.advised)
    return engine.finish(
        target.target,
        positions,
        target.like,
        info,
        log_weights=jnp.broadcast_to(jnp.asarray(logs, dtype)[:, None], (len(logs), config.num_parameters)),
        log_evidence=jnp.asarray(islands.log_mean(logs), dtype),
    )


def _padded(rows: list, shape: tuple[int, ...], dtype: Any) -> Any:
    full = np.full((len(rows), *shape), np.nan, dtype)
    for row, values in zip(full, rows):
        row[: len(values)] = values
    return jnp.asarray(full)


def _verdict(config: SMC2, judged: report.Convergence, dead: list, logs: np.ndarray) -> Finding | None:
    """What is wrong with the islands, if anything is."""
    more = f"raise num_parameters (it is {config.num_parameters})"
    if any(dead):
        words = f"all parameters of {sum(dead)} of {len(dead)} islands died"
        return Finding(Status.DEGENERATE_WEIGHTS, words)
    if islands.shares(logs) < len(logs) / 2:
        words = (
            f"the evidences of the islands differ too much (logs {np.min(logs):.1f} to {np.max(logs):.1f})"
        )
        return Finding(Status.CHAINS_DISAGREE, words, more)
    if int(judged.status) == Status.OK:
        return None
    words = report.explain(judged, len(logs), config.num_parameters, plural="islands")
    return Finding(Status(int(judged.status)), words, more)
