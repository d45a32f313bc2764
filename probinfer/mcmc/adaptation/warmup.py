"""Warm-up of a set of chains: one metric and one step size for all, learned from all, over when they are good.

Windows of 10, 20, 40, ... steps (400 at most) end with a new metric from the pooled draws and gradients of the
window. Meanwhile the step size follows dual averaging on the mean acceptance rate of the chains. The metric stage
is over when, on a fresh window, the metric in use is as good as the one the window would choose, the whitened
target is near normal (Fisher divergence below 1 a dimension) and split R-hat of the whitened coordinates is below
1.1, or when the steps run out; then the step size alone is tuned for 50 steps. A rest of fewer than ten draws is no
window: the metric before it stays.

A chain that a window shows in a region of negligible mass would stay there for the whole run: it goes on from where
another chain is. Its mean log density must lie below that of the heaviest chain by more than ten and log 3 a dimension,
and so must its mass, the density times the volume that the chain covered. ``num_restarts`` and ``deficits`` say so.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.step_size import DualAveragingAdaptationState, dual_averaging_adaptation

from probinfer.core.types import Array, Bool, Float, field, pytree
from probinfer.mcmc.adaptation import metric as metrics

__all__ = ["OVER", "Warmup", "WarmupConfig", "init", "is_over", "update"]

_FIRST_WINDOW = 10  # fewer draws teach no metric
_MIN_WINDOW = 40  # of the draws that may declare the metric good
_MAX_WINDOW = 400
_NEAR_NORMAL = 1.0  # Fisher divergence a dimension; a target further from normal gets the whole warm-up
_FINAL = 50
_NEGLIGIBLE = 10.0  # log of how much more mass the heaviest chain has
_WIDER = math.log(3.0)  # log of how much wider a direction may be than a window of draws showed
_METRIC, _STEP_SIZE, OVER = 0, 1, 2


@pytree
class WarmupConfig:
    """Settings of the warm-up.

    Attributes:
        candidates: (3,) booleans, the metrics that may be chosen.
        target_acceptance: mean acceptance rate that the step size aims at.
        num_warmup: the most steps of a chain.
        rank: eigenvectors of the metric.
    """

    candidates: Any
    target_acceptance: Any
    num_warmup: int = field(static=True)
    rank: int = field(static=True)


class Warmup(NamedTuple):
    """State of the warm-up: the current choice, the step size, and the window so far.

    ``stage`` is 0 while the metric is learned, 1 while the step size alone is, 2 when all is fixed. ``rows`` (chain,)
    says which chain each goes on from; ``num_restarts`` (chain,) how often it was another one, and ``deficits``
    (chain,) by how much its log density lay below the heaviest then.
    """

    stage: Any
    index: Any
    step_size: Any
    choice: metrics.Choice
    dual: DualAveragingAdaptationState
    draws: Any
    gradients: Any
    logdensities: Any
    count: Any
    length: Any
    rhat: Any
    rows: Any
    num_restarts: Any
    deficits: Any
    num_gradients: Any


def init(config: WarmupConfig, chains: int, metric: metrics.LowRankInverseMassMatrix) -> Warmup:
    """Start from a first metric and a step size that suits it if it whitens.

    Args:
        config: the settings.
        chains: how many there are.
        metric: the first metric.
    """
    dimension, dtype = metric.sigma.shape[0], metric.sigma.dtype
    window = jnp.zeros((min(_MAX_WINDOW, max(config.num_warmup, 1)), chains, dimension), dtype)
    step_size = jnp.asarray(_normal_step_size(dimension), dtype)
    zero = jnp.zeros((), jnp.int32)
    choice = metrics.Choice(metric, zero, jnp.zeros(3, dtype), jnp.ones((), dtype))
    return Warmup(
        stage=jnp.asarray(_METRIC if config.num_warmup > 0 else OVER, jnp.int32),
        index=zero,
        step_size=step_size,
        choice=choice,
        dual=_dual_init(config, step_size),
        draws=window,
        gradients=window,
        logdensities=window[..., 0],
        count=zero,
        length=jnp.asarray(min(_FIRST_WINDOW, len(window)), jnp.int32),
        rhat=jnp.ones((), dtype),
        rows=jnp.arange(chains, dtype=jnp.int32),
        num_restarts=jnp.zeros(chains, jnp.int32),
        deficits=jnp.zeros(chains, dtype),
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
    """Learn from one step of all chains; nothing changes once the warm-up is over.

    Args:
        config: the settings.
        warmup: the state.
        draws: positions after the step.
        gradients: of the log density there.
        logdensities: there.
        acceptance_rate: of the step.
        num_gradients: evaluations the step took, all chains together.
    """
    active = warmup.stage < OVER
    learning = warmup.stage == _METRIC
    row = jnp.where(learning, warmup.count, 0)
    index = warmup.index + active
    warmup = warmup._replace(
        index=index,
        dual=_dual_update(config, warmup.dual, jnp.mean(acceptance_rate), active),
        draws=warmup.draws.at[row].set(jnp.where(learning, draws, warmup.draws[row])),
        gradients=warmup.gradients.at[row].set(jnp.where(learning, gradients, warmup.gradients[row])),
        logdensities=warmup.logdensities.at[row].set(
            jnp.where(learning, logdensities, warmup.logdensities[row])
        ),
        rows=jnp.arange(len(warmup.rows), dtype=warmup.rows.dtype),
        count=warmup.count + learning,
        num_gradients=warmup.num_gradients + jnp.where(active, num_gradients, 0),
    )
    warmup = warmup._replace(
        step_size=jnp.where(active, jnp.exp(warmup.dual.log_step_size), warmup.step_size)
    )
    last = config.num_warmup - min(_FINAL, config.num_warmup // 3)
    ends = learning & ((warmup.count >= warmup.length) | (index >= last))
    learned = jax.lax.cond(ends, _end_window, _keep, config, warmup, index >= last)
    warmup = warmup._replace(**learned._asdict())
    over = (warmup.stage == _STEP_SIZE) & (warmup.count >= warmup.length)
    over = active & (over | (index >= config.num_warmup))
    return warmup._replace(
        stage=jnp.where(over, OVER, warmup.stage),
        step_size=jnp.where(over, jnp.exp(warmup.dual.log_step_size_avg), warmup.step_size),
        count=warmup.count + (warmup.stage == _STEP_SIZE),
    )


def is_over(warmup: Warmup) -> Bool[Array, ""]:
    """Say whether metric and step size are fixed."""
    return warmup.stage == OVER


class _Learned(NamedTuple):
    stage: Any
    choice: metrics.Choice
    step_size: Any
    dual: DualAveragingAdaptationState
    count: Any
    length: Any
    rhat: Any
    rows: Any
    num_restarts: Any
    deficits: Any


def _keep(config: WarmupConfig, warmup: Warmup, last: Array) -> _Learned:
    del config, last
    return _Learned(**{name: getattr(warmup, name) for name in _Learned._fields})


def _end_window(config: WarmupConfig, warmup: Warmup, last: Array) -> _Learned:
    """Choose the metric of the next window, and say whether it is the last one."""
    steps, chains, dimension = warmup.draws.shape
    choice = _learned_choice(config, warmup)
    valid = jnp.repeat(jnp.arange(steps) < warmup.count, chains)
    flat = (steps * chains, dimension)
    in_use = metrics.divergence(
        warmup.choice.metric, warmup.draws.reshape(flat), warmup.gradients.reshape(flat), valid
    )
    rhat = _split_rhat(metrics.whiten(choice.metric, warmup.draws), warmup.count)
    best = choice.divergences[choice.chosen]
    good = (in_use <= 1.25 * best + 0.1) & (best < _NEAR_NORMAL)
    finished = last | (good & (rhat < 1.1) & (warmup.length >= _MIN_WINDOW))
    average = jnp.exp(warmup.dual.log_step_size_avg)
    step_size = jnp.maximum(average, jnp.asarray(_normal_step_size(dimension), average.dtype))
    rows, deficits = _sources(metrics.whiten(choice.metric, warmup.draws), warmup.logdensities, warmup.count)
    moved = rows != warmup.rows
    return _Learned(
        stage=jnp.where(finished, _STEP_SIZE, _METRIC).astype(jnp.int32),
        choice=choice,
        step_size=step_size,
        dual=_dual_init(config, step_size),
        count=jnp.zeros_like(warmup.count),
        length=jnp.where(finished, _FINAL, jnp.minimum(2 * warmup.length, steps)).astype(jnp.int32),
        rhat=rhat,
        rows=rows,
        num_restarts=warmup.num_restarts + moved,
        deficits=jnp.where(moved, deficits, warmup.deficits),
    )


def _sources(
    whitened: Float[Array, "step chain d"], logdensities: Float[Array, "step chain"], count: Array
) -> tuple[Array, Array]:
    """Which chain each goes on from: itself, or one of the others if its own mass is negligible; its deficit."""
    steps, num_chains, dimension = whitened.shape
    weights = (jnp.arange(steps) < count).astype(whitened.dtype) / jnp.maximum(count, 1).astype(
        whitened.dtype
    )
    centred = whitened - jnp.einsum("s,scd->cd", weights, whitened)
    variances = jnp.einsum("s,scd->cd", weights, centred**2)
    levels = weights @ logdensities
    masses = levels + 0.5 * jnp.sum(jnp.log(jnp.maximum(variances, jnp.finfo(whitened.dtype).tiny)), axis=1)
    heaviest = jnp.argmax(jnp.where(jnp.isfinite(masses), masses, -jnp.inf))
    margin = _NEGLIGIBLE + _WIDER * dimension
    deficits = levels[heaviest] - levels
    lost = (deficits > margin) & (masses[heaviest] - masses > margin) & (count >= _MIN_WINDOW)
    here = jnp.arange(num_chains)
    others = jnp.argsort(lost, stable=True)[here % jnp.maximum(jnp.sum(~lost), 1)]
    return jnp.where(lost, others, here).astype(jnp.int32), deficits.astype(whitened.dtype)


def _normal_step_size(dimension: int) -> float:
    """Half a standard deviation, less in many dimensions: safe where the metric whitens."""
    return 0.5 * dimension**-0.25


def _learned_choice(config: WarmupConfig, warmup: Warmup) -> metrics.Choice:
    """The metric of a full window; that in use where the window is too short, or its draws do not tell a scale."""
    choice = metrics.choose(warmup.draws, warmup.gradients, warmup.count, config.candidates, config.rank)
    usable = warmup.count >= _FIRST_WINDOW
    for leaf in jax.tree.leaves((choice.metric, choice.stretch)):
        usable &= jnp.all(jnp.isfinite(leaf))
    return jax.tree.map(lambda new, old: jnp.where(usable, new, old), choice, warmup.choice)


def _split_rhat(draws: Float[Array, "step chain d"], count: Array) -> Float[Array, ""]:
    """Return the largest R-hat over coordinates, every chain split in two; huge where a coordinate does not move."""
    half = jnp.maximum(count // 2, 1)
    index = jnp.arange(draws.shape[0])
    masks = jnp.stack([index < half, (index >= half) & (index < 2 * half)]).astype(draws.dtype)
    size = half.astype(draws.dtype)
    draws = draws - draws[0, 0]  # squares of large numbers would cancel
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
    return jax.tree.map(lambda new, old: jnp.where(active, new, old), updated, state)


def _cast(state: DualAveragingAdaptationState, dtype) -> DualAveragingAdaptationState:
    numbers = {name: jnp.asarray(value).astype(dtype) for name, value in state._asdict().items()}
    return DualAveragingAdaptationState(**{**numbers, "step": jnp.asarray(state.step).astype(jnp.int32)})
