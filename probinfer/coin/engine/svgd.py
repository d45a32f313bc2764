"""Coin samplers as engines: a number of particles, a rule when to stop, a verdict on what came out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.coin.cloud import table
from probinfer.coin.cloud.views import judged, logdensity_in_cloud, positions_of
from probinfer.coin.cloud_descent import CloudInfo, CloudState
from probinfer.coin.engine import diagnostics, reports
from probinfer.coin.engine import polish as polishing
from probinfer.coin.engine.stopping import Watched, has_settled, watched
from probinfer.coin.engine.trajectories import blank, tried
from probinfer.coin.stein_descent import svgd
from probinfer.core.algorithms import Algorithm
from probinfer.core.errors import check_key, shortened
from probinfer.core.types import Array, PRNGKey, field, pytree
from probinfer.inference import engine, tails
from probinfer.inference.posterior import Posterior
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.driver import run_until
from probinfer.targets import Target

__all__ = ["SVGD", "check_particles", "sample_particles"]

_PLACES = 8  # particles from which the tails are looked at


@pytree
class SVGD:
    """Stein variational gradient descent without a learning rate.

    The run ends where an epoch (steps 64 to 128, 128 to 256, ...) changed neither the direction nor the virial. Then
    short trajectories from the particles tell whether the cloud stands for its density: its status and its warning say
    by how much they move it. A mode that no particle of the run ever visited is not seen. Modes far apart keep the
    shares of particles that came to them; the status says where these are not theirs by a factor of 1.5. Minibatch
    targets run too: one batch a step for all particles, without trajectories.

    Args:
        num_particles: None: enough to keep 95 % of the standard deviation in as many dimensions, 100 to 2000.
        max_steps: the most steps.
        polish: None; "hmc": ten trajectories a particle at the end, which mend a cloud that is too narrow; "nuts": as
            long as they have to be; "weights": Pareto-smoothed importance weights (exact targets only).
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
            TypeError: a count is not an integer.
            ValueError: a count out of range, or an unknown polish.
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
        """Carry particles from ``target.init`` to the posterior.

        Args:
            key: random key.
            target: exact or stochastic.
            progress: a bar; ``None`` means on a terminal.
            checkpoint: where to keep checkpoints; the same call continues from there to the same particles.

        Returns:
            A posterior of one chain, without a log evidence; its ``info`` is a ``ParticlesInfo``.

        Raises:
            TypeError: not a key or not a target; ``polish`` of a minibatch target.
            NumericalError: no particle has a finite log density, or the density is flat or improper and the cloud
                grew without limit.

        Warns:
            ConvergenceWarning: the cloud is too narrow or too wide, trajectories move it, had not settled, particles
                were lost, or the density is improper.
        """
        return sample_particles(self, self._algorithm, key, target, progress, checkpoint)

    def _algorithm(self, logdensity_fn: Any) -> Algorithm:
        return svgd(logdensity_fn, self.kernel, self.geometry, self.bet, bandwidth=self.bandwidth)


def check_particles(config: Any) -> None:
    """Refuse impossible settings of an engine of particles.

    Args:
        config: with ``num_particles``, ``max_steps`` and ``polish``.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count out of range, or an unknown polish.
    """
    counts = ("max_steps",) if config.num_particles is None else ("num_particles", "max_steps")
    engine.check_counts(config, counts)
    if config.num_particles is not None and config.num_particles < 2:
        raise ValueError(
            f"num_particles must be 2 or more, to know a scale by their distances, got {config.num_particles}; "
            "vi.MAP() finds the mode with one"
        )
    if config.max_steps < 1:
        raise ValueError(f"max_steps must be 1 or more, got {config.max_steps}")
    if config.polish is not None and config.polish not in polishing.WAYS:
        raise ValueError(
            f"polish must be None or one of {', '.join(polishing.WAYS)}, got {shortened(config.polish)}"
        )


