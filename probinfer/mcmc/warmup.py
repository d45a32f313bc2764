"""Warm-up of a set of chains: one metric and one step size for all, learned from all, over when they are good.

Windows of 10, 20, 40, ... steps (400 at most) end with a new metric from the pooled draws and gradients of the
window. Meanwhile the step size follows dual averaging on the mean acceptance rate of the chains. The metric stage
is over when, on a fresh window, the metric in use is as good as the one the window would choose, the whitened
target is near normal (Fisher divergence below 1 a dimension) and split R-hat of the whitened coordinates is below
1.1, or when the steps run out; then the step size alone is tuned for 50 steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.step_size import DualAveragingAdaptationState, dual_averaging_adaptation

from probinfer.mcmc import metric as metrics
from probinfer.types import Array, Bool, Float, field, pytree

__all__ = ["Warmup", "WarmupConfig", "init", "is_over", "update"]

_FIRST_WINDOW = 10
_MIN_WINDOW = 40  # of the draws that may declare the metric good
_MAX_WINDOW = 400
_NEAR_NORMAL = 1.0  # Fisher divergence a dimension; a target further from normal gets the whole warm-up
_FINAL = 50
_METRIC, _STEP_SIZE, _DONE = 0, 1, 2


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

    ``stage`` is 0 while the metric is learned, 1 while the step size alone is, 2 when all is fixed.
    """

    stage: Any
    index: Any
    step_size: Any
    choice: metrics.Choice
    dual: DualAveragingAdaptationState
    draws: Any
    gradients: Any
    count: Any
    length: Any
    rhat: Any
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
        stage=jnp.asarray(_METRIC if config.num_warmup > 0 else _DONE, jnp.int32),
        index=zero,
        step_size=step_size,
        choice=choice,
        dual=_dual_init(config, step_size),
        draws=window,
        gradients=window,
        count=zero,
        length=jnp.asarray(min(_FIRST_WINDOW, len(window)), jnp.int32),
        rhat=jnp.ones((), dtype),
        num_gradients=jnp.zeros((), jnp.int32),
    )


def update(
    config: WarmupConfig,
    warmup: Warmup,
    draws: Float[Array, "chain d"],
    gradients: Float[Array, "chain d"],
    acceptance_rate: Float[Array, " chain"],
    num_gradients: Array,
) -> Warmup:
    """Learn from one step of all chains; nothing changes once the warm-up is over.

    Args:
        config: the settings.
        warmup: the state.
        draws: positions after the step.
        gradients: of the log density there.
        acceptance_rate: of the step.
        num_gradients: evaluations the step took, all chains together.
    """
    active = warmup.stage < _DONE
    learning = warmup.stage == _METRIC
    row = jnp.where(learning, warmup.count, 0)
    index = warmup.index + active
    warmup = warmup._replace(
        index=index,
        dual=_dual_update(config, warmup.dual, jnp.mean(acceptance_rate), active),
        draws=warmup.draws.at[row].set(jnp.where(learning, draws, warmup.draws[row])),
        gradients=warmup.gradients.at[row].set(jnp.where(learning, gradients, warmup.gradients[row])),
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
        stage=jnp.where(over, _DONE, warmup.stage),
        step_size=jnp.where(over, jnp.exp(warmup.dual.log_step_size_avg), warmup.step_size),
        count=warmup.count + (warmup.stage == _STEP_SIZE),
    )


def is_over(warmup: Warmup) -> Bool[Array, ""]:
    """Say whether metric and step size are fixed."""
    return warmup.stage == _DONE


class _Learned(NamedTuple):
    stage: Any
    choice: metrics.Choice
    step_size: Any
    dual: DualAveragingAdaptationState
    count: Any
    length: Any
    rhat: Any


def _keep(config: WarmupConfig, warmup: Warmup, last: Array) -> _Learned:
    del config, last
    return _Learned(**{name: getattr(warmup, name) for name in _Learned._fields})


def _end_window(config: WarmupConfig, warmup: Warmup, last: Array) -> _Learned:
    """Choose the metric of the next window, and say whether it is the last one."""
    steps, chains, dimension = warmup.draws.shape
    choice = metrics.choose(warmup.draws, warmup.gradients, warmup.count, config.candidates, config.rank)
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
    return _Learned(
        stage=jnp.where(finished, _STEP_SIZE, _METRIC).astype(jnp.int32),
        choice=choice,
        step_size=step_size,
        dual=_dual_init(config, step_size),
        count=jnp.zeros_like(warmup.count),
        length=jnp.where(finished, _FINAL, jnp.minimum(2 * warmup.length, steps)).astype(jnp.int32),
        rhat=rhat,
    )


def _normal_step_size(dimension: int) -> float:
    """Half a standard deviation, less in many dimensions: safe where the metric whitens."""
    return 0.5 * dimension**-0.25


def _split_rhat(draws: Float[Array, "step chain d"], count: Array) -> Float[Array, ""]:
    """Return the largest R-hat over coordinates, every chain split in two."""
    half = jnp.maximum(count // 2, 1)
    index = jnp.arange(draws.shape[0])
    masks = jnp.stack([index < half, (index >= half) & (index < 2 * half)]).astype(draws.dtype)
    size = half.astype(draws.dtype)
    means = jnp.einsum("hs,scd->hcd", masks, draws) / size
    squares = jnp.einsum("hs,scd->hcd", masks, draws**2) / size
    within = jnp.mean(squares - means**2, axis=(0, 1))
    between = jnp.var(means, axis=(0, 1), ddof=1)
    return jnp.sqrt(jnp.max(1 + between / within))


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
