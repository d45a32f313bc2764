r"""Particle Gibbs for parameters and path: each is drawn given the other.

The path given the parameters moves by a conditional particle filter with ancestor sampling, the parameters given the
path by Hamiltonian trajectories on the joint density :math:`p(\theta, x_{0:T-1})`, whose gradients are known. Both
leave the joint posterior invariant, whatever the number of particles.
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
from probinfer.core.trees import map_or_vmap, select
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, PRNGKey, PyTree, field, pytree
from probinfer.inference import engine
from probinfer.inference.posterior import Posterior
from probinfer.mcmc import report
from probinfer.mcmc.adaptation.tuning import Tuning, first_tuning, learn
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.driver import run_until
from probinfer.smc.conditional.gibbs import _changed
from probinfer.smc.parameters.gibbs_step import NUM_LEAPFROGS, check_densities, parameter_gibbs_step
from probinfer.smc.parameters.likelihood import estimate_likelihood
from probinfer.smc.parameters.model import Parameters, check_parameters, draw_prior, log_joint
from probinfer.smc.parameters.pmmh import check_chains
from probinfer.smc.tempered.bridge import unflatten
from probinfer.smc.tempered.populations import child_checkpoint

__all__ = ["ParticleGibbs", "ParticleGibbsInfo"]

_TARGET_ACCEPTANCE = 0.8
_CANDIDATES_PER_CHAIN = 16  # prior draws, of which the best become starts
_MIN_PARTICLES, _MAX_PARTICLES = 16, 1024
_MIN_UPDATE_RATE = 0.5


class ParticleGibbsInfo(NamedTuple):
    """Report of particle Gibbs for parameters.

    Attributes:
        acceptance: of the trajectories after the warm-up.
        update_rate: share of the iterations in which each step of the path changed.
        num_particles: doubled in the warm-up until every step changes in half of the iterations.
        step_size: of the leapfrogs.
        paths: leaves (chain, draw, T, ...), or None.
        num_filter_steps: observations times filters, all warm-ups included.
        num_gradients: of the joint density.
        rhat, ess, ess_tail: trees shaped like one unconstrained position.
        status: ``OK``, ``CHAINS_DISAGREE``, or the worst status of the conditional filters after the warm-up: a filter
            that fails does not change its path.
    """

    acceptance: Float[Array, " chain"]
    update_rate: Float[Array, " T"]
    num_particles: Int[Array, ""]
    step_size: Float[Array, " chain"]
    paths: PyTree
    num_filter_steps: Float[Array, ""]
    num_gradients: Int[Array, ""]
    rhat: PyTree
    ess: PyTree
    ess_tail: PyTree
    status: Int[Array, ""]


class _GibbsChains(NamedTuple):
    """State of all chains.

    Attributes:
        positions: of the parameters, unconstrained.
        paths: leaves (chain, T, ...).
        tunings: step sizes and metrics, leaves (chain, ...).
        iteration: iterations made.
        last_iteration: number of iterations after which this phase ends.
    """

    positions: Float[Array, "chain d"]
    paths: PyTree
    tunings: Tuning
    iteration: Int[Array, ""]
    last_iteration: Int[Array, ""]


class _GibbsRecord(NamedTuple):
    """Record of one iteration of all chains; ``changed`` tells which steps of the path did."""

    position: Float[Array, "chain d"]
    path: PyTree
    acceptance: Float[Array, " chain"]
    changed: Bool[Array, "chain T"]
    status: Int[Array, " chain"]


@pytree
class _GibbsSettings:
    """Settings that do not change in a run."""

    num_particles: int = field(static=True)
    keep_paths: bool = field(static=True)
    num_warmup: int = field(static=True)
    mode: str = field(static=True)


@pytree
class ParticleGibbs:
    """Particle Gibbs for the parameters and the path of a state-space model, tuned in a warm-up.

    The target's models are ``FeynmanKac`` with ``log_transition``, differentiable in the parameters, and ``Parameters``
    has ``log_initial``. Parameters that depend strongly on the path (a small scale of the transition) move slowly: see
    ``info.ess``, and compare with ``PMMH``.

    Args:
        num_draws: draws of a chain.
        num_chains: chains; two or more are needed for R-hat.
        num_warmup: iterations in which step size, metric and number of particles are learned.
        keep_paths: keep the path of every draw, ``info.paths``: chain times draw times T records.
        mode: chains one after another ("map"), side by side ("vmap"), or whichever suits particle filters ("auto").

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
        """Draw parameters and paths of ``smc.Parameters`` with ``log_initial``.

        Returns:
            The posterior of the parameters; its ``info`` is a ``ParticleGibbsInfo``.

        Raises:
            TypeError: not ``Parameters``, or models that are not those of one particle.
            ValueError: no ``log_initial`` or no ``log_transition``.
            NumericalError: no prior draw has a finite density along a path drawn for it, or a chain became non-finite.

        Warns:
            ConvergenceWarning: the chains disagree or have too few effective draws, a filter failed, or Ctrl-C ended
                the run early.
        """
        check_parameters(key, target, "ParticleGibbs")
        check_densities(target)
        Checkpoint.check(checkpoint)
        key_start, key_run, key_draws = jax.random.split(key, 3)
        with bars.task("ParticleGibbs", None, bars.label(progress, "ParticleGibbs")):
            chains = _init_chains(key_start, target, self)
            chains, num_particles, num_warmup = _warm_up(key_run, target, self, chains, progress, checkpoint)
            chains = chains._replace(last_iteration=jnp.int32(self.num_warmup + self.num_draws))
            chains, records = _run_phase(
                key_draws, target, self, num_particles, chains, "draws", progress, checkpoint
            )
        return _posterior(self, target, chains, records, num_particles, num_warmup)


