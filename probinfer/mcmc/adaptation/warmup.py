"""Warm-up of a set of chains: one metric and one step size for all, learned from all; it stops once they are good.

Each window of 10, 20, 40, ... steps (at most 400) ends with a new metric from its pooled draws and gradients. Meanwhile
the step size follows dual averaging on the mean acceptance rate of the chains. The metric stage ends when, on a fresh
window, the metric in use is as good as the one that the window would choose, the whitened target is near normal (Fisher
divergence below 1 per dimension) and split R-hat of the whitened coordinates is below 1.1, or when the steps run out;
then the step size alone is tuned for 50 steps. A last window of fewer than ten draws changes nothing.

A chain in a region of negligible mass would stay there for the whole run. If a window shows one, the chain continues
from the position of another. Its mean log density must lie below that of the heaviest chain by more than 10 + d log 3,
and so must its log mass, the log density plus the log volume that the chain covered. ``num_restarts`` and ``deficits``
report it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.step_size import DualAveragingAdaptationState, dual_averaging_adaptation

from probinfer.core.trees import select
from probinfer.core.types import Array, Bool, Float, Int, field, pytree
from probinfer.mcmc.adaptation import metric as metrics

__all__ = ["FINISHED", "Warmup", "WarmupConfig", "init", "is_finished", "update"]

_FIRST_WINDOW = 10  # fewer draws do not determine a metric
_MIN_WINDOW = 40  # shorter windows cannot declare the metric good, or a chain lost
_MAX_WINDOW = 400
_NEAR_NORMAL = 1.0  # Fisher divergence per dimension; a target further from normal gets the whole warm-up
_FINAL_STEPS = 50
_NEGLIGIBLE = 10.0  # log of the ratio of the masses of the heaviest chain and a lost one
_WIDER = math.log(3.0)  # log of how much wider a direction may be than a window of draws showed
_LEARN_METRIC, _LEARN_STEP_SIZE, FINISHED = 0, 1, 2


@pytree
class WarmupConfig:
    """Settings of the warm-up.

    Attributes:
        candidates: (3,) booleans, the metrics that may be chosen.
        target_acceptance: mean acceptance rate that the step size aims at.
        num_warmup: maximum number of steps of a chain.
        rank: number of eigenvectors of the metric.
    """

    candidates: Any
    target_acceptance: Any
    num_warmup: int = field(static=True)
    rank: int = field(static=True)


class Warmup(NamedTuple):
    """State of the warm-up: the current metric and step size, and the draws of the window so far.

    Attributes:
        stage: 0 while the metric is learned, 1 while only the step size is, 2 when both are fixed.
        num_steps: steps taken.
        step_size: of the leapfrog.
        choice: the metric in use, and the reasons for it.
        dual: state of the dual averaging of the step size.
        draws: positions of the window, of which the first ``window_count`` steps are valid; w steps fit in.
        gradients: of the log density at the draws.
        logdensities: at the draws.
        window_count: steps of the window (in stage 1: of the stage) so far.
        window_length: of the window (in stage 1: of the stage).
        rhat: largest split R-hat of the last window.
        sources: the chain whose position each chain continues from.
        num_restarts: how often that was another chain.
        deficits: how far the mean log density of a restarted chain lay below that of the heaviest chain, nats.
        num_gradients: of all chains together.
    """

    stage: Int[Array, ""]
    num_steps: Int[Array, ""]
    step_size: Float[Array, ""]
    choice: metrics.MetricChoice
    dual: DualAveragingAdaptationState
    draws: Float[Array, "w chain d"]
    gradients: Float[Array, "w chain d"]
    logdensities: Float[Array, "w chain"]
    window_count: Int[Array, ""]
    window_length: Int[Array, ""]
    rhat: Float[Array, ""]
    sources: Int[Array, " chain"]
    num_restarts: Int[Array, " chain"]
    deficits: Float[Array, " chain"]
    num_gradients: Int[Array, ""]


def init(config: WarmupConfig, num_chains: int, metric: metrics.LowRankInverseMassMatrix) -> Warmup:
    """Start with a metric and a step size that suits a whitened target.

    Args:
        config: the settings.
        num_chains: number of chains.
        metric: the first metric.
    """
    dimension, dtype = metric.sigma.shape[0], metric.sigma.dtype
    window = jnp.zeros((min(_MAX_WINDOW, max(config.num_warmup, 1)), num_chains, dimension), dtype)
    step_size = jnp.asarray(_whitened_step_size(dimension), dtype)
    zero = jnp.zeros((), jnp.int32)
    choice = metrics.MetricChoice(metric, zero, jnp.zeros(3, dtype), jnp.ones((), dtype))
    return Warmup(
        stage=jnp.asarray(_LEARN_METRIC if config.num_warmup > 0 else FINISHED, jnp.int32),
        num_steps=zero,
        step_size=step_size,
        choice=choice,
        dual=_dual_init(config, step_size),
        draws=window,
        gradients=window,
        logdensities=window[..., 0],
        window_count=zero,
        window_length=jnp.asarray(min(_FIRST_WINDOW, len(window)), jnp.int32),
        rhat=jnp.ones((), dtype),
        sources=jnp.arange(num_chains, dtype=jnp.int32),
        num_restarts=jnp.zeros(num_chains, jnp.int32),
        deficits=jnp.zeros(num_chains, dtype),
        num_gradients=jnp.zeros((), jnp.int32),
    )


def update(
    config: WarmupConfig,
    warmup: Warmup,
    draws: Float[Array, "chain d"],
    gradients: Float[Array, "chain d"],
    logdensities: Float[Array, " chain"],
    acceptance_rate: Float[Array, " chain"],
    num_gradients: Array,
) -> Warmup:
    """Learn from one step of all chains; once the warm-up is finished nothing changes.

    Args:
        config: the settings.
        warmup: the state.
        draws: positions after the step.
        gradients: of the log density at the draws.
        logdensities: at the draws.
        acceptance_rate: of the step.
        num_gradients: gradient evaluations of the step, all chains together.
    """
    # Record the step
    active = warmup.stage < FINISHED
    learning = warmup.stage == _LEARN_METRIC
    row = jnp.where(learning, warmup.window_count, 0)
    num_steps = warmup.num_steps + active
    warmup = warmup._replace(
        num_steps=num_steps,
        dual=_dual_update(config, warmup.dual, jnp.mean(acceptance_rate), active),
        draws=warmup.draws.at[row].set(jnp.where(learning, draws, warmup.draws[row])),
        gradients=warmup.gradients.at[row].set(jnp.where(learning, gradients, warmup.gradients[row])),
        logdensities=warmup.logdensities.at[row].set(
            jnp.where(learning, logdensities, warmup.logdensities[row])
        ),
        sources=jnp.arange(len(warmup.sources), dtype=warmup.sources.dtype),
        window_count=warmup.window_count + learning,
        num_gradients=warmup.num_gradients + jnp.where(active, num_gradients, 0),
    )
    warmup = warmup._replace(
        step_size=jnp.where(active, jnp.exp(warmup.dual.log_step_size), warmup.step_size)
    )
    # End the window
    deadline = config.num_warmup - min(_FINAL_STEPS, config.num_warmup // 3)
    window_ends = learning & ((warmup.window_count >= warmup.window_length) | (num_steps >= deadline))
    changes = jax.lax.cond(window_ends, _end_window, _continue_window, config, warmup, num_steps >= deadline)
    warmup = warmup._replace(**changes._asdict())
    # End the warm-up
    finished = (warmup.stage == _LEARN_STEP_SIZE) & (warmup.window_count >= warmup.window_length)
    finished = active & (finished | (num_steps >= config.num_warmup))
    return warmup._replace(
        stage=jnp.where(finished, FINISHED, warmup.stage),
        step_size=jnp.where(finished, jnp.exp(warmup.dual.log_step_size_avg), warmup.step_size),
        window_count=warmup.window_count + (warmup.stage == _LEARN_STEP_SIZE),
    )


def is_finished(warmup: Warmup) -> Bool[Array, ""]:
    """Return whether metric and step size are fixed."""
    return warmup.stage == FINISHED


class _WindowUpdate(NamedTuple):
    """The fields of ``Warmup`` that the end of a window changes."""

    stage: Int[Array, ""]
    choice: metrics.MetricChoice
    step_size: Float[Array, ""]
    dual: DualAveragingAdaptationState
    window_count: Int[Array, ""]
    window_length: Int[Array, ""]
    rhat: Float[Array, ""]
    sources: Int[Array, " chain"]
    num_restarts: Int[Array, " chain"]
    deficits: Float[Array, " chain"]


def _continue_window(config: WarmupConfig, warmup: Warmup, last: Array) -> _WindowUpdate:
    del config, last
    return _WindowUpdate(**{name: getattr(warmup, name) for name in _WindowUpdate._fields})


def _end_window(config: WarmupConfig, warmup: Warmup, last: Array) -> _WindowUpdate:
    """Choose the metric of the next window, restart lost chains, and decide whether the metric stage ends."""
    # Choose the metric
    capacity, num_chains, dimension = warmup.draws.shape
    choice = _window_choice(config, warmup)
    valid = jnp.repeat(jnp.arange(capacity) < warmup.window_count, num_chains)
    flat = (capacity * num_chains, dimension)
    in_use = metrics.divergence(
        warmup.choice.metric, warmup.draws.reshape(flat), warmup.gradients.reshape(flat), valid
    )
    # Judge the metric in use
    rhat = _split_rhat(metrics.whiten(choice.metric, warmup.draws), warmup.window_count)
    best = choice.divergences[choice.chosen]
    good = (in_use <= 1.25 * best + 0.1) & (best < _NEAR_NORMAL)
    finished = last | (good & (rhat < 1.1) & (warmup.window_length >= _MIN_WINDOW))
    # Restart dual averaging, not below the step size of a whitened target: the new metric whitens better
    average = jnp.exp(warmup.dual.log_step_size_avg)
    step_size = jnp.maximum(average, jnp.asarray(_whitened_step_size(dimension), average.dtype))
    # Restart lost chains
    sources, deficits = _sources(
        metrics.whiten(choice.metric, warmup.draws), warmup.logdensities, warmup.window_count
    )
    restarted = sources != warmup.sources
    next_length = jnp.minimum(2 * warmup.window_length, capacity)
    return _WindowUpdate(
        stage=jnp.where(finished, _LEARN_STEP_SIZE, _LEARN_METRIC).astype(jnp.int32),
        choice=choice,
        step_size=step_size,
        dual=_dual_init(config, step_size),
        window_count=jnp.zeros_like(warmup.window_count),
        window_length=jnp.where(finished, _FINAL_STEPS, next_length).astype(jnp.int32),
        rhat=rhat,
        sources=sources,
        num_restarts=warmup.num_restarts + restarted,
        deficits=jnp.where(restarted, deficits, warmup.deficits),
    )


def _sources(
    whitened: Float[Array, "step chain d"], logdensities: Float[Array, "step chain"], count: Array
) -> tuple[Array, Array]:
    """Return the source of each chain, itself unless its mass is negligible, and its log-density deficit (chain,)."""
    capacity, num_chains, dimension = whitened.shape
    # Mean log density, and log mass: the log density plus the log volume of the draws
    size = jnp.maximum(count, 1).astype(whitened.dtype)
    weights = (jnp.arange(capacity) < count).astype(whitened.dtype) / size
    centered = whitened - jnp.einsum("s,scd->cd", weights, whitened)
    variances = jnp.einsum("s,scd->cd", weights, centered**2)
    means = weights @ logdensities
    tiny = jnp.finfo(whitened.dtype).tiny
    log_masses = means + 0.5 * jnp.sum(jnp.log(jnp.maximum(variances, tiny)), axis=1)
    # Chains far below the heaviest, in log density and in log mass
    heaviest = jnp.argmax(jnp.where(jnp.isfinite(log_masses), log_masses, -jnp.inf))
    margin = _NEGLIGIBLE + _WIDER * dimension
    deficits = means[heaviest] - means
    lost = (deficits > margin) & (log_masses[heaviest] - log_masses > margin) & (count >= _MIN_WINDOW)
    # Lost chains are spread evenly over the others
    indices = jnp.arange(num_chains)
    others = jnp.argsort(lost, stable=True)[indices % jnp.maximum(jnp.sum(~lost), 1)]
    return jnp.where(lost, others, indices).astype(jnp.int32), deficits.astype(whitened.dtype)


def _whitened_step_size(dimension: int) -> float:
    """Half a standard deviation, less in many dimensions: safe if the metric whitens the target."""
    return 0.5 * dimension**-0.25


def _window_choice(config: WarmupConfig, warmup: Warmup) -> metrics.MetricChoice:
    """Choose a metric by the window; keep the one in use if the window is too short or gives no finite scale."""
    choice = metrics.choose(
        warmup.draws, warmup.gradients, warmup.window_count, config.candidates, config.rank
    )
    usable = warmup.window_count >= _FIRST_WINDOW
    for leaf in jax.tree.leaves((choice.metric, choice.stretch)):
        usable &= jnp.all(jnp.isfinite(leaf))
    return select(usable, choice, warmup.choice)


def _split_rhat(draws: Float[Array, "step chain d"], count: Array) -> Float[Array, ""]:
    """Return the largest R-hat over coordinates, every chain split in two; huge if a coordinate does not move."""
    half = jnp.maximum(count // 2, 1)
    index = jnp.arange(draws.shape[0])
    masks = jnp.stack([index < half, (index >= half) & (index < 2 * half)]).astype(draws.dtype)
    size = half.astype(draws.dtype)
    draws = draws - draws[0, 0]  # the difference of the squares of large numbers would cancel
    means = jnp.einsum("hs,scd->hcd", masks, draws) / size
    squares = jnp.einsum("hs,scd->hcd", masks, draws**2) / size
    within = jnp.mean(squares - means**2, axis=(0, 1))
    between = jnp.var(means, axis=(0, 1), ddof=1)
    huge = 1 / jnp.finfo(draws.dtype).eps
    ratio = jnp.where(within > between / huge, between / jnp.where(within > 0, within, 1), huge)
    return jnp.sqrt(jnp.max(1 + ratio))


def _dual_init(config: WarmupConfig, step_size: Array) -> DualAveragingAdaptationState:
    dual, _, _ = dual_averaging_adaptation(config.target_acceptance)
    return _cast(dual(step_size), step_size.dtype)


def _dual_update(config: WarmupConfig, state, acceptance_rate: Array, active: Array):
    _, dual, _ = dual_averaging_adaptation(config.target_acceptance)
    updated = _cast(dual(state, acceptance_rate), state.mu.dtype)
    return select(active, updated, state)


def _cast(state: DualAveragingAdaptationState, dtype) -> DualAveragingAdaptationState:
    numbers = {name: jnp.asarray(value).astype(dtype) for name, value in state._asdict().items()}
    return DualAveragingAdaptationState(**{**numbers, "step": jnp.asarray(state.step).astype(jnp.int32)})
