r"""Particle marginal Metropolis-Hastings: a random walk over parameters that uses estimated likelihoods.

The chain moves on parameters, estimate and path together, and its invariant law has exactly the posterior of parameters
and path as a marginal, whatever the number of particles: an estimate is kept until the next acceptance.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from probinfer.core.algorithms import Algorithm, algorithm
from probinfer.core.status import Status
from probinfer.core.types import Array, Float, PRNGKey, field, pytree
from probinfer.inference import engine, findings
from probinfer.inference.findings import Finding, combined
from probinfer.inference.posterior import Posterior
from probinfer.mcmc import report
from probinfer.numerics.covariance_factor import push
from probinfer.resampling import systematic
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.driver import run
from probinfer.smc.parameters.likelihood import estimate
from probinfer.smc.parameters.model import Parameters, check_parameters, log_prior
from probinfer.smc.parameters.pilot import Pilot, learn_pilot
from probinfer.smc.parameters.proposals import LOCAL_SCALE
from probinfer.smc.tempered.bridge import unflatten

__all__ = ["PMMH", "PMMHInfo", "Place", "pmmh_step"]

_PILOT = 128  # parameters


class Place(NamedTuple):
    """Where a chain is: position (d,), log prior, estimated log evidence, and a path or None."""

    position: Any
    log_prior: Any
    log_evidence: Any
    path: Any


class PMMHInfo(NamedTuple):
    """Report of particle marginal Metropolis-Hastings.

    ``acceptance`` (chain,), mean after the warm-up; ``log_evidences`` (chain, draw), the estimates that the chains
    carry; ``num_particles``, and ``log_evidence_variance`` at a central parameter, by which it was chosen; ``scale`` of
    the proposals, in units of the root of the posterior covariance; ``paths``, leaves (chain, draw, T, ...), one
    smoothed path a draw, or None; ``num_undefined`` counts proposals with a log weight of NaN or plus infinity, which
    were rejected; ``num_filter_steps`` counts observations times filters, pilot and warm-up included. ``rhat``,
    ``ess`` and ``ess_tail`` are trees shaped like one unconstrained position. ``status`` is ``OK`` or
    ``CHAINS_DISAGREE``, also where a chain accepted nothing, or ``NON_FINITE`` if one filter in a hundred is undefined.
    """

    acceptance: Any
    log_evidences: Any
    num_particles: Any
    log_evidence_variance: Any
    scale: Any
    paths: Any
    num_undefined: Any
    num_filter_steps: Any
    rhat: Any
    ess: Any
    ess_tail: Any
    status: Any


class _State(NamedTuple):
    places: Place  # leaves (chain, ...)
    log_scale: Any
    number: Any


class _Row(NamedTuple):
    position: Any
    log_evidence: Any
    path: Any
    acceptance: Any
    accepted: Any
    undefined: Any


@pytree
class _Settings:
    """What does not change in a run."""

    root: Any
    target_acceptance: Any
    num_warmup: Any
    num_particles: int = field(static=True)
    keep_paths: bool = field(static=True)
    mode: str = field(static=True)


@pytree
class PMMH:
    """Particle marginal Metropolis-Hastings with everything learned beforehand.

    A small run of ``SMC2`` gives the chains their starts, the covariance of the proposals, and the number of particles:
    the power of two with which the log evidence at a central parameter has a variance of at most 1.5. In the warm-up
    the scale of the proposals follows the acceptance rate that suits this variance, 2 Phi(-sqrt(2.56^2 + 2 V) / 2);
    then it is frozen.

    Args:
        num_draws: draws of a chain, every state after the warm-up. A random walk needs many.
        num_chains: chains; two or more are needed for R-hat.
        num_warmup: transitions in which the scale is learned.
        keep_paths: keep one smoothed path a draw, ``info.paths``: chain times draw times T records, and about half
            again as much work.
        mode: chains one after another ("map"), side by side ("vmap"), or as suits particle filters ("auto").

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
        """Draw parameters.

        Args:
            key: random key.
            target: ``smc.Parameters``.
            progress: a bar; ``None`` means on a terminal.
            checkpoint: where to keep checkpoints; the same call continues from there to the same draws.

        Returns:
            The posterior; its ``info`` is a ``PMMHInfo``.

        Raises:
            TypeError: not a key, or not ``Parameters``.
            NumericalError: the likelihood is zero or undefined at all parameters of the pilot.

        Warns:
            ConvergenceWarning: the chains disagree, have too few effective draws, or one accepted nothing; or Ctrl-C
                left a part of the draws.
        """
        check_parameters(key, target, "PMMH")
        Checkpoint.check(checkpoint)
        key_pilot, key_start, key_run = jax.random.split(key, 3)
        with bars.task("PMMH", None, bars.label(progress, "PMMH")):
            pilot = learn_pilot(key_pilot, target, _PILOT, progress, checkpoint)
            settings = _settings(self, pilot)
            algorithm = _chains(target, settings)
            state, history = run(
                key_run,
                algorithm,
                _start(key_start, target, settings, pilot.population, self.num_chains),
                self.num_warmup + self.num_draws,
                progress=bars.label(progress, "draws"),
                collect=_record,
                checkpoint=None if checkpoint is None else checkpoint.child("draws"),
            )
        if int(history.num_records) <= self.num_warmup:
            history.check()
        unfinished = engine.is_part(history)
        return _posterior(self, target, pilot, state, history.filled(), unfinished)