def _settings(config: ParticleGibbs, num_particles: int) -> _GibbsSettings:
    return _GibbsSettings(
        num_particles=num_particles,
        keep_paths=config.keep_paths,
        num_warmup=config.num_warmup,
        mode="vmap" if config.mode == "auto" else config.mode,
    )


def _init_chains(key: PRNGKey, target: Parameters, config: ParticleGibbs) -> _GibbsChains:
    """Start chains at the prior draws of the highest estimated likelihood, each with a path of its filter.

    Raises:
        NumericalError: too few of them have a finite density.
    """
    chains, log_joints = _best_candidates(key, target, config.num_chains)
    if not np.all(np.isfinite(log_joints)):
        raise NumericalError(
            f"of {_CANDIDATES_PER_CHAIN * config.num_chains} prior draws fewer than {config.num_chains} have a finite "
            f"joint density along a path drawn by their particle filter; {advice(Status.NON_FINITE)}",
            Status.NON_FINITE,
        )
    return chains


@partial(jax.jit, static_argnames="num_chains")
def _best_candidates(key: PRNGKey, target: Parameters, num_chains: int) -> tuple[_GibbsChains, Array]:
    """Return chains at the best prior draws, and their log joint densities; minus infinity if they are not finite."""
    key_draw, key_filters = jax.random.split(key)
    num_candidates = _CANDIDATES_PER_CHAIN * num_chains
    positions = jax.vmap(partial(draw_prior, target))(jax.random.split(key_draw, num_candidates))

    def candidate(key: Array, position: Array) -> tuple:
        estimate = estimate_likelihood(key, target, position, 4 * _MIN_PARTICLES, True)
        log_density, gradient = jax.value_and_grad(partial(log_joint, target))(position, estimate.path)
        is_finite = jnp.isfinite(log_density) & jnp.all(jnp.isfinite(gradient))
        log_evidence = jnp.where(is_finite, estimate.log_evidence, -jnp.inf)
        return log_evidence, estimate.path, jnp.where(is_finite, log_density, -jnp.inf)

    log_evidences, paths, log_joints = map_or_vmap(
        candidate, "map", jax.random.split(key_filters, num_candidates), positions
    )
    _, best = lax.top_k(log_evidences, num_chains)
    positions, paths, log_joints = jax.tree.map(lambda leaf: leaf[best], (positions, paths, log_joints))
    target_acceptance = jnp.asarray(_TARGET_ACCEPTANCE, positions.dtype)
    chains = _GibbsChains(
        positions=positions,
        paths=paths,
        tunings=jax.vmap(partial(first_tuning, target_acceptance))(positions),
        iteration=jnp.int32(0),
        last_iteration=jnp.int32(0),
    )
    return chains, log_joints