def sample_particles(
    config: Any,
    make: Callable[[Any], Algorithm],
    key: PRNGKey,
    target: Target,
    progress: bool | str | None,
    checkpoint: Checkpoint | None,
) -> Posterior:
    """Run an algorithm made by ``descent`` as an engine.

    Args:
        config: with ``num_particles``, ``max_steps`` and ``polish``.
        make: log density -> algorithm, by ``descent``.
        key: random key.
        target: exact or stochastic.
        progress: as in ``SVGD.sample``, like ``checkpoint``, what it returns, raises and warns of.
        checkpoint: where to keep checkpoints.
    """
    name = type(config).__name__
    check_key(key)
    if not isinstance(target, Target):
        engine.check(key, target, name)
    if target.stochastic and config.polish is not None:
        raise TypeError(
            f"{name}(polish={config.polish!r}) needs the exact log density, but this target estimates it from "
            "minibatches; use polish=None, or a target of the whole data"
        )
    Checkpoint.check(checkpoint)
    algorithm = make(target.logdensity_fn)
    key_init, key_run, key_judge, key_polish = jax.random.split(key, 4)
    with bars.task(name, None, bars.label(progress, name)):
        positions = target.init(key_init, _count(config, target, key_init))
        loop = watched(algorithm)
        state, history = run_until(
            key_run,
            loop,
            loop.init(positions),
            has_settled,
            config.max_steps,
            progress=bars.label(progress, name),
            collect=_record,
            checkpoint=checkpoint,
        )
        if history.interrupted:
            engine.is_part(history)  # what lost its density is told apart below
        early = (table.ravel(positions), state.watch.early)
        found = _finish(algorithm, state.cloud, key_judge, key_polish, early, config.polish)
    info = reports.info(target, state, history, found, config)
    reports.refuse(name, info)
    said = ""
    if not target.stochastic:
        # a cloud may settle on a density that falls too slowly
        few = jax.tree.map(lambda leaf: leaf[:_PLACES], found.positions)
        status, said = tails.doubted(info.status, target.logdensity_fn, few, prior=target.prior, always=True)
        info = info._replace(status=status)
    engine.warn(info.status, said or reports.details(info, found.trial, target), name)
    log_weights = found.log_weights[None] if config.polish == "weights" or int(info.num_nonfinite) else None
    final = jax.tree.map(lambda leaf: leaf[None], found.positions)
    return engine.finish(target, final, final, info, log_weights=log_weights)


def _count(config: Any, target: Target, key: PRNGKey) -> int:
    """The number of particles, chosen by the dimension where it is not given."""
    if config.num_particles is not None:
        return config.num_particles
    one = target.candidates(key, 1)
    return diagnostics.particles_for(sum(leaf.size for leaf in jax.tree.leaves(one)))


def _record(state: Watched, info: CloudInfo) -> tuple[Array, Array, Array]:
    return info.direction_norm, jnp.mean(info.virial), info.status


@partial(jax.jit, static_argnames="polish")
def _finish(
    algorithm: Algorithm,
    state: CloudState,
    key_judge: PRNGKey,
    key_polish: PRNGKey,
    early: tuple[Array, Array],
    polish: str | None,
) -> reports.Finished:
    """Judge the cloud, polish it, and try what came out by trajectories."""
    key_judge, key_try = jax.random.split(key_judge)
    verdict, seen, spent = judged(algorithm, key_judge, state)
    valid = seen.scores.valid
    if polish is None:
        none = jnp.full((), jnp.nan, state.z.dtype)
        log_weights = jnp.where(valid, 0, -jnp.inf).astype(state.z.dtype)
        trial = blank(state.z.shape[1], state.z.dtype)
        if not algorithm.step.args[0].stochastic:  # type: ignore[attr-defined]
            trial = tried(key_try, algorithm, state, state.z, valid, early)
        num = spent * len(valid) + trial.num_gradients
        return reports.Finished(
            verdict, trial, state.positions, log_weights, none, none, jnp.sum(~valid), num
        )
    both = jax.value_and_grad(jax.tree_util.Partial(logdensity_in_cloud, algorithm, state))
    done = polishing.WAYS[polish](key_polish, both, state.z, valid)
    trial = blank(state.z.shape[1], state.z.dtype)
    if polish != "weights":
        trial = tried(key_try, algorithm, state, done.z, valid, early)
    return reports.Finished(
        verdict,
        trial,
        positions_of(algorithm, state, done.z),
        done.log_weights,
        done.acceptance,
        done.khat,
        jnp.sum(~valid),
        len(valid) + done.num_gradients + trial.num_gradients,
    )
