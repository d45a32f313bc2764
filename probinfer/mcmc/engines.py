"""NUTS and HMC as engines: find starting points, warm up, draw, judge."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.algorithms import Algorithm
from probinfer.core.arguments import check_counts
from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import ArrayTree, PRNGKey, field, pytree
from probinfer.inference import engine, tails
from probinfer.inference.findings import Finding, combined
from probinfer.inference.posterior import Posterior
from probinfer.mcmc import energies, report
from probinfer.mcmc.adaptation import metric as metrics
from probinfer.mcmc.adaptation import starts
from probinfer.mcmc.adaptation import warmup as warmups
from probinfer.mcmc.ensemble import ChainsInfo, ChainsState, Trajectories, chains, flatten
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.driver import run_until
from probinfer.running.history import History
from probinfer.targets import Target
from probinfer.targets.starts import starting_positions

__all__ = ["HMC", "NUTS"]

_MAX_LEAPFROGS = 1000  # if every chain takes so many in one transition, none of them turns back


@pytree
class NUTS:
    """The no-U-turn sampler; step size and metric are learned in the warm-up.

    The chains start where L-BFGS first meets the typical set, but not in regions whose log density shows that their
    mass is negligible (``mcmc.adaptation.starts``; ``info.starts_reason`` says what was dropped). They share metric and
    step size, and the warm-up ends as soon as the metric is good (``mcmc.adaptation.warmup``). Nothing needs to be set;
    the defaults suit up to some thousand dimensions.

    Args:
        num_warmup: maximum number of warm-up steps of a chain; an easy target takes about 120. 0: no warm-up.
        num_draws: draws per chain.
        num_chains: number of chains; two or more are needed for R-hat.
        metric: ``"auto"``, ``"diagonal"``, ``"low-rank"`` or ``"dense"``.
        target_acceptance: mean acceptance rate; raise it towards 1 if there are divergences.
        max_tree_depth: maximum number of doublings of a trajectory.
        mode: chains one after another (``"map"``), vectorized (``"vmap"``), or as suits the device (``"auto"``).

    References:
        Hoffman and Gelman (2014); Betancourt (2017), appendix A; the transition is blackjax's.
    """

    num_warmup: int = field(static=True, default=1000)
    num_draws: int = field(static=True, default=1000)
    num_chains: int = field(static=True, default=4)
    metric: str = field(static=True, default="auto")
    target_acceptance: float = field(static=True, default=0.8)
    max_tree_depth: int = field(static=True, default=10)
    mode: str = field(static=True, default="auto")

    def __post_init__(self):
        """Check the settings."""
        _check_settings(self)

    def sample(
        self,
        key: PRNGKey,
        target: Target,
        *,
        progress: bool | str | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Posterior:
        """Draw from an exact target.

        Returns:
            The posterior; its ``info`` is an :class:`~probinfer.mcmc.MCMCInfo`.

        Raises:
            TypeError: a minibatch target.
            NumericalError: no finite starting point, a chain became non-finite, or the warm-up shows that the density
                is improper.

        Warns:
            ConvergenceWarning: the chains disagree or have too few effective draws, one transition in a thousand or
                more diverged, E-BFMI is below 0.3, one trajectory in twenty or more was cut off at ``max_tree_depth``,
                or the density is improper; or Ctrl-C ended the run early.
        """
        trajectories = Trajectories("nuts", self.max_tree_depth, self.mode)
        return _sample(key, target, self, trajectories, progress, checkpoint)


@pytree
class HMC:
    """Hamiltonian Monte Carlo with trajectories of jittered length.

    The length is a quarter period of the widest direction that the metric leaves, times a uniform number between
    1/2 and 3/2 to avoid resonances; like metric and step size it is learned in the warm-up. All chains cost the same,
    so on accelerators none waits for another.

    Args:
        num_warmup: maximum number of warm-up steps of a chain.
        num_draws: draws per chain.
        num_chains: number of chains.
        metric: ``"auto"``, ``"diagonal"``, ``"low-rank"`` or ``"dense"``.
        target_acceptance: mean acceptance rate.
        mode: as in :class:`NUTS`.

    References:
        Neal (2011), sections 4.2 and 5.4; the transition is blackjax's.
    """

    num_warmup: int = field(static=True, default=1000)
    num_draws: int = field(static=True, default=1000)
    num_chains: int = field(static=True, default=4)
    metric: str = field(static=True, default="auto")
    target_acceptance: float = field(static=True, default=0.8)
    mode: str = field(static=True, default="auto")

    def __post_init__(self):
        """Check the settings."""
        _check_settings(self)

    def sample(
        self,
        key: PRNGKey,
        target: Target,
        *,
        progress: bool | str | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Posterior:
        """Draw from the target; arguments, result and errors as in :meth:`NUTS.sample`."""
        return _sample(key, target, self, Trajectories("hmc", mode=self.mode), progress, checkpoint)


def _check_settings(config: Any) -> None:
    """Refuse impossible settings.

    Raises:
        TypeError: a count is not an integer, or the rate not a number.
        ValueError: a count, rate, metric or mode out of range.
    """
    check_counts(config, ("num_warmup", "num_draws", "num_chains"))
    if not isinstance(config.target_acceptance, (int, float, np.number)):
        raise TypeError(f"target_acceptance must be a number, got {config.target_acceptance!r}")
    if config.num_warmup < 0 or config.num_draws < 1 or config.num_chains < 1:
        raise ValueError(
            "expected num_warmup >= 0, num_draws >= 1 and num_chains >= 1, got "
            f"{config.num_warmup}, {config.num_draws} and {config.num_chains}"
        )
    if not 0 < config.target_acceptance < 1:
        raise ValueError(f"target_acceptance must lie between 0 and 1, got {config.target_acceptance}")
    metrics.allowed_metrics(config.metric, 1)
    if config.mode not in ("auto", "map", "vmap"):
        raise ValueError(f"mode must be 'auto', 'map' or 'vmap', got {config.mode!r}")


def _sample(
    key: PRNGKey,
    target: Target,
    config: Any,
    trajectories: Trajectories,
    progress: bool | str | None,
    checkpoint: Checkpoint | None,
) -> Posterior:
    name = type(config).__name__
    engine.check_target(key, target, name)
    Checkpoint.check(checkpoint)
    # Start
    key_init, key_warmup, key_draws = jax.random.split(key, 3)
    candidates = _candidates(key_init, target, config.num_chains)
    logdensity_fn = engine.exact_logdensity(target, candidates)
    state, chosen, algorithm = _start(
        logdensity_fn, engine.to_default_dtype(candidates), config, trajectories
    )
    # A normalized prior shows that the density has a finite integral: there is nothing to check
    unchecked_fn = None if target.prior is not None else logdensity_fn
    run = _SamplingRun(config, algorithm, progress, checkpoint, unchecked_fn)
    with bars.task(name, None, bars.label(progress, name)):
        # Warm up
        if config.num_warmup:
            state = _warm_up(key_warmup, run, state)
        # Draw
        state = state._replace(remaining=jnp.asarray(config.num_draws, jnp.int32))
        state, history = run.run_phase(key_draws, state, config.num_draws, "draws")
        unfinished = history.interrupted and engine.was_interrupted(history)
        if not history.interrupted:
            _check(history, state, run)
    # Judge
    positions, info = engine.chains_first(history.filled())
    verdict = report.with_divergences(report.convergence(positions), info.diverging)
    finding = _finding(run, verdict, info, state)
    if unfinished:
        progress_text = f"{int(history.num_records)} of {config.num_draws} draws per chain were made"
        finding = Finding(*engine.interrupted_part(progress_text, finding.status, finding.details))
    verdict = verdict._replace(status=finding.status)
    engine.warn(finding.status, finding.details, name, finding.advised)
    return engine.finish(target, positions, candidates, _info(info, state.warmup, chosen, verdict))


class _SamplingRun(NamedTuple):
    """Runs the phases of a sampler with one stopping rule, one record and one capacity, hence one compiled program.

    Attributes:
        config: the engine.
        algorithm: the chains.
        progress: as in ``NUTS.sample``.
        checkpoint: as in ``NUTS.sample``.
        unchecked_fn: the log density if its integral may be infinite, else None.
    """

    config: NUTS | HMC
    algorithm: Algorithm
    progress: bool | str | None
    checkpoint: Checkpoint | None
    unchecked_fn: Callable | None = None

    def run_phase(
        self, key: PRNGKey, state: ChainsState, num_steps: int, phase: str, *, stop_if_unturned: bool = False
    ) -> tuple[ChainsState, History]:
        """Run to the end of a phase or, with ``stop_if_unturned``, to a step in which no chain turned back."""
        return run_until(
            key,
            self.algorithm,
            state,
            jax.tree_util.Partial(_stops, jnp.asarray(stop_if_unturned)),
            num_steps,
            buffer_steps=max(self.config.num_warmup, self.config.num_draws),
            progress=bars.label(self.progress, phase),
            collect=_record,
            checkpoint=None if self.checkpoint is None else self.checkpoint.child(phase),
        )

    def why_improper(self, state: ChainsState, *, only_far: bool = False) -> str:
        """Explain why the density has no finite integral; empty if that was not found."""
        if self.unchecked_fn is None:
            return ""
        return tails.improper(self.unchecked_fn, state.chains.position, only_far=only_far)


def _warm_up(key: PRNGKey, run: _SamplingRun, state: ChainsState) -> ChainsState:
    """Warm up; pause at a step in which no chain turns back, to check whether the density is improper.

    Raises:
        NumericalError: the density is improper, or a chain became non-finite.
    """
    num_warmup = run.config.num_warmup
    state, history = run.run_phase(key, state, num_warmup, "warm-up", stop_if_unturned=True)
    _check(history, state, run)
    if int(state.warmup.stage) != warmups.FINISHED:
        _raise_if_improper(run, run.why_improper(state, only_far=True))
        remaining = num_warmup - int(state.warmup.num_steps)
        state, history = run.run_phase(jax.random.fold_in(key, num_warmup), state, remaining, "warm-up-2")
        _check(history, state, run)
    return state


def _check(history: History, state: ChainsState, run: _SamplingRun) -> None:
    """Raise an error if the run failed; if the density is improper, give that as the reason.

    Raises:
        NumericalError: a chain became non-finite.
    """
    if int(history.status) == Status.NON_FINITE:
        _raise_if_improper(run, run.why_improper(state))
    history.check()


def _raise_if_improper(run: _SamplingRun, reason: str) -> None:
    if reason:
        name, status = type(run.config).__name__, Status.IMPROPER_DENSITY
        raise NumericalError(f"{name}: {reason}; {advice(status)}", status)


def _finding(run: _SamplingRun, verdict: report.Convergence, info: ChainsInfo, state: ChainsState) -> Finding:
    """Return the worst status, what it is about, and what to do."""
    config = run.config
    findings: list[Finding | None] = []
    if int(verdict.status) != Status.OK:
        clauses = [report.explain(verdict, config.num_chains, info.diverging.shape[1], info.diverging)]
        if int(verdict.status) == Status.CHAINS_DISAGREE and config.num_chains > 1:
            clauses.append(energies.low_density_chain(info.energy))
        details = ", ".join(clause for clause in clauses if clause)
        findings.append(Finding(Status(int(verdict.status)), details))
    findings.append(energies.low_ebfmi(info.energy))
    if isinstance(config, NUTS):
        findings.append(
            energies.truncated_trajectories(info.tree_depth, info.diverging, config.max_tree_depth)
        )
    finding = combined(findings)
    # An improper density explains why chains disagree, and takes precedence
    if finding.status >= Status.CHAINS_DISAGREE:
        reason = run.why_improper(state)
        return Finding(Status.IMPROPER_DENSITY, reason) if reason else finding
    return finding


def _candidates(key: PRNGKey, target: Target, num_chains: int) -> ArrayTree:
    """Return positions to ascend from; those of non-finite density are dropped later, with those of negligible mass.

    Raises:
        NumericalError: none of them has a finite log density and gradient.
    """
    num = starts.CANDIDATES * num_chains
    positions, valid = starting_positions(key, target.logdensity_fn, target.draw_fn, target.start, num=num)
    return positions if valid.any() else target.init(key, num)  # raises and explains what is wrong


def _start(logdensity_fn, positions, config: Any, trajectories: Trajectories):
    dimension = flatten(positions).shape[1]
    warmup = warmups.WarmupConfig(
        jnp.asarray(metrics.allowed_metrics(config.metric, dimension)),
        jnp.asarray(config.target_acceptance, jnp.result_type(float)),
        config.num_warmup,
        metrics.default_rank(config.metric, dimension),
    )
    state, chosen = _first_state(config.num_chains, logdensity_fn, positions, warmup, trajectories)
    return state, chosen, chains(logdensity_fn, trajectories, warmup)


@functools.partial(jax.jit, static_argnums=0)
def _first_state(
    num_chains: int, logdensity_fn, positions, warmup: warmups.WarmupConfig, trajectories: Trajectories
) -> tuple[ChainsState, starts.Starts]:
    chosen = starts.choose(logdensity_fn, positions, num_chains, mode=trajectories.mode)
    ascent = chosen.ascent
    metric = metrics.from_secants(
        ascent.position_differences, ascent.gradient_differences, warmup.candidates, warmup.rank
    )
    state = chains(logdensity_fn, trajectories, warmup).init(ascent.positions, metric)
    return state._replace(warmup=state.warmup._replace(num_gradients=ascent.num_gradients)), chosen


def _stops(stop_if_unturned: jax.Array, state: ChainsState, info: ChainsInfo) -> jax.Array:
    finished = warmups.is_finished(state.warmup) & (state.remaining == 0)
    return finished | (stop_if_unturned & jnp.all(info.num_leapfrogs >= _MAX_LEAPFROGS))


def _record(state: ChainsState, info: ChainsInfo) -> tuple[ArrayTree, ChainsInfo]:
    return state.chains.position, info


def _info(
    info: ChainsInfo, warmup: warmups.Warmup, chosen: starts.Starts, verdict: report.Convergence
) -> report.MCMCInfo:
    return report.MCMCInfo(
        **info._asdict(),
        step_size=warmup.step_size,
        metric=warmup.choice.metric,
        chosen=warmup.choice.chosen,
        metric_divergences=warmup.choice.divergences,
        num_warmup=warmup.num_steps,
        num_warmup_gradients=warmup.num_gradients,
        num_dropped_starts=chosen.num_dropped,
        num_shared_starts=chosen.num_shared,
        num_restarts=warmup.num_restarts,
        deficits=warmup.deficits,
        **verdict._asdict(),
    )
