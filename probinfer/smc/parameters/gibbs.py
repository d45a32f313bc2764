r"""Particle Gibbs for parameters and path: each is drawn given the other.

The path given the parameters moves by a conditional particle filter with ancestor sampling, the parameters given the
path by Hamiltonian trajectories on the joint density :math:`p(\theta, x_{0:T-1})`, whose gradients are known. Both
leave the joint posterior as it is, whatever the number of particles.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from probinfer.core.algorithms import algorithm
from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, PRNGKey, field, pytree
from probinfer.inference import engine
from probinfer.inference.posterior import Posterior
from probinfer.mcmc import report
from probinfer.mcmc.adaptation.tuning import first_tuning, learn
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.driver import run_until
from probinfer.smc.conditional.gibbs import _changed
from probinfer.smc.parameters.gibbs_step import NUM_LEAPFROGS, check_densities, parameter_gibbs_step
from probinfer.smc.parameters.likelihood import estimate
from probinfer.smc.parameters.model import Parameters, check_parameters, draw, log_joint
from probinfer.smc.parameters.pmmh import check_chains
from probinfer.smc.tempered.bridge import unflatten

__all__ = ["ParticleGibbs", "ParticleGibbsInfo"]

_TARGET_ACCEPTANCE = 0.8
_CANDIDATES = 16  # prior draws a chain, of which the best start
_FEWEST, _MOST = 16, 1024  # particles
_LEAST_UPDATE = 0.5


class ParticleGibbsInfo(NamedTuple):
    """Report of particle Gibbs for parameters.

    ``acceptance`` (chain,) of the trajectories after the warm-up; ``update_rate`` (T,), share of the iterations in
    which each step of the path changed; ``num_particles``, doubled in the warm-up until every step changed in half of
    the iterations; ``step_size`` (chain,); ``paths``, leaves (chain, draw, T, ...), or None; ``num_filter_steps``
    counts observations times filters, all warm-ups included; ``num_gradients`` of the joint density. ``rhat``, ``ess``
    and ``ess_tail`` are trees shaped like one unconstrained position. ``status`` is ``OK``, ``CHAINS_DISAGREE``, or
    the worst of the conditional filters after the warm-up: a filter that fails leaves its path as it was.
    """

    acceptance: Any
    update_rate: Any
    num_particles: Any
    step_size: Any
    paths: Any
    num_filter_steps: Any
    num_gradients: Any
    rhat: Any
    ess: Any
    ess_tail: Any
    status: Any


class _State(NamedTuple):
    positions: Any  # (chain, d)
    paths: Any  # leaves (chain, T, ...)
    tunings: Any
    number: Any  # of iterations
    last: Any  # where this phase ends


class _Row(NamedTuple):
    position: Any
    path: Any
    acceptance: Any
    changed: Any
    status: Any


@pytree
class _Settings:
    """What does not change in a run."""

    num_particles: int = field(static=True)
    keep_paths: bool = field(static=True)
    num_warmup: int = field(static=True)
    mode: str = field(static=True)


@pytree
class ParticleGibbs:
    """Particle Gibbs for the parameters and the path of a state-space model, tuned in a warm-up.

    The target's models are ``FeynmanKac`` with ``log_transition``, differentiable in the parameters, and ``Parameters``
    has ``log_initial``. Parameters that are strongly tied to the path (a small scale of the transition) move slowly:
    see ``info.ess``, and compare with ``PMMH``.

    Args:
        num_draws: draws of a chain.
        num_chains: chains; two or more are needed for R-hat.
        num_warmup: iterations in which step size, metric and number of particles are learned.
        keep_paths: keep the path of every draw, ``info.paths``: chain times draw times T records.
        mode: chains one after another ("map"), side by side ("vmap"), or as suits particle filters ("auto").

    References:
        Andrieu, Doucet and Holenstein (2010), section 4.5; Lindsten, Jordan and Schön (2014), ancestor sampling.
    """

    num_draws: int = field(static=True, default=2000)
    num_chains: int = field(static=True, default=4)
    num_warmup: int = field(static=True, default=500)
    keep_paths: bool = field(static=True, default=False)
    mode: str = field(static=True, default="auto")

    def __post_init__(self):
        """Check the settings.

        Raises:
            TypeError: a count is not an integer, or ``keep_paths`` not a boolean.
            ValueError: a count or the mode out of range.
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
        """Draw parameters and paths.

        Args:
            key: random key.
            target: ``smc.Parameters`` with ``log_initial``.
            progress: a bar; ``None`` means on a terminal.
            checkpoint: where to keep checkpoints; the same call continues from there to the same draws.

        Returns:
            The posterior of the parameters; its ``info`` is a ``ParticleGibbsInfo``.

        Raises:
            TypeError: not a key, not ``Parameters``, or models that are not of one particle.
            ValueError: no ``log_initial`` or no ``log_transition``.
            NumericalError: no prior draw has a finite density along a path drawn for it, or a chain became non-finite.

        Warns:
            ConvergenceWarning: the chains disagree or have too few effective draws, or a filter failed; or Ctrl-C left
                a part of the draws.
        """
        check_parameters(key, target, "ParticleGibbs")
        check_densities(target)
        Checkpoint.check(checkpoint)
        key_start, key_run, key_draws = jax.random.split(key, 3)
        with bars.task("ParticleGibbs", None, bars.label(progress, "ParticleGibbs")):
            state = _begin(key_start, target, self)
            state, num_particles, spent = _warm_up(key_run, target, self, state, progress, checkpoint)
            state = state._replace(last=jnp.int32(self.num_warmup + self.num_draws))
            state, rows = _loop(key_draws, target, self, num_particles, state, "draws", progress, checkpoint)
        return _posterior(self, target, state, rows, num_particles, spent)


