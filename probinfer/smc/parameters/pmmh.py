r"""Particle marginal Metropolis-Hastings: a random walk over parameters that uses estimated likelihoods.

The state of the chain is parameters, estimate and path together. Its invariant distribution has exactly the posterior
of parameters and path as a marginal, whatever the number of particles: an estimate is kept until the next acceptance.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from probinfer.core.algorithms import algorithm
from probinfer.core.arguments import check_counts
from probinfer.core.status import Status
from probinfer.core.trees import map_or_vmap, select
from probinfer.core.types import Array, Bool, Float, Int, PRNGKey, PyTree, field, pytree
from probinfer.inference import engine, findings
from probinfer.inference.findings import Finding, combined
from probinfer.inference.posterior import Posterior
from probinfer.mcmc import report
from probinfer.numerics import covariance_factor
from probinfer.resampling import systematic
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.driver import run
from probinfer.smc.parameters.likelihood import estimate_likelihood
from probinfer.smc.parameters.model import Parameters, check_parameters, log_prior
from probinfer.smc.parameters.parameter_particles import ParameterPopulation
from probinfer.smc.parameters.pilot import Pilot, learn_pilot
from probinfer.smc.parameters.proposals import LOCAL_SCALE
from probinfer.smc.tempered.bridge import unflatten
from probinfer.smc.tempered.populations import child_checkpoint

__all__ = ["PMMH", "PMMHInfo", "PMMHState", "check_chains", "pmmh_step"]

_NUM_PILOT_PARAMETERS = 128
_MAX_NOISE = 10.0  # variance of the log evidence beyond which the target acceptance rate does not fall


class PMMHState(NamedTuple):
    r"""State of a chain.

    Attributes:
        position: :math:`\theta`, unconstrained.
        log_prior: :math:`\log p(\theta)`.
        log_evidence: :math:`\log\hat Z(\theta)`, the estimate of the last accepted proposal.
        path: a path of the same filter, leaves (T, ...), or None.
    """

    position: Float[Array, " d"]
    log_prior: Float[Array, ""]
    log_evidence: Float[Array, ""]
    path: PyTree


class PMMHInfo(NamedTuple):
    """Report of particle marginal Metropolis-Hastings.

    Attributes:
        acceptance: mean after the warm-up.
        log_evidences: the estimates that belong to the draws.
        num_particles: of each filter.
        log_evidence_variance: at a central parameter; the number of particles was chosen by it.
        scale: of the proposals, in units of the factor of the posterior covariance.
        paths: leaves (chain, draw, T, ...), one smoothed path a draw, or None.
        num_undefined: filters with a log weight of NaN or plus infinity; their proposals were rejected.
        num_filter_steps: observations times filters, pilot and warm-up included.
        rhat, ess, ess_tail: trees shaped like one unconstrained position.
        status: ``OK``, ``CHAINS_DISAGREE``, also if a chain accepted nothing, or ``NON_FINITE`` if one filter in a
            hundred is undefined.
    """

    acceptance: Float[Array, " chain"]
    log_evidences: Float[Array, "chain draw"]
    num_particles: Int[Array, ""]
    log_evidence_variance: Float[Array, ""]
    scale: Float[Array, ""]
    paths: PyTree
    num_undefined: Int[Array, ""]
    num_filter_steps: Float[Array, ""]
    rhat: PyTree
    ess: PyTree
    ess_tail: PyTree
    status: Status


class _PMMHChains(NamedTuple):
    """State of all chains: their states with leaves (chain, ...), and the common scale of the proposals."""

    states: PMMHState
    log_scale: Float[Array, ""]
    num_transitions: Int[Array, ""]


class _PMMHRecord(NamedTuple):
    """Record of one transition of all chains, leaves (chain, ...)."""

    position: Float[Array, "chain d"]
    log_evidence: Float[Array, " chain"]
    path: PyTree
    acceptance: Float[Array, " chain"]
    accepted: Bool[Array, " chain"]
    undefined: Bool[Array, " chain"]


@pytree
class _PMMHSettings:
    """Settings that do not change in a run."""

    factor: Any
    target_acceptance: Any
    num_warmup: Any
    num_particles: int = field(static=True)
    keep_paths: bool = field(static=True)
    mode: str = field(static=True)


@pytree
class PMMH:
    """Particle marginal Metropolis-Hastings with settings learned beforehand.

    A small run of ``SMC2`` gives the chains their starts, the covariance of the proposals, and the number of particles:
    the power of two for which the log evidence at a central parameter has a variance V of at most 1.5. The warm-up
    adapts the scale of the proposals to the best acceptance rate for this variance, 2 Phi(-sqrt(2.56^2 + 2 V) / 2);
    then it is frozen.

    Args:
        num_draws: draws of a chain, every state after the warm-up. A random walk needs many.
        num_chains: chains; two or more are needed for R-hat.
        num_warmup: transitions in which the scale is learned.
        keep_paths: keep one smoothed path a draw, ``info.paths``: chain times draw times T records, and about 50 %
            more work.
        mode: chains one after another ("map"), side by side ("vmap"), or whichever suits particle filters ("auto").

    References:
        Andrieu, Doucet and Holenstein (2010), section 4.4; Doucet, Pitt, Deligiannidis and Kohn (2015), the number of
        particles; Sherlock, Thiery, Roberts and Rosenthal (2015), scale and acceptance rate.
    """

    num_draws: int = field(static=True, default=5000)
    num_chains: int = field(static=True, default=4)
    num_warmup: int = field(static=True, default=500)
    keep_paths: bool = field(static=True, default=False)
    mode: str = field(static=True, default="auto")

    def __post_init__(self):
        """Check the settings.

        Raises:
            TypeError: a count is not an integer, or ``keep_paths`` is not a boolean.
            ValueError: a count or the mode is out of range.
        """
        check_chains(self)

    def sample(
        self,
        key: PRNGKey,
        target: Parameters,
        *,
        progress: bool | str | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Posterior:
        """Draw parameters of ``smc.Parameters``.

        Returns:
            The posterior; its ``info`` is a ``PMMHInfo``.

        Raises:
            TypeError: not ``Parameters``.
            NumericalError: the likelihood is zero or undefined at all parameters of the pilot.

        Warns:
            ConvergenceWarning: the chains disagree, have too few effective draws, one accepted nothing, or Ctrl-C
                ended the run early.
        """
        check_parameters(key, target, "PMMH")
        Checkpoint.check(checkpoint)
        key_pilot, key_start, key_run = jax.random.split(key, 3)
        with bars.task("PMMH", None, bars.label(progress, "PMMH")):
            pilot = learn_pilot(key_pilot, target, _NUM_PILOT_PARAMETERS, progress, checkpoint)
            settings = _settings(self, pilot)
            chains, history = run(
                key_run,
                algorithm(_given_chains, _step, target, settings),
                _init_chains(key_start, target, settings, pilot.population, self.num_chains),
                self.num_warmup + self.num_draws,
                progress=bars.label(progress, "draws"),
                collect=_record,
                checkpoint=child_checkpoint(checkpoint, "draws"),
            )
        if int(history.num_records) <= self.num_warmup:
            history.check()
        interrupted = engine.was_interrupted(history)
        return _posterior(self, target, pilot, chains, history.filled(), interrupted)


def check_chains(config: Any) -> None:
    """Check the settings of an engine with chains, a warm-up and paths.

    Raises:
        TypeError: a count is not an integer, or ``keep_paths`` is not a boolean.
        ValueError: a count or the mode is out of range.
    """
    check_counts(config, ("num_draws", "num_chains", "num_warmup"))
    if config.num_draws < 1 or config.num_chains < 1 or config.num_warmup < 20:
        raise ValueError(
            "expected num_draws >= 1, num_chains >= 1 and num_warmup >= 20, got "
            f"{config.num_draws}, {config.num_chains} and {config.num_warmup}"
        )
    if not isinstance(config.keep_paths, bool):
        raise TypeError(f"keep_paths must be True or False, got {config.keep_paths!r}")
    if config.mode not in ("auto", "map", "vmap"):
        raise ValueError(f"mode must be 'auto', 'map' or 'vmap', got {config.mode!r}")


def pmmh_step(
    key: PRNGKey,
    target: Parameters,
    state: PMMHState,
    factor: Float[Array, "..."],
    scale: Float[Array, ""],
    num_particles: int,
    keep_path: bool,
) -> tuple[PMMHState, Array, Array, Array]:
    r"""Propose a position near the current one and accept it by the estimated ratio of posterior densities.

    .. math:: \min\{1, p(\theta')\hat Z(\theta') / (p(\theta)\hat Z(\theta))\}

    Args:
        key: random key.
        target: parameters and models.
        state: of the chain.
        factor: of the covariance of the proposals.
        scale: of the proposals, in units of the factor.
        num_particles: N.
        keep_path: draw a path with every estimate.

    Returns:
        The next state, the acceptance probability, whether the proposal was accepted, and whether it was undefined.
    """
    key_step, key_filter, key_accept = jax.random.split(key, 3)
    # Propose
    normal = jax.random.normal(key_step, state.position.shape, state.position.dtype)
    position = state.position + scale * covariance_factor.apply(factor, normal)
    estimate = estimate_likelihood(key_filter, target, position, num_particles, keep_path)
    proposal = PMMHState(position, log_prior(target, position), estimate.log_evidence, estimate.path)
    # Accept or reject
    log_acceptance_ratio = proposal.log_prior + proposal.log_evidence - state.log_prior - state.log_evidence
    log_acceptance_ratio = jnp.where(jnp.isnan(log_acceptance_ratio), -jnp.inf, log_acceptance_ratio)
    uniform = jax.random.uniform(key_accept, (), log_acceptance_ratio.dtype)
    accepted = jnp.log(uniform) < log_acceptance_ratio
    state = select(accepted, proposal, state)
    return state, jnp.exp(jnp.minimum(log_acceptance_ratio, 0)), accepted, estimate.undefined


def _settings(config: PMMH, pilot: Pilot) -> _PMMHSettings:
    variance = min(float(pilot.variance), _MAX_NOISE)
    target_acceptance = 2 * stats.norm.cdf(-0.5 * np.sqrt(LOCAL_SCALE**2 + 2 * variance))
    return _PMMHSettings(
        factor=pilot.factor,
        target_acceptance=jnp.asarray(target_acceptance, pilot.center.dtype),
        num_warmup=jnp.int32(config.num_warmup),
        num_particles=pilot.num_particles,
        keep_paths=config.keep_paths,
        mode="vmap" if config.mode == "auto" else config.mode,
    )


@partial(jax.jit, static_argnames="num_chains")
def _init_chains(
    key: PRNGKey,
    target: Parameters,
    settings: _PMMHSettings,
    population: ParameterPopulation,
    num_chains: int,
) -> _PMMHChains:
    """Start chains at draws of the pilot. Their estimates there are finite, but the new ones may be minus infinity."""
    key_draw, key_filters = jax.random.split(key)
    chosen, _ = systematic(key_draw, population.log_weights, num_chains)
    positions = population.positions[chosen]

    def init_chain(key: Array, position: Array) -> PMMHState:
        estimate = estimate_likelihood(key, target, position, settings.num_particles, settings.keep_paths)
        return PMMHState(position, log_prior(target, position), estimate.log_evidence, estimate.path)

    states = map_or_vmap(init_chain, settings.mode, jax.random.split(key_filters, num_chains), positions)
    log_scale = jnp.log(jnp.asarray(LOCAL_SCALE / np.sqrt(target.dimension), positions.dtype))
    return _PMMHChains(states, log_scale, jnp.int32(0))


def _given_chains(target: Parameters, settings: _PMMHSettings, chains: _PMMHChains) -> _PMMHChains:
    return chains


def _step(
    target: Parameters, settings: _PMMHSettings, key: PRNGKey, chains: _PMMHChains
) -> tuple[_PMMHChains, _PMMHRecord]:
    """Move all chains; the warm-up adapts their common scale to their mean acceptance."""
    num_chains = chains.states.log_prior.shape[0]
    scale = jnp.exp(chains.log_scale)

    def step(key: Array, state: PMMHState) -> tuple:
        return pmmh_step(
            key, target, state, settings.factor, scale, settings.num_particles, settings.keep_paths
        )

    states, rates, accepted, undefined = map_or_vmap(
        step, settings.mode, jax.random.split(key, num_chains), chains.states
    )
    # Adapt by stochastic approximation (Robbins-Monro)
    num_transitions = chains.num_transitions + 1
    log_change = (num_transitions / 10 + 1.0) ** -0.6 * (jnp.mean(rates) - settings.target_acceptance)
    log_scale = jnp.where(
        num_transitions <= settings.num_warmup, chains.log_scale + log_change, chains.log_scale
    )
    record = _PMMHRecord(
        position=states.position,
        log_evidence=states.log_evidence,
        path=states.path,
        acceptance=rates,
        accepted=accepted,
        undefined=undefined,
    )
    return _PMMHChains(states, log_scale.astype(chains.log_scale.dtype), num_transitions), record


def _record(chains: _PMMHChains, record: _PMMHRecord) -> _PMMHRecord:
    del chains
    return record


def _posterior(
    config: PMMH,
    target: Parameters,
    pilot: Pilot,
    chains: _PMMHChains,
    records: _PMMHRecord,
    interrupted: bool,
) -> Posterior:
    num_undefined = jnp.sum(records.undefined, dtype=jnp.int32) + pilot.population.num_undefined
    records = engine.chains_first(jax.tree.map(lambda leaf: leaf[config.num_warmup :], records))
    positions = unflatten(target.template, records.position)
    # Judge the chains
    convergence = report.convergence(positions)
    num_draws = records.accepted.shape[1]
    num_proposals = config.num_chains * (config.num_warmup + num_draws)
    undefined = findings.undefined(num_undefined, num_proposals, "particle filters")
    verdict = combined([undefined, _verdict(config, convergence, records)])
    if interrupted:
        made = f"{num_draws} of {config.num_draws} draws of a chain were made"
        verdict = Finding(*engine.interrupted_part(made, verdict.status, verdict.details))
    # Report: each chain has one filter more than transitions, at its start
    num_filter_steps = target.num_steps * config.num_chains * (config.num_warmup + num_draws + 1)
    info = PMMHInfo(
        acceptance=jnp.mean(records.acceptance, axis=1),
        log_evidences=records.log_evidence,
        num_particles=jnp.int32(pilot.num_particles),
        log_evidence_variance=pilot.variance,
        scale=jnp.exp(chains.log_scale),
        paths=records.path,
        num_undefined=num_undefined,
        num_filter_steps=jnp.asarray(num_filter_steps + pilot.num_filter_steps, pilot.center.dtype),
        **convergence._replace(status=verdict.status)._asdict(),
    )
    engine.warn(verdict.status, verdict.details, "PMMH", verdict.advised)
    return engine.finish(target.target, positions, target.template, info)


def _verdict(config: PMMH, convergence: report.Convergence, records: _PMMHRecord) -> Finding | None:
    """Return a finding if a chain is stuck or the chains disagree."""
    advised = f"run more draws (num_draws is {config.num_draws})"
    stuck = ~np.any(np.asarray(records.accepted), axis=1)
    if stuck.any():
        details = f"{int(stuck.sum())} of {len(stuck)} chains accepted nothing"
        return Finding(Status.CHAINS_DISAGREE, details, advised)
    if int(convergence.status) == Status.OK:
        return None
    details = report.explain(convergence, config.num_chains, records.accepted.shape[1])
    return Finding(Status(int(convergence.status)), details, advised)