def check_chains(config: Any) -> None:
    """Refuse impossible settings of an engine with chains, a warm-up and paths.

    Raises:
        TypeError: a count is not an integer, or ``keep_paths`` not a boolean.
        ValueError: a count or the mode out of range.
    """
    engine.check_counts(config, ("num_draws", "num_chains", "num_warmup"))
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
    place: Place,
    root: Float[Array, "..."],
    scale: Float[Array, ""],
    num_particles: int,
    keep_path: bool,
) -> tuple[Place, Array, Array, Array]:
    r"""Propose a position around the present one and accept it by the estimated ratio of posterior densities.

    .. math:: \min\{1, p(\theta')\hat Z(\theta') / (p(\theta)\hat Z(\theta))\}

    Args:
        key: random key.
        target: parameters and models.
        place: where the chain is.
        root: of the covariance of the proposals.
        scale: of the proposals, in units of the root.
        num_particles: N.
        keep_path: draw a path with every estimate.

    Returns:
        The next place, the acceptance probability, whether it was accepted, and whether the proposal was undefined.
    """
    key_step, key_filter, key_accept = jax.random.split(key, 3)
    step = push(root, jax.random.normal(key_step, place.position.shape, place.position.dtype))
    position = place.position + scale * step
    found = estimate(key_filter, target, position, num_particles, keep_path)
    new = Place(position, log_prior(target, position), found.log_evidence, found.path)
    gain = new.log_prior + new.log_evidence - place.log_prior - place.log_evidence
    gain = jnp.where(jnp.isnan(gain), -jnp.inf, gain)
    accepted = jnp.log(jax.random.uniform(key_accept, (), gain.dtype)) < gain
    place = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, place)
    return place, jnp.exp(jnp.minimum(gain, 0)), accepted, found.undefined


def _settings(config: PMMH, pilot: Pilot) -> _Settings:
    noise = min(float(pilot.variance), 10.0)
    rate = 2 * stats.norm.cdf(-0.5 * np.sqrt(LOCAL_SCALE**2 + 2 * noise))
    return _Settings(
        pilot.root,
        jnp.asarray(rate, pilot.centre.dtype),
        jnp.int32(config.num_warmup),
        pilot.num_particles,
        config.keep_paths,
        "vmap" if config.mode == "auto" else config.mode,
    )