def _settings(config: ParticleGibbs, num_particles: int) -> _Settings:
    mode = "vmap" if config.mode == "auto" else config.mode
    return _Settings(num_particles, config.keep_paths, config.num_warmup, mode)


def _begin(key: PRNGKey, target: Parameters, config: ParticleGibbs) -> _State:
    """Chains at the prior draws of the highest estimated likelihood, each with a path of its filter.

    Raises:
        NumericalError: too few of them have a finite density.
    """
    state, log_joints = _candidates(key, target, config.num_chains)
    if not np.all(np.isfinite(log_joints)):
        raise NumericalError(
            f"of {_CANDIDATES * config.num_chains} prior draws fewer than {config.num_chains} have a finite joint "
            f"density along a path drawn by their particle filter; {advice(Status.NON_FINITE)}",
            Status.NON_FINITE,
        )
    return state


@partial(jax.jit, static_argnames="num_chains")
def _candidates(key: PRNGKey, target: Parameters, num_chains: int) -> tuple[_State, Array]:
    key_draw, key_filters = jax.random.split(key)
    num = _CANDIDATES * num_chains
    positions = jax.vmap(partial(draw, target))(jax.random.split(key_draw, num))

    def one(key: Array, position: Array) -> tuple:
        found = estimate(key, target, position, 4 * _FEWEST, True)
        density, slope = jax.value_and_grad(partial(log_joint, target))(position, found.path)
        sound = jnp.isfinite(density) & jnp.all(jnp.isfinite(slope))
        return jnp.where(sound, found.log_evidence, -jnp.inf), found.path, jnp.where(sound, density, -jnp.inf)

    log_evidences, paths, densities = engine.over(one, "map", jax.random.split(key_filters, num), positions)
    _, best = lax.top_k(log_evidences, num_chains)
    positions, paths, densities = jax.tree.map(lambda leaf: leaf[best], (positions, paths, densities))
    rate = jnp.asarray(_TARGET_ACCEPTANCE, positions.dtype)
    tunings = jax.vmap(partial(first_tuning, rate))(positions)
    none = jnp.int32(0)
    return _State(positions, paths, tunings, none, none), densities