def _warm_up(
    key: PRNGKey,
    target: Parameters,
    config: ParticleGibbs,
    chains: _GibbsChains,
    progress: Any,
    checkpoint: Any,
) -> tuple[_GibbsChains, int, int]:
    """Warm up, again with twice as many particles while some steps of the paths hardly change.

    Returns:
        The chains, the number of particles, and the number of iterations made.
    """
    num_particles, num_iterations, tunings = _MIN_PARTICLES, 0, chains.tunings
    while True:
        key, key_run = jax.random.split(key)
        chains = chains._replace(
            tunings=tunings, iteration=jnp.int32(0), last_iteration=jnp.int32(config.num_warmup)
        )
        name = f"warm-up, {num_particles} particles"
        chains, records = _run_phase(
            key_run, target, config, num_particles, chains, name, progress, checkpoint
        )
        num_iterations += config.num_warmup
        update_rate = np.mean(np.asarray(records.changed[config.num_warmup // 2 :]), axis=(0, 1))
        if update_rate.min() >= _MIN_UPDATE_RATE or num_particles >= _MAX_PARTICLES:
            return chains, num_particles, num_iterations
        num_particles *= 2


def _run_phase(
    key: PRNGKey,
    target: Parameters,
    config: ParticleGibbs,
    num_particles: int,
    chains: _GibbsChains,
    name: str,
    progress: Any,
    checkpoint: Any,
) -> tuple[_GibbsChains, Any]:
    """Run the warm-up or the draws; both have the same step, stop, record and room, and share a compiled program."""
    chains, history = run_until(
        key,
        algorithm(_given_chains, _step, target, _settings(config, num_particles)),
        chains,
        _is_finished,
        config.num_draws if name == "draws" else config.num_warmup,
        buffer_steps=max(config.num_warmup, config.num_draws),
        progress=bars.label(progress, name),
        collect=_record,
        checkpoint=child_checkpoint(checkpoint, name),
    )
    if name != "draws" or not engine.was_interrupted(history):
        history.check()
    return chains, history.filled()


def _given_chains(target: Parameters, settings: _GibbsSettings, chains: _GibbsChains) -> _GibbsChains:
    return chains


def _is_finished(chains: _GibbsChains, record: _GibbsRecord) -> Array:
    del record
    return chains.iteration >= chains.last_iteration


def _record(chains: _GibbsChains, record: _GibbsRecord) -> _GibbsRecord:
    del chains
    return record


def _step(
    target: Parameters, settings: _GibbsSettings, key: PRNGKey, chains: _GibbsChains
) -> tuple[_GibbsChains, _GibbsRecord]:
    """Make one iteration of all chains; in the warm-up each adapts its step size and metric."""
    num_chains, in_warmup = chains.positions.shape[0], chains.iteration < settings.num_warmup
    target_acceptance = jnp.asarray(_TARGET_ACCEPTANCE, chains.positions.dtype)

    def step(key: Array, position: Array, path: ArrayTree, tuning: Tuning) -> tuple:
        new_position, new_path, acceptance, status = parameter_gibbs_step(
            key, target, position, path, tuning.step_size, tuning.inverse_mass, settings.num_particles
        )
        iteration = jnp.minimum(chains.iteration, settings.num_warmup - 1)
        learned = learn(target_acceptance, settings.num_warmup, tuning, iteration, new_position, acceptance)
        tuning = select(in_warmup, learned, tuning)
        return new_position, new_path, tuning, acceptance, _changed(path, new_path), status

    positions, paths, tunings, acceptance, changed, status = map_or_vmap(
        step, settings.mode, jax.random.split(key, num_chains), chains.positions, chains.paths, chains.tunings
    )
    chains = chains._replace(
        positions=positions, paths=paths, tunings=tunings, iteration=chains.iteration + 1
    )
    record = _GibbsRecord(
        position=positions,
        path=paths if settings.keep_paths else None,
        acceptance=acceptance,
        changed=changed,
        status=status,
    )
    return chains, record


def _posterior(
    config: ParticleGibbs,
    target: Parameters,
    chains: _GibbsChains,
    records: _GibbsRecord,
    num_particles: int,
    num_warmup: int,
) -> Posterior:
    update_rate = jnp.mean(records.changed, axis=(0, 1), dtype=chains.positions.dtype)
    records = engine.chains_first(records)
    positions = unflatten(target.template, records.position)
    # Judge the chains
    convergence = report.convergence(positions)
    num_draws = records.status.shape[1]
    filter_status = int(np.max(records.status))
    status, details = Status(int(convergence.status)), ""
    if filter_status != Status.OK:
        num_failed = int(np.sum(np.asarray(records.status) != Status.OK))
        details = f"{num_failed} of {np.size(records.status)} conditional filters failed"
        status = Status(filter_status)
    elif status != Status.OK:
        details = report.explain(convergence, config.num_chains, num_draws)
    if num_draws < config.num_draws:  # Ctrl-C
        made = f"{num_draws} of {config.num_draws} draws of a chain were made"
        status, details = engine.interrupted_part(made, status, details)
    # Report
    num_iterations = config.num_chains * (num_warmup + num_draws)
    info = ParticleGibbsInfo(
        acceptance=jnp.mean(records.acceptance, axis=1),
        update_rate=update_rate,
        num_particles=jnp.int32(num_particles),
        step_size=chains.tunings.step_size,
        paths=records.path,
        num_filter_steps=jnp.asarray(target.num_steps * num_iterations, chains.positions.dtype),
        num_gradients=jnp.int32(num_iterations * (NUM_LEAPFROGS + 1)),
        **convergence._replace(status=jnp.int32(int(status)))._asdict(),
    )
    advised = f"run more draws (num_draws is {config.num_draws})" if status == Status.CHAINS_DISAGREE else ""
    engine.warn(status, details, "ParticleGibbs", advised)
    return engine.finish(target.target, positions, target.template, info)
