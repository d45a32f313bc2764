"""NUTS and HMC as engines: start, warm up, draw, judge."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer import engine
from probinfer import progress as bars
from probinfer.base import Status
from probinfer.checkpoint import Checkpoint
from probinfer.mcmc import metric as metrics
from probinfer.mcmc import report, starts
from probinfer.mcmc import warmup as warmups
from probinfer.mcmc.ensemble import ChainsInfo, ChainsState, Trajectories, chains, flatten
from probinfer.posterior import Posterior
from probinfer.run import run_until
from probinfer.targets import Target
from probinfer.targets.starts import starting_positions
from probinfer.types import PRNGKey, field, pytree

__all__ = ["HMC", "NUTS"]


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
            NumericalError: no finite starting point, or a chain became non-finite.

        Warns:
            ConvergenceWarning: the chains disagree or have too few effective draws, or one transition in a thousand
                or more diverged; or Ctrl-C left a part of the draws.
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
    room = max(config.num_warmup, config.num_draws)
    with bars.task(name, None, bars.label(progress, name)):
        for phase, phase_key, draws in (("warm-up", key_warmup, 0), ("draws", key_draws, config.num_draws)):
            if phase == "warm-up" and config.num_warmup == 0:
                continue
            # One rule, one record and one length for both phases: they share one compiled program.
            state = state._replace(remaining=jnp.asarray(draws, jnp.int32))
            state, history = run_until(
                phase_key,
                algorithm,
                state,
                _finished,
                room,
                progress=bars.label(progress, phase),
                collect=_record,
                checkpoint=None if checkpoint is None else checkpoint.child(phase),
            )
            unfinished = bool(draws) and engine.is_part(history)
            if not unfinished:
                history.check()
    positions, info = engine.chains_first(history.filled())
    found = report.with_divergences(report.convergence(positions), info.diverging)
    if unfinished or int(found.status) != Status.OK:
        count = int(history.num_records)
        details = report.explain(found, config.num_chains, count, info.diverging)
        if unfinished:
            said = f"{count} of {config.num_draws} draws of a chain were made"
            status, details = engine.part(said, found.status, details)
            found = found._replace(status=jnp.int32(status))
        engine.warn(found.status, details, name)
    return engine.finish(target, positions, like, _info(info, state.warmup, chosen, found))


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


def _finished(state: ChainsState, info: ChainsInfo) -> jax.Array:
    del info
    return warmups.is_over(state.warmup) & (state.remaining == 0)


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
        **found._asdict(),
    )