def _warm_up(
    key: PRNGKey, target: Parameters, config: ParticleGibbs, state: _State, progress: Any, checkpoint: Any
) -> tuple[_State, int, int]:
    """Warm up; with twice as many particles, from where the chains are, while some steps of the paths hardly change."""
    num_particles, spent, tunings = _FEWEST, 0, state.tunings
    while True:
        key, key_run = jax.random.split(key)
        state = state._replace(tunings=tunings, number=jnp.int32(0), last=jnp.int32(config.num_warmup))
        name = f"warm-up, {num_particles} particles"
        state, rows = _loop(key_run, target, config, num_particles, state, name, progress, checkpoint)
        spent += config.num_warmup
        changed = np.mean(np.asarray(rows.changed[config.num_warmup // 2 :]), axis=(0, 1))
        if changed.min() >= _LEAST_UPDATE or num_particles >= _MOST:
            return state, num_particles, spent
        num_particles *= 2


def _loop(
    key: PRNGKey,
    target: Parameters,
    config: ParticleGibbs,
    num_particles: int,
    state: _State,
    name: str,
    progress: Any,
    checkpoint: Any,
) -> tuple[_State, Any]:
    """Warm-up and draws have one rule, record and room for records: they share one compiled program."""
    state, history = run_until(
        key,
        algorithm(_no_init, _step, target, _settings(config, num_particles)),
        state,
        _is_over,
        config.num_draws if name == "draws" else config.num_warmup,
        buffer_steps=max(config.num_warmup, config.num_draws),
        progress=bars.label(progress, name),
        collect=_record,
        checkpoint=None
        if checkpoint is None
        else checkpoint.child(name.replace(", ", "-").replace(" ", "-")),
    )
    if name != "draws" or not engine.is_part(history):
        history.check()
    return state, history.filled()


def _no_init(target: Parameters, settings: _Settings, state: _State) -> _State:
    return state


def _is_over(state: _State, row: _Row) -> Array:
    del row
    return state.number >= state.last


def _record(state: _State, row: _Row) -> _Row:
    del state
    return row


def _step(target: Parameters, settings: _Settings, key: PRNGKey, state: _State) -> tuple[_State, _Row]:
    """One iteration of all chains; in the warm-up each learns from it."""
    num, warming = state.positions.shape[0], state.number < settings.num_warmup
    rate = jnp.asarray(_TARGET_ACCEPTANCE, state.positions.dtype)

    def one(key: Array, position: Array, path: ArrayTree, tuning: Any) -> tuple:
        moved, new_path, acceptance, status = parameter_gibbs_step(
            key, target, position, path, tuning.step_size, tuning.inverse_mass, settings.num_particles
        )
        number = jnp.minimum(state.number, settings.num_warmup - 1)
        learned = learn(rate, settings.num_warmup, tuning, number, moved, acceptance)
        tuning = jax.tree.map(lambda new, old: jnp.where(warming, new, old), learned, tuning)
        return moved, new_path, tuning, acceptance, _changed(path, new_path), status

    found = engine.over(
        one, settings.mode, jax.random.split(key, num), state.positions, state.paths, state.tunings
    )
    positions, paths, tunings, acceptance, changed, status = found
    new = state._replace(positions=positions, paths=paths, tunings=tunings, number=state.number + 1)
    return new, _Row(positions, paths if settings.keep_paths else None, acceptance, changed, status)


def _posterior(
    config: ParticleGibbs, target: Parameters, state: _State, rows: _Row, num_particles: int, spent: int
) -> Posterior:
    update_rate = jnp.mean(rows.changed, axis=(0, 1), dtype=state.positions.dtype)
    rows = engine.chains_first(rows)
    positions = unflatten(target.like, rows.position)
    judged = report.convergence(positions)
    count = rows.status.shape[1]
    worst = int(np.max(rows.status))
    status, details = Status(int(judged.status)), ""
    if worst != Status.OK:
        failed = int(np.sum(np.asarray(rows.status) != Status.OK))
        status, details = Status(worst), f"{failed} of {np.size(rows.status)} conditional filters failed"
    elif status != Status.OK:
        details = report.explain(judged, config.num_chains, count)
    if count < config.num_draws:  # Ctrl-C
        said = f"{count} of {config.num_draws} draws of a chain were made"
        status, details = engine.part(said, status, details)
    iterations = config.num_chains * (spent + count)
    info = ParticleGibbsInfo(
        acceptance=jnp.mean(rows.acceptance, axis=1),
        update_rate=update_rate,
        num_particles=jnp.int32(num_particles),
        step_size=state.tunings.step_size,
        paths=rows.path,
        num_filter_steps=jnp.asarray(target.num_steps * iterations, state.positions.dtype),
        num_gradients=jnp.int32(iterations * (NUM_LEAPFROGS + 1)),
        **judged._replace(status=jnp.int32(int(status)))._asdict(),
    )
    more = f"run more draws (num_draws is {config.num_draws})" if status == Status.CHAINS_DISAGREE else ""
    engine.warn(status, details, "ParticleGibbs", more)
    return engine.finish(target.target, positions, target.like, info)
