"""NUTS and HMC as engines: start, warm up, draw, judge."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.algorithms import Algorithm
from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import PRNGKey, field, pytree
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

_LONGEST = 1000  # leapfrogs: where every chain takes so many in one transition, none has turned back


@pytree
class NUTS:
    """The no-U-turn sampler with everything learned in warm-up.

    The chains start where L-BFGS first meets the typical set, but not where the log density shows that there is no
    mass to speak of (``mcmc.starts``; ``info.starts_reason`` says what was dropped). They share metric and step size,
    and stop warming up as soon as the metric is good (``mcmc.warmup``). Nothing needs setting; the defaults suit up to
    some thousand dimensions.

    Args:
        num_warmup: the most warm-up steps of a chain; an easy target takes about 120. 0: no warm-up.
        num_draws: draws of a chain.
        num_chains: chains; two or more are needed for R-hat.
        metric: ``"auto"``, ``"diagonal"``, ``"low-rank"`` or ``"dense"``.
        target_acceptance: mean acceptance rate; raise it towards 1 where there are divergences.
        max_tree_depth: the most doublings of a trajectory.
        mode: chains one after another (``"map"``), vectorised (``"vmap"``), or as the device asks (``"auto"``).

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
        """Draw from the target.

        Args:
            key: random key.
            target: an exact target.
            progress: a bar; ``None`` means on a terminal.
            checkpoint: where to keep checkpoints; the same call continues from there to the same draws.

        Returns:
            The posterior; its ``info`` is an :class:`~probinfer.mcmc.MCMCInfo`.

        Raises:
            TypeError: not a key, not a target, or a minibatch target.
            NumericalError: no finite starting point, a chain became non-finite, or the density is improper and the
                warm-up shows it.

        Warns:
            ConvergenceWarning: the chains disagree or have too few effective draws, one transition in a thousand or
                more diverged, E-BFMI is below 0.3, one trajectory in twenty was cut off at ``max_tree_depth``, or the
                density is improper; or Ctrl-C left a part of the draws.
        """
        trajectories = Trajectories("nuts", self.max_tree_depth, self.mode)
        return _sample(key, target, self, trajectories, progress, checkpoint)


