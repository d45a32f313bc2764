r"""Filtering one observation at a time: the state is a fixed number of arrays, however long the stream.

A step of ``online`` is a step of ``particle_filter``, so the particles and weights are the same numbers: with
``key_init, key_steps = jax.random.split(key)`` and ``keys = jax.random.split(key_steps, T)``, the calls
``init(key_init, y[0])`` and ``step(keys[t], state, y[t])``, t = 1 ... T-1, do what ``particle_filter(key, ...)`` does.
The log evidence is summed with compensation: a million steps cost float32 no digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.algorithms import Algorithm, algorithm, as_partial
from probinfer.core.errors import check_key
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, PRNGKey, field, pytree
from probinfer.numerics import weights
from probinfer.smc.filtering.filter import as_adaptive, check_counts
from probinfer.smc.filtering.forward_pass import State, first_step, next_step
from probinfer.smc.models.feynman_kac import as_batched

__all__ = ["OnlineInfo", "OnlineState", "online"]


class OnlineState(NamedTuple):
    r"""What the next observation needs; arrays of fixed shapes, to be saved, stacked or mapped over.

    Attributes:
        particles: those of the last step, leaves (N, ...).
        log_weights: (N,); the log of their mean is the log of :math:`p(y_t\mid y_{0:t-1})`.
        log_evidence: of all observations so far; minus infinity once all particles died, NaN once a weight was NaN or
            plus infinity.
        t: how many observations were taken in.
        status: ``OK``, ``DEGENERATE_WEIGHTS`` or ``NON_FINITE``. After a failure the particles stay those before it
            and further observations change nothing: begin anew, or widen the law of the observations.
        stopped_at: the step that failed, -1 if none did.
        recent: the last L + 1 records of the path of each particle, leaves (L + 1, N, ...), oldest first, weighted by
            ``log_weights``; row 0 is the state :math:`x_{t-L}` given :math:`y_{0:t}`. In the first L steps x_0 stands
            for what came before it. None where L = 0.
        log_past: log evidence without the last observation, and what its rounding lost, (2,).
    """

    particles: ArrayTree
    log_weights: Array
    log_evidence: Array
    t: Array
    status: Array
    stopped_at: Array
    recent: ArrayTree | None
    log_past: Array


class OnlineInfo(NamedTuple):
    r"""What one observation said.

    Attributes:
        log_evidence: log of the estimate of :math:`p(y_{0:t})`.
        log_predictive: log of that of :math:`p(y_t\mid y_{0:t-1})`.
        ess: effective sample size after the step, 0 after a failure.
        resampled: whether the particles come from a resampling.
        ancestors: (N,), which particle of the step before each one continues.
        status: that of the state.
    """

    log_evidence: Array
    log_predictive: Array
    ess: Array
    resampled: Array
    ancestors: Array | None
    status: Array


@pytree
class _Config:
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
    r"""Return a particle filter that takes one observation a step, in constant memory.

    ``init(key, observation) -> state`` takes in :math:`y_0`, ``step(key, state, observation) -> (state, info)`` the
    next ones. Both are compiled once for all steps, may be vmapped over keys, states and observations, and run in a
    ``lax.scan``. The number of steps is counted in 32 bits.

    Args:
        model_fn: ``model_fn(observation) -> model``, a ``FeynmanKac`` or ``BatchedFeynmanKac`` of which only the
            potential looks at the observation: ``smc.observing(initial, transition, observation)`` makes one. Bind
            parameters with ``jax.tree_util.Partial``.
        num_particles: N.
        lag: L >= 0: smooth the last L states by the paths of the particles. Costs (L + 1) N records, copied at
            every step; the larger L, the fewer distinct records the oldest row has.
        resampling: as for ``particle_filter``.
        ess_threshold: as for ``particle_filter``.

    Raises:
        TypeError: ``model_fn`` is no function, or ``lag`` no integer; at the first call: it returns no model, a key is
            none.
        ValueError: ``num_particles`` below 1, ``lag`` below 0, an unknown scheme.

    References:
        Gordon, Salmond and Smith (1993); Kitagawa and Sato (2001), fixed-lag smoothing.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from probinfer import smc
        >>> def walk(x, t): return dist.Normal(0.9 * x, 0.5)
        >>> def seen(x, t): return dist.Normal(x, 1.0)
        >>> filtering = smc.online(smc.observing(dist.Normal(0.0, 1.0), walk, seen), 100)
        >>> state = filtering.init(jax.random.key(0), 0.3)
        >>> state, info = filtering.step(jax.random.key(1), state, 1.1)
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
    config = _Config(as_partial(model_fn), as_adaptive(resampling, ess_threshold), num_particles, lag)
    return algorithm(_init, _step, config)


@jax.jit
def _init(config: _Config, key: PRNGKey, observation: ArrayTree) -> OnlineState:
    check_key(key)
    model = as_batched(config.model_fn(observation))
    first = first_step(key, model, config.num_particles, None)
    records = model.records(first.particles)
    recent = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (config.lag + 1, *leaf.shape)), records)
    return OnlineState(
        particles=first.particles,
        log_weights=first.log_weights,
        log_evidence=_or_lost(first.status, weights.log_mean_exp(first.log_weights)),
        t=jnp.int32(1),
        status=first.status,
        stopped_at=first.stopped_at,
        recent=recent if config.lag else None,
        log_past=jnp.zeros(2, first.log_weights.dtype),
    )


@jax.jit
def _step(
    config: _Config, key: PRNGKey, state: OnlineState, observation: ArrayTree
) -> tuple[OnlineState, OnlineInfo]:
    check_key(key)
    model = as_batched(config.model_fn(observation))
    zero = jnp.zeros((), state.log_weights.dtype)
    before = State(state.particles, state.log_weights, zero, zero, state.status, state.stopped_at)
    after, row = next_step(model, config.adaptive, None, False, "ancestors", before, state.t, key)
    failed = after.status != int(Status.OK)
    log_past = jnp.stack(weights.add(state.log_past[0], state.log_past[1], after.log_factor))
    log_predictive = weights.log_mean_exp(after.log_weights)
    log_evidence = _or_lost(after.status, log_past[0] + (log_past[1] + log_predictive))
    ess = weights.ess(after.log_weights)
    recent = state.recent
    if config.lag:
        recent = _shift(recent, row.ancestors, model.records(after.particles), failed)
    new = OnlineState(
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
        log_predictive=_or_lost(after.status, log_predictive),
        ess=jnp.where(failed, jnp.zeros_like(ess), ess),
        resampled=row.resampled,
        ancestors=row.ancestors,
        status=after.status,
    )
    return new, info


def _or_lost(status: Array, value: Array) -> Array:
    """The value, minus infinity after the death of all particles, NaN after a failure."""
    lost = jnp.where(status == int(Status.DEGENERATE_WEIGHTS), -jnp.inf, jnp.nan).astype(value.dtype)
    return jnp.where(status == int(Status.OK), value, lost)


def _shift(recent: ArrayTree, ancestors: Any, records: ArrayTree, failed: Array) -> ArrayTree:
    """Drop the oldest record of the paths that go on, and add the newest."""

    def one(window: Array, newest: Array) -> Array:
        return jnp.where(failed, window, jnp.concatenate([window[1:, ancestors], newest[None]]))

    return jax.tree.map(one, recent, records)
