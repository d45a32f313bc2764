r"""Filtering one observation at a time: the state has the same arrays however long the stream is.

A step of ``online`` is a step of ``particle_filter``, so the particles and weights are the same numbers: with
``key_init, key_steps = jax.random.split(key)`` and ``keys = jax.random.split(key_steps, T)``, the calls
``init(key_init, y[0])`` and ``step(keys[t], state, y[t])``, t = 1 ... T-1, do what ``particle_filter(key, ...)`` does.
The log evidence is a compensated sum: a million steps lose no digits in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.algorithms import Algorithm, algorithm, as_partial
from probinfer.core.arguments import check_key
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, PRNGKey, Scalar, field, pytree
from probinfer.numerics import weights
from probinfer.smc.filtering.filter import as_adaptive, check_counts
from probinfer.smc.filtering.forward_pass import first_step, next_step
from probinfer.smc.filtering.traces import FilterState, failed_value
from probinfer.smc.models.feynman_kac import as_batched

__all__ = ["OnlineInfo", "OnlineState", "online"]


class OnlineState(NamedTuple):
    r"""Weighted particles after an observation, in arrays of fixed shapes, to be saved, stacked or mapped over.

    Attributes:
        particles: those of the last step, leaves (N, ...).
        log_weights: (N,); the log of their mean is the log of :math:`p(y_t\mid y_{0:t-1})`.
        log_evidence: of all observations so far; minus infinity once all particles died, NaN once a weight was NaN or
            plus infinity.
        t: how many observations were processed.
        status: ``OK``, ``DEGENERATE_WEIGHTS`` or ``NON_FINITE``. After a failure the particles stay those before it
            and further observations change nothing: start again, or widen the distribution of the observations.
        stopped_at: the step that failed, -1 if none did.
        recent: the last L + 1 records of the path of each particle, leaves (L + 1, N, ...), oldest first, weighted by
            ``log_weights``; row 0 is the state :math:`x_{t-L}` given :math:`y_{0:t}`. In the first L steps x_0 fills
            the rows before it. None if L = 0.
        log_past: log evidence without the last observation, and what its rounding lost, (2,).
    """

    particles: ArrayTree
    log_weights: Float[Array, " N"]
    log_evidence: Scalar
    t: Int[Array, ""]
    status: Int[Array, ""]
    stopped_at: Int[Array, ""]
    recent: ArrayTree | None
    log_past: Float[Array, " 2"]


class OnlineInfo(NamedTuple):
    r"""Diagnostics of one step.

    Attributes:
        log_evidence: log of the estimate of :math:`p(y_{0:t})`.
        log_predictive: log of the estimate of :math:`p(y_t\mid y_{0:t-1})`.
        ess: effective sample size after the step, 0 after a failure.
        resampled: whether the step began with resampling.
        ancestors: (N,), the parents of the particles, in the previous step.
        status: that of the state.
    """

    log_evidence: Scalar
    log_predictive: Scalar
    ess: Scalar
    resampled: Bool[Array, ""]
    ancestors: Int[Array, " N"] | None
    status: Int[Array, ""]


@pytree
class _OnlineConfig:
    model_fn: Any
    adaptive: Any
    num_particles: int = field(static=True)
    lag: int = field(static=True)


def online(
    model_fn: Any,
    num_particles: int,
    *,
    lag: int = 0,
    resampling: Any = "systematic",
    ess_threshold: Any = 0.5,
) -> Algorithm:
    r"""Return a particle filter that takes one observation per step, in constant memory.

    ``init(key, observation) -> state`` processes :math:`y_0`, ``step(key, state, observation) -> (state, info)`` each
    later observation. Both are compiled once for all steps, vmap over keys, states and observations, and run in a
    ``lax.scan``. The number of steps is counted in 32 bits.

    Args:
        model_fn: ``model_fn(observation) -> model``, a ``FeynmanKac`` or ``BatchedFeynmanKac`` of which only the
            potential depends on the observation: ``smc.observing(initial, transition, observation)`` makes one. Bind
            parameters with ``jax.tree_util.Partial``.
        num_particles: N.
        lag: L >= 0: smooth the last L states by the paths of the particles. Costs (L + 1) N records, copied at
            every step; the larger L, the fewer distinct records the oldest row has.
        resampling: as for ``particle_filter``.
        ess_threshold: as for ``particle_filter``.

    Raises:
        TypeError: ``model_fn`` is not a function, or ``lag`` not an integer; at the first call: ``model_fn`` returns
            something other than a model, or ``key`` is not a key.
        ValueError: ``num_particles`` below 1, ``lag`` below 0, an unknown scheme.

    References:
        Gordon, Salmond and Smith (1993); Kitagawa and Sato (2001), fixed-lag smoothing.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from probinfer import smc
        >>> def walk(x, t): return dist.Normal(0.9 * x, 0.5)
        >>> def observe(x, t): return dist.Normal(x, 1.0)
        >>> online_filter = smc.online(smc.observing(dist.Normal(0.0, 1.0), walk, observe), 100)
        >>> state = online_filter.init(jax.random.key(0), 0.3)
        >>> state, info = online_filter.step(jax.random.key(1), state, 1.1)
        >>> int(state.t)
        2
    """
    if not callable(model_fn):
        raise TypeError(
            f"model_fn must be a function observation -> model, got {type(model_fn).__name__}; for a state-space "
            f"model write smc.observing(initial, transition, observation)"
        )
    check_counts(num_particles=num_particles)
    if isinstance(lag, bool) or not isinstance(lag, int):
        raise TypeError(f"lag must be a Python int (it is a shape), got {type(lag).__name__}")
    if lag < 0:
        raise ValueError(f"lag must be 0 (no smoothing) or more, got {lag}")
    config = _OnlineConfig(
        model_fn=as_partial(model_fn),
        adaptive=as_adaptive(resampling, ess_threshold),
        num_particles=num_particles,
        lag=lag,
    )
    return algorithm(_init, _step, config)


@jax.jit
def _init(config: _OnlineConfig, key: PRNGKey, observation: ArrayTree) -> OnlineState:
    check_key(key)
    model = as_batched(config.model_fn(observation))
    first = first_step(key, model, config.num_particles, None)
    records = model.records(first.particles)
    recent = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (config.lag + 1, *leaf.shape)), records)
    return OnlineState(
        particles=first.particles,
        log_weights=first.log_weights,
        log_evidence=_or_failed_value(first.status, weights.log_mean_exp(first.log_weights)),
        t=jnp.int32(1),
        status=first.status,
        stopped_at=first.stopped_at,
        recent=recent if config.lag else None,
        log_past=jnp.zeros(2, first.log_weights.dtype),
    )


@jax.jit
def _step(
    config: _OnlineConfig, key: PRNGKey, state: OnlineState, observation: ArrayTree
) -> tuple[OnlineState, OnlineInfo]:
    check_key(key)
    model = as_batched(config.model_fn(observation))
    zero = jnp.zeros((), state.log_weights.dtype)
    before = FilterState(
        particles=state.particles,
        log_weights=state.log_weights,
        log_factor=zero,
        log_compensation=zero,
        status=state.status,
        stopped_at=state.stopped_at,
    )
    after, row = next_step(model, config.adaptive, None, False, "ancestors", before, state.t, key)

    # The sum takes the predictive density of the previous observation; that of this one is still in the weights
    failed = after.status != int(Status.OK)
    log_past = jnp.stack(weights.add_compensated(state.log_past[0], state.log_past[1], after.log_factor))
    log_predictive = weights.log_mean_exp(after.log_weights)
    log_evidence = _or_failed_value(after.status, log_past[0] + (log_past[1] + log_predictive))
    ess = weights.ess(after.log_weights)
    recent = state.recent
    if config.lag:
        recent = _shift_window(recent, row.ancestors, model.records(after.particles), failed)
    new_state = OnlineState(
        particles=after.particles,
        log_weights=after.log_weights,
        log_evidence=log_evidence,
        t=state.t + 1,
        status=after.status,
        stopped_at=after.stopped_at,
        recent=recent,
        log_past=log_past,
    )
    info = OnlineInfo(
        log_evidence=log_evidence,
        log_predictive=_or_failed_value(after.status, log_predictive),
        ess=jnp.where(failed, jnp.zeros_like(ess), ess),
        resampled=row.resampled,
        ancestors=row.ancestors,
        status=after.status,
    )
    return new_state, info


def _or_failed_value(status: Array, value: Array) -> Array:
    """Return the value, minus infinity after the death of all particles, NaN after another failure."""
    return jnp.where(status == int(Status.OK), value, failed_value(status, value.dtype))


def _shift_window(recent: ArrayTree, ancestors: Any, records: ArrayTree, failed: Array) -> ArrayTree:
    """Drop the oldest record of the surviving paths and append the newest one."""

    def shift(window: Array, newest: Array) -> Array:
        return jnp.where(failed, window, jnp.concatenate([window[1:, ancestors], newest[None]]))

    return jax.tree.map(shift, recent, records)