@pytree
class HMC:
    """Hamiltonian Monte Carlo with trajectories of jittered length.

    The length is a quarter period of the widest direction that the metric leaves, times a uniform number between
    1/2 and 3/2 that avoids resonances; like metric and step size it is learned in warm-up. Every chain costs the
    same, so on accelerators chains run in step.

    Args:
        num_warmup: the most warm-up steps of a chain.
        num_draws: draws of a chain.
        num_chains: chains.
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
    engine.check_counts(config, ("num_warmup", "num_draws", "num_chains"))
    if not isinstance(config.target_acceptance, (int, float, np.number)):
        raise TypeError(f"target_acceptance must be a number, got {config.target_acceptance!r}")
    if config.num_warmup < 0 or config.num_draws < 1 or config.num_chains < 1:
        raise ValueError(
            "expected num_warmup >= 0, num_draws >= 1 and num_chains >= 1, got "
            f"{config.num_warmup}, {config.num_draws} and {config.num_chains}"
        )
    if not 0 < config.target_acceptance < 1:
        raise ValueError(f"target_acceptance must lie between 0 and 1, got {config.target_acceptance}")
    metrics.allowed(config.metric, 1)
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
    engine.check(key, target, name)
    Checkpoint.check(checkpoint)
    key_init, key_warmup, key_draws = jax.random.split(key, 3)
    like = _candidates(key_init, target, config.num_chains)
    logdensity_fn = engine.exact_logdensity(target, like)
    state, chosen, algorithm = _start(logdensity_fn, engine.to_default_dtype(like), config, trajectories)
    loop = _Loop(config, algorithm, progress, checkpoint, None if target.prior is not None else logdensity_fn)
    with bars.task(name, None, bars.label(progress, name)):
        if config.num_warmup:
            state = _warm_up(key_warmup, loop, state)
        state = state._replace(remaining=jnp.asarray(config.num_draws, jnp.int32))
        state, history = loop.run(key_draws, state, config.num_draws, "draws")
        unfinished = engine.is_part(history) if history.interrupted else _check(history, state, loop)
    positions, info = engine.chains_first(history.filled())
    found = report.with_divergences(report.convergence(positions), info.diverging)
    verdict = _verdict(loop, found, info, state)
    if unfinished:
        said = f"{int(history.num_records)} of {config.num_draws} draws of a chain were made"
        verdict = Finding(*engine.part(said, verdict.status, verdict.details))
    found = found._replace(status=verdict.status)
    engine.warn(verdict.status, verdict.details, name, verdict.advised)
    return engine.finish(target, positions, like, _info(info, state.warmup, chosen, found))


class _Loop(NamedTuple):
    """One rule, one record and room for as many in all phases: they share one compiled program.

    ``doubtful`` is the log density, or None where a normalised prior shows that it can be integrated.
    """

    config: Any
    algorithm: Algorithm
    progress: bool | str | None
    checkpoint: Checkpoint | None
    doubtful: Any = None

    def run(
        self, key: PRNGKey, state: ChainsState, num_steps: int, phase: str, *, watched: bool = False
    ) -> tuple:
        """Run to the end of a phase, or, where it is watched, to a step in which no chain turned back."""
        return run_until(
            key,
            self.algorithm,
            state,
            jax.tree_util.Partial(_finished, jnp.asarray(watched)),
            num_steps,
            buffer_steps=max(self.config.num_warmup, self.config.num_draws),
            progress=bars.label(self.progress, phase),
            collect=_record,
            checkpoint=None if self.checkpoint is None else self.checkpoint.child(phase),
        )

    def improper(self, state: ChainsState, *, only_far: bool = False) -> str:
        """Why there is nothing to sample, if that is so."""
        if self.doubtful is None:
            return ""
        return tails.improper(self.doubtful, state.chains.position, only_far=only_far)


def _warm_up(key: PRNGKey, loop: _Loop, state: ChainsState) -> ChainsState:
    """Warm up; where all chains make the longest of trajectories, ask first whether there is anything to find.

    Raises:
        NumericalError: the density is improper, or a chain became non-finite.
    """
    num = loop.config.num_warmup
    state, history = loop.run(key, state, num, "warm-up", watched=True)
    _check(history, state, loop)
    if int(state.warmup.stage) != warmups.OVER:
        _refuse(loop, loop.improper(state, only_far=True))
        rest = num - int(state.warmup.index)
        state, history = loop.run(jax.random.fold_in(key, num), state, rest, "warm-up-2")
        _check(history, state, loop)
    return state


def _check(history: History, state: ChainsState, loop: _Loop) -> bool:
    """Raise if the run was stopped, and say so if that is because the density has no integral; else False."""
    if int(history.status) == Status.NON_FINITE:
        _refuse(loop, loop.improper(state))
    history.check()
    return False


def _refuse(loop: _Loop, found: str) -> None:
    if found:
        name, status = type(loop.config).__name__, Status.IMPROPER_DENSITY
        raise NumericalError(f"{name}: {found}; {advice(status)}", status)


def _verdict(loop: _Loop, found: report.Convergence, info: ChainsInfo, state: ChainsState) -> Finding:
    """The worst status, in words what it is about, and what to do."""
    config = loop.config
    findings: list[Finding | None] = []
    if int(found.status) != Status.OK:
        words = [report.explain(found, config.num_chains, info.diverging.shape[1], info.diverging)]
        if int(found.status) == Status.CHAINS_DISAGREE and config.num_chains > 1:
            words.append(energies.lagging_chain(info.energy))
        findings.append(Finding(Status(int(found.status)), ", ".join(word for word in words if word)))
    findings.append(energies.slow_energies(info.energy))
    if isinstance(config, NUTS):
        findings.append(energies.cut_trajectories(info.tree_depth, info.diverging, config.max_tree_depth))
    whole = combined(findings)
    if whole.status >= Status.CHAINS_DISAGREE:
        said = loop.improper(state)
        return Finding(Status.IMPROPER_DENSITY, said) if said else whole
    return whole


def _candidates(key: PRNGKey, target: Target, num_chains: int) -> Any:
    """Positions to climb from; those whose density is not finite are dropped with the hopeless ones.

    Raises:
        NumericalError: not one of them has a finite log density and gradient.
    """
    num = starts.CANDIDATES * num_chains
    positions, valid = starting_positions(key, target.logdensity_fn, target.draw_fn, target.start, num=num)
    return positions if valid.any() else target.init(key, num)  # which explains what is wrong


def _start(logdensity_fn, positions, config: Any, trajectories: Trajectories):
    dimension = flatten(positions).shape[1]
    warmup = warmups.WarmupConfig(
        jnp.asarray(metrics.allowed(config.metric, dimension)),
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
    found = chosen.climb
    metric = metrics.from_secants(found.moved, found.bent, warmup.candidates, warmup.rank)
    state = chains(logdensity_fn, trajectories, warmup).init(found.positions, metric)
    return state._replace(warmup=state.warmup._replace(num_gradients=found.num_gradients)), chosen


def _finished(watched: jax.Array, state: ChainsState, info: ChainsInfo) -> jax.Array:
    over = warmups.is_over(state.warmup) & (state.remaining == 0)
    return over | (watched & jnp.all(info.num_leapfrogs >= _LONGEST))


def _record(state: ChainsState, info: ChainsInfo) -> tuple[Any, ChainsInfo]:
    return state.chains.position, info


def _info(
    info: ChainsInfo, warmup: warmups.Warmup, chosen: starts.Starts, found: report.Convergence
) -> report.MCMCInfo:
    return report.MCMCInfo(
        **info._asdict(),
        step_size=warmup.step_size,
        metric=warmup.choice.metric,
        chosen=warmup.choice.chosen,
        metric_divergences=warmup.choice.divergences,
        num_warmup=warmup.index,
        num_warmup_gradients=warmup.num_gradients,
        num_dropped_starts=chosen.num_dropped,
        num_shared_starts=chosen.num_shared,
        num_restarts=warmup.num_restarts,
        deficits=warmup.deficits,
        **found._asdict(),
    )