@partial(jax.jit, static_argnames="num_chains")
def _start(key: PRNGKey, target: Parameters, settings: _Settings, population: Any, num_chains: int) -> _State:
    """Chains at draws of the pilot, which all have a finite estimate there; a new one may be minus infinity."""
    key_draw, key_filters = jax.random.split(key)
    chosen, _ = systematic(key_draw, population.log_weights, num_chains)
    positions = population.positions[chosen]

    def one(key: Array, position: Array) -> Place:
        found = estimate(key, target, position, settings.num_particles, settings.keep_paths)
        return Place(position, log_prior(target, position), found.log_evidence, found.path)

    places = engine.over(one, settings.mode, jax.random.split(key_filters, num_chains), positions)
    log_scale = jnp.log(jnp.asarray(LOCAL_SCALE / np.sqrt(target.dimension), positions.dtype))
    return _State(places, log_scale, jnp.int32(0))


def _chains(target: Parameters, settings: _Settings) -> Algorithm:
    return algorithm(_no_init, _step, target, settings)


def _no_init(target: Parameters, settings: _Settings, state: _State) -> _State:
    return state


def _step(target: Parameters, settings: _Settings, key: PRNGKey, state: _State) -> tuple[_State, _Row]:
    """Move all chains; in the warm-up the common scale follows their mean acceptance."""
    num = state.places.log_prior.shape[0]
    scale = jnp.exp(state.log_scale)

    def one(key: Array, place: Place) -> tuple:
        return pmmh_step(
            key, target, place, settings.root, scale, settings.num_particles, settings.keep_paths
        )

    places, rates, accepted, undefined = engine.over(
        one, settings.mode, jax.random.split(key, num), state.places
    )
    number = state.number + 1
    gain = (number / 10 + 1.0) ** -0.6 * (jnp.mean(rates) - settings.target_acceptance)
    log_scale = jnp.where(number <= settings.num_warmup, state.log_scale + gain, state.log_scale)
    row = _Row(places.position, places.log_evidence, places.path, rates, accepted, undefined)
    return _State(places, log_scale.astype(state.log_scale.dtype), number), row


def _record(state: _State, row: _Row) -> _Row:
    del state
    return row


def _posterior(
    config: PMMH, target: Parameters, pilot: Pilot, state: _State, rows: _Row, unfinished: bool
) -> Posterior:
    undefined = jnp.sum(rows.undefined, dtype=jnp.int32) + pilot.population.num_undefined
    rows = engine.chains_first(jax.tree.map(lambda leaf: leaf[config.num_warmup :], rows))
    positions = unflatten(target.like, rows.position)
    judged = report.convergence(positions)
    count = rows.accepted.shape[1]
    num_proposals = config.num_chains * (config.num_warmup + count)
    broken = findings.undefined(undefined, num_proposals, "particle filters")
    verdict = combined([broken, _verdict(config, judged, rows)])
    if unfinished:
        said = f"{count} of {config.num_draws} draws of a chain were made"
        verdict = Finding(*engine.part(said, verdict.status, verdict.details))
    steps = target.num_steps * config.num_chains * (config.num_warmup + count + 1)
    info = PMMHInfo(
        acceptance=jnp.mean(rows.acceptance, axis=1),
        log_evidences=rows.log_evidence,
        num_particles=jnp.int32(pilot.num_particles),
        log_evidence_variance=pilot.variance,
        scale=jnp.exp(state.log_scale),
        paths=rows.path,
        num_undefined=undefined,
        num_filter_steps=jnp.asarray(steps + pilot.num_filter_steps, pilot.centre.dtype),
        **judged._replace(status=verdict.status)._asdict(),
    )
    engine.warn(verdict.status, verdict.details, "PMMH", verdict.advised)
    return engine.finish(target.target, positions, target.like, info)


def _verdict(config: PMMH, judged: report.Convergence, rows: _Row) -> Finding | None:
    still = ~np.any(np.asarray(rows.accepted), axis=1)
    if still.any():
        words = f"{int(still.sum())} of {len(still)} chains accepted nothing"
        return Finding(Status.CHAINS_DISAGREE, words, f"run more draws (num_draws is {config.num_draws})")
    if int(judged.status) == Status.OK:
        return None
    words = report.explain(judged, config.num_chains, rows.accepted.shape[1])
    return Finding(Status(int(judged.status)), words, f"run more draws (num_draws is {config.num_draws})")
