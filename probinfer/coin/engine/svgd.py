"""Coin SVGD as an engine, and the run that all particle engines share: start, stopping rule, polish and report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.coin.cloud.particles import ravel_particles
from probinfer.coin.cloud.views import diagnose_cloud, logdensity_in_cloud, positions_of
from probinfer.coin.cloud_descent import CloudInfo, CloudState
from probinfer.coin.engine import diagnostics, reports
from probinfer.coin.engine import polish as polishing
from probinfer.coin.engine.stopping import MonitoredCloud, has_settled, monitor_epochs
from probinfer.coin.engine.trajectories import empty_trajectory_report, run_trajectories
from probinfer.coin.stein_descent import svgd
from probinfer.core.algorithms import Algorithm
from probinfer.core.arguments import check_counts, check_key
from probinfer.core.errors import shortened
from probinfer.core.types import Array, PRNGKey, field, pytree
from probinfer.inference import engine, tails
from probinfer.inference.posterior import Posterior
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.driver import run_until
from probinfer.targets import Target

__all__ = ["SVGD", "check_particles", "sample_particles"]

_NUM_TAIL_STARTS = 8  # particles from which the tails of the density are tested


@pytree
class SVGD:
    """Stein variational gradient descent without a learning rate.

    The run stops when an epoch (steps 64 to 128, 128 to 256, ...) changed neither the direction nor the virial. Short
    trajectories from the particles then test whether the cloud represents its density: status and warning report how
    far they move it. A mode that no particle of the run ever visited is not detected. Separate modes keep the particles
    that came to them; the status reports shares that are wrong by a factor of 1.5. Minibatch targets are supported,
    with one batch per step for all particles, but without trajectories.

    Args:
        num_particles: None: enough to keep 95 % of the standard deviation in this dimension, from 100 to 2000.
        max_steps: maximal number of steps.
        polish: None; "hmc": ten trajectories per particle at the end, which correct a cloud that is too narrow; "nuts":
            the same with trajectories of adaptive length; "weights": Pareto-smoothed importance weights. For exact
            targets only.
        kernel: as in ``coin.svgd``, like ``geometry``, ``bet`` and ``bandwidth``.
    """

    num_particles: Any = field(static=True, default=None)
    max_steps: Any = field(static=True, default=2048)
    polish: Any = field(static=True, default=None)
    kernel: Any = field(default=None)
    geometry: Any = field(default=None)
    bet: Any = field(default=None)
    bandwidth: str = field(static=True, default="median")

    def __post_init__(self):
        """Check the settings.

        Raises:
            TypeError: A count is not an integer.
            ValueError: A count is out of range, or the polish is unknown.
        """
        check_particles(self)

    def sample(
        self,
        key: PRNGKey,
        target: Target,
        *,
        progress: bool | str | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Posterior:
        """Carry particles from ``target.init`` to the posterior of an exact or a stochastic target.

        Returns:
            A posterior of one chain, without a log evidence; its ``info`` is a ``ParticlesInfo``.

        Raises:
            TypeError: a minibatch target is to be polished.
            NumericalError: No particle has a finite log density, or the density is flat or improper and the cloud
                grew without limit.

        Warns:
            ConvergenceWarning: The cloud is too narrow or too wide or has not settled, trajectories move it, particles
                are lost, or the density is improper.
        """
        return sample_particles(self, self._algorithm, key, target, progress, checkpoint)

    def _algorithm(self, logdensity_fn: Any) -> Algorithm:
        return svgd(logdensity_fn, self.kernel, self.geometry, self.bet, bandwidth=self.bandwidth)


def check_particles(config: Any) -> None:
    """Refuse impossible settings of a particle engine.

    Args:
        config: the engine, with ``num_particles``, ``max_steps`` and ``polish``.

    Raises:
        TypeError: A count is not an integer.
        ValueError: A count is out of range, or the polish is unknown.
    """
    counts = ("max_steps",) if config.num_particles is None else ("num_particles", "max_steps")
    check_counts(config, counts)
    if config.num_particles is not None and config.num_particles < 2:
        raise ValueError(
            f"num_particles must be 2 or more, as distances set the scale, got {config.num_particles}; vi.MAP() finds "
            "the mode with one"
        )
    if config.max_steps < 1:
        raise ValueError(f"max_steps must be 1 or more, got {config.max_steps}")
    if config.polish is not None and config.polish not in polishing.POLISH_FNS:
        raise ValueError(
            f"polish must be None or one of {', '.join(polishing.POLISH_FNS)}, got {shortened(config.polish)}"
        )


def sample_particles(
    config: Any,
    make_algorithm: Callable[[Any], Algorithm],
    key: PRNGKey,
    target: Target,
    progress: bool | str | None,
    checkpoint: Checkpoint | None,
) -> Posterior:
    """Run an algorithm that ``descent`` made as an engine.

    Args:
        config: the engine, with ``num_particles``, ``max_steps`` and ``polish``.
        make_algorithm: returns the algorithm of a log density, by ``descent``.
        key: random key.
        target: exact or stochastic.
        progress: as in ``SVGD.sample``, like ``checkpoint`` and what is returned, raised and warned of.
        checkpoint: where to store checkpoints.
    """
    name = type(config).__name__
    check_key(key)
    if not isinstance(target, Target):
        engine.check_target(key, target, name)
    if target.stochastic and config.polish is not None:
        raise TypeError(
            f"{name}(polish={config.polish!r}) needs the exact log density, but this target estimates it from "
            "minibatches; use polish=None, or a target of all data"
        )
    Checkpoint.check(checkpoint)
    algorithm = make_algorithm(target.logdensity_fn)
    key_init, key_run, key_diagnose, key_polish = jax.random.split(key, 4)
    with bars.task(name, None, bars.label(progress, name)):
        # Run until the cloud has settled
        positions = target.init(key_init, _num_particles(config, target, key_init))
        monitored = monitor_epochs(algorithm)
        state, history = run_until(
            key_run,
            monitored,
            monitored.init(positions),
            has_settled,
            config.max_steps,
            progress=bars.label(progress, name),
            collect=_record,
            checkpoint=checkpoint,
        )
        if history.interrupted:
            engine.was_interrupted(history)  # clouds without a finite density are reported below

        # Diagnose and polish
        early = (ravel_particles(positions), state.epochs.early)
        final = _finish(algorithm, state.cloud, key_diagnose, key_polish, early, config.polish)

    # Report
    info = reports.build_info(state, history, final, config)
    reports.raise_if_failed(name, info)
    doubt = ""
    if not target.stochastic:
        # A cloud may settle on a density that decays too slowly to be integrable.
        tail_starts = jax.tree.map(lambda leaf: leaf[:_NUM_TAIL_STARTS], final.positions)
        status, doubt = tails.doubted(
            info.status, target.logdensity_fn, tail_starts, prior=target.prior, always=True
        )
        info = info._replace(status=status)
    engine.warn(info.status, doubt or reports.describe_status(info, final.trajectories, target), name)
    weighted = config.polish == "weights" or int(info.num_nonfinite)
    log_weights = final.log_weights[None] if weighted else None
    draws = jax.tree.map(lambda leaf: leaf[None], final.positions)
    return engine.finish(target, draws, draws, info, log_weights=log_weights)


def _num_particles(config: Any, target: Target, key: PRNGKey) -> int:
    """Return the number of particles, which depends on the dimension if it is not given."""
    if config.num_particles is not None:
        return config.num_particles
    candidate = target.candidates(key, 1)
    return diagnostics.particles_for(sum(leaf.size for leaf in jax.tree.leaves(candidate)))


def _record(state: MonitoredCloud, info: CloudInfo) -> tuple[Array, Array, Array]:
    return info.direction_norm, jnp.mean(info.virial), info.status


@partial(jax.jit, static_argnames="polish")
def _finish(
    algorithm: Algorithm,
    state: CloudState,
    key_diagnose: PRNGKey,
    key_polish: PRNGKey,
    early: tuple[Array, Array],
    polish: str | None,
) -> reports.FinalCloud:
    """Diagnose the cloud, polish it, and test the result by trajectories."""
    key_diagnose, key_test = jax.random.split(key_diagnose)
    cloud_diagnostics, scored, gradients_per_particle = diagnose_cloud(algorithm, key_diagnose, state)
    valid = scored.scores.valid
    report = empty_trajectory_report(state.z.shape[1], state.z.dtype)
    if polish is None:
        if not algorithm.step.args[0].stochastic:  # type: ignore[attr-defined]
            report = run_trajectories(key_test, algorithm, state, state.z, valid, early)
        return reports.FinalCloud(
            diagnostics=cloud_diagnostics,
            trajectories=report,
            positions=state.positions,
            log_weights=jnp.where(valid, 0, -jnp.inf).astype(state.z.dtype),
            acceptance=jnp.full((), jnp.nan, state.z.dtype),
            khat=jnp.full((), jnp.nan, state.z.dtype),
            num_nonfinite=jnp.sum(~valid),
            num_gradients=gradients_per_particle * len(valid) + report.num_gradients,
        )
    value_and_grad_fn = jax.value_and_grad(jax.tree_util.Partial(logdensity_in_cloud, algorithm, state))
    polished = polishing.POLISH_FNS[polish](key_polish, value_and_grad_fn, state.z, valid)
    if polish != "weights":
        report = run_trajectories(key_test, algorithm, state, polished.z, valid, early)
    return reports.FinalCloud(
        diagnostics=cloud_diagnostics,
        trajectories=report,
        positions=positions_of(algorithm, state, polished.z),
        log_weights=polished.log_weights,
        acceptance=polished.acceptance,
        khat=polished.khat,
        num_nonfinite=jnp.sum(~valid),
        num_gradients=len(valid) + polished.num_gradients + report.num_gradients,
    )
