r"""What a pass returns, and how it is collected from the rows of its steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, Scalar
from probinfer.numerics import weights

__all__ = [
    "FilterState",
    "FilterTrace",
    "TraceRow",
    "failed_value",
    "log_evidence_of",
    "to_filter_trace",
    "with_identity_after",
]


class FilterTrace(NamedTuple):
    r"""The result of one pass: the last particles, scalars of each step, and as much of the past as was asked for.

    Attributes:
        particles: the last ones, leaves (N, ...); see ``smc.Result`` for failed steps.
        log_weights: unnormalized, (N,).
        log_evidence: :math:`\log\hat Z`; minus infinity or NaN after a failure.
        ess: effective sample sizes (T,), 0 from a failed step on.
        log_evidences: after each step, (T,).
        resampled: whether step t began with resampling, (T,).
        status: ``OK``, ``DEGENERATE_WEIGHTS`` or ``NON_FINITE``.
        stopped_at: the step that failed, -1 if none did.
        num_steps: how many steps ran.
        ancestors: (T, N), row t holds the parents of the particles of step t; None with ``store="none"``.
        records: those of step 0, leaves (N, ...), and of steps 1 ... T-1, leaves (T-1, N, ...); None unless
            ``store`` is "paths" or "history".
        past_log_weights: centered (T, N); None unless ``store`` is "history".
    """

    particles: ArrayTree
    log_weights: Float[Array, " N"]
    log_evidence: Scalar
    ess: Float[Array, " T"]
    log_evidences: Float[Array, " T"]
    resampled: Bool[Array, " T"]
    status: Int[Array, ""]
    stopped_at: Int[Array, ""]
    num_steps: Int[Array, ""]
    ancestors: Int[Array, "T N"] | None
    records: tuple[ArrayTree, ArrayTree] | None
    past_log_weights: Float[Array, "T N"] | None


class FilterState(NamedTuple):
    r"""The particles of a step and the product of the mean weights so far.

    Attributes:
        particles: leaves (N, ...).
        log_weights: centered (N,): the unnormalized log weights are larger by ``log_factor``.
        log_factor: logarithm of the common factor of the weights.
        log_compensation: what the rounding of ``log_factor`` lost.
        status: ``OK``, ``DEGENERATE_WEIGHTS`` or ``NON_FINITE``.
        stopped_at: the step that failed, -1 if none did.
    """

    particles: ArrayTree
    log_weights: Float[Array, " N"]
    log_factor: Scalar
    log_compensation: Scalar
    status: Int[Array, ""]
    stopped_at: Int[Array, ""]


class TraceRow(NamedTuple):
    """One step of a ``FilterTrace``.

    Attributes:
        ess: effective sample size of the weights before the step.
        log_evidence: of the weights before the step.
        resampled: whether the step began with resampling.
        ancestors: parents (N,) of the particles, or None.
        records: what the step adds to the paths, leaves (N, ...), or None.
        log_weights: centered (N,), after the step, or None.
    """

    ess: Scalar
    log_evidence: Scalar
    resampled: Bool[Array, ""]
    ancestors: Int[Array, " N"] | None
    records: ArrayTree | None
    log_weights: Float[Array, " N"] | None


def log_evidence_of(state: FilterState) -> Array:
    """Return the log of the estimated evidence of a state that did not fail."""
    return state.log_factor + (state.log_compensation + weights.log_mean_exp(state.log_weights))


def failed_value(status: Array, dtype: Any) -> Array:
    """Return the log evidence of a failure: minus infinity if all particles died, otherwise NaN.

    Args:
        status: of the weights.
        dtype: of the result.
    """
    return jnp.where(status == int(Status.DEGENERATE_WEIGHTS), -jnp.inf, jnp.nan).astype(dtype)


def to_filter_trace(
    state: FilterState, rows: TraceRow, num_run: Array, first_records: Any, first_log_weights: Any
) -> FilterTrace:
    """Collect the result of a pass.

    Args:
        state: the last one.
        rows: of steps 1 ... T-1, stacked.
        num_run: how many steps ran, step 0 included.
        first_records: records of step 0, or None.
        first_log_weights: centered log weights of step 0, or None.
    """
    final = log_evidence_of(state)
    steps = jnp.arange(rows.ess.shape[0] + 1)
    failed = (state.status != int(Status.OK)) & (steps >= state.stopped_at)
    failure = failed_value(state.status, final.dtype)
    ess = _append(rows.ess, weights.ess(state.log_weights), steps, num_run)
    log_evidences = _append(rows.log_evidence, final, steps, num_run)
    identity = jnp.arange(state.log_weights.shape[0], dtype=jnp.int32)
    return FilterTrace(
        particles=state.particles,
        log_weights=state.log_weights + state.log_factor,
        log_evidence=jnp.where(state.status == int(Status.OK), final, failure),
        ess=jnp.where(failed, jnp.zeros_like(ess), ess),
        log_evidences=jnp.where(failed, failure, log_evidences),
        resampled=jnp.concatenate([jnp.zeros(1, bool), rows.resampled]),
        status=state.status,
        stopped_at=state.stopped_at,
        num_steps=num_run,
        ancestors=None if rows.ancestors is None else jnp.concatenate([identity[None], rows.ancestors]),
        records=None if first_records is None else (first_records, rows.records),
        past_log_weights=_prepend(first_log_weights, rows.log_weights),
    )


def with_identity_after(rows: TraceRow, num_run: Any) -> TraceRow:
    """Make every particle its own ancestor in the rows of steps that did not run.

    Args:
        rows: of steps 1 ... T-1, with ancestors (T-1, N).
        num_run: how many steps ran, step 0 included.
    """
    ancestors: Any = rows.ancestors
    num_rows, num_particles = ancestors.shape
    not_run = jnp.arange(1, num_rows + 1)[:, None] >= num_run
    identity = jnp.arange(num_particles, dtype=jnp.int32)
    return rows._replace(ancestors=jnp.where(not_run, identity, ancestors))


def _prepend(first: Array | None, later: Array | None) -> Array | None:
    return None if first is None or later is None else jnp.concatenate([first[None], later])


def _append(rows: Array, last: Array, steps: Array, num_run: Array) -> Array:
    """Row t - 1 of ``rows`` belongs to step t - 1; ``last`` to the last step that ran and all after it."""
    return jnp.where(steps >= num_run - 1, last, jnp.concatenate([rows, last[None]]))
