"""Fixed points of site updates: Newton's method on λ = T(λ), with damped updates where Newton's method does not help.

A Newton step solves (I − ∂T/∂λ) δ = T(λ) − λ. It costs a few products of N² operations on top of the N³ of an update,
and squares the residual near the solution. A Newton step that does not reduce the residual is undone, and some damped
updates λ + ρ(T(λ) − λ) are taken before the next attempt. Residuals are measured in posterior standard deviations, so
that the rules do not depend on units.

Where the solution maximizes a merit (the evidence lower bound, whose natural gradient a damped update follows), a step
that lowers the merit is undone as well, so that the search cannot run away from a bad start.

References:
    Kelley (1995), Iterative Methods for Linear and Nonlinear Equations, chapter 6 (inexact Newton methods).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import bicgstab

from probinfer.core.status import Status
from probinfer.core.trees import select
from probinfer.core.types import Array, Bool, Float, Int

__all__ = ["FixedPoint", "SiteUpdate", "check_settings", "default_tolerance", "find_fixed_point"]

_PATIENCE, _MAX_PATIENCE = 3, 12  # damped updates after a Newton step that did not help
_DAMPING_GROWTH, _LIMIT_DECAY, _MIN_DAMPING_LIMIT = 1.3, 0.7, 0.02
_MIN_DAMPING = 1e-5  # after steps that were undone
_MERIT_SLACK = 100.0  # machine epsilons: smaller differences of the merit are rounding
_MERIT_RESIDUAL = 1e-3  # below this residual the merit, stationary at the solution, cannot tell steps apart
_MAX_FORCING = 0.1  # relative tolerance of the first linear systems; later ones are solved to the residual


class FixedPoint(NamedTuple):
    """The end of an iteration."""

    sites: Float[Array, "2 N"]
    """Natural parameters (λ1, λ2) of the sites."""
    residual: Float[Array, ""]
    """Largest change that another update would make, in posterior standard deviations."""
    num_updates: Int[Array, ""]
    """Number of updates computed."""
    status: Int[Array, ""]
    """``Status``: ``OK``, ``MAX_ITERATIONS``, or that of the first update if it failed."""
    nodes: Any = None
    """Quadrature nodes of the update at these sites, so that they need not be found again."""


class SiteUpdate(NamedTuple):
    """An update evaluated at some sites λ."""

    change: Float[Array, "2 N"]
    """T(λ) - λ."""
    scale: Float[Array, "2 N"]
    """Factors that make changes dimensionless."""
    status: Int[Array, ""]
    """``Status`` of the marginals."""
    jacobian: Callable[[Array], Array]
    """δ ↦ ∂T/∂λ δ."""
    mean: Float[Array, " N"]
    """Marginal means m: a change in the direction (mλ2, λ2) leaves the mean unchanged."""
    is_complete: Bool[Array, ""]
    """Whether every site was updated: one that could not be updated has no change, and yet is no solution."""
    merit: Float[Array, ""]
    """What the solution maximizes; a constant if that is unknown."""
    nodes: Any
    """Quadrature nodes of the update, without derivative; None if it uses none."""


class _IterationState(NamedTuple):
    trial: Float[Array, "2 N"]  # sites to evaluate next
    is_newton: Bool[Array, ""]  # whether a Newton step led to them
    sites: Float[Array, "2 N"]  # the last accepted sites
    change: Float[Array, "2 N"]  # T(λ) − λ there
    norm: Float[Array, ""]  # Euclidean norm of the dimensionless change
    residual: Float[Array, ""]  # its largest entry
    merit: Float[Array, ""]
    nodes: Any
    damping: Float[Array, ""]  # ρ
    damping_limit: Float[Array, ""]  # of ρ: falls for good with every update that increases the residual
    newton_countdown: Int[Array, ""]  # damped updates until the next Newton step
    patience: Int[Array, ""]  # the countdown after a Newton step that fails
    num_updates: Int[Array, ""]
    status: Int[Array, ""]


def check_settings(inference: Any) -> None:
    """Check the settings that all iterative methods share.

    Raises:
        ValueError: a setting is outside its range.
    """
    name = type(inference).__name__
    if inference.num_nodes < 2 or inference.max_updates < 1:
        raise ValueError(
            f"{name} needs num_nodes >= 2 and max_updates >= 1, got {inference.num_nodes} and {inference.max_updates}"
        )
    if inference.tolerance is not None and not inference.tolerance > 0:
        raise ValueError(f"{name}.tolerance must be positive, got {inference.tolerance}")


def default_tolerance(dtype: Any) -> float:
    """Largest residual of a solution: 1e-8 in float64, 1e-4 in float32."""
    return 1e-8 if jnp.finfo(dtype).bits == 64 else 1e-4


def find_fixed_point(
    update: Callable[[Array], SiteUpdate],
    start: Float[Array, "2 N"],
    nodes: Any,
    *,
    project: Callable[[Array], Array],
    tolerance: float,
    max_updates: int,
) -> FixedPoint:
    """Iterate until the sites stop moving.

    Args:
        update: the update at given sites.
        start: the first sites.
        nodes: arrays shaped like the nodes of an update.
        project: maps sites to the nearest allowed ones.
        tolerance: largest residual of a solution.
        max_updates: maximum number of updates.

    Returns:
        The last accepted sites; if the very first update fails, with its status.
    """
    zero_change, infinite = jnp.zeros_like(start), jnp.full((), jnp.inf, start.dtype)
    count = jnp.zeros((), jnp.int32)
    state = _IterationState(
        trial=start,
        is_newton=jnp.array(False),
        sites=start,
        change=zero_change,
        norm=infinite,
        residual=infinite,
        merit=-infinite,
        nodes=nodes,
        damping=jnp.ones((), start.dtype),
        damping_limit=jnp.ones((), start.dtype),
        newton_countdown=count,
        patience=count + _PATIENCE,
        num_updates=count,
        status=count,
    )

    def is_unfinished(state):
        active = (state.residual > tolerance) & (state.status == Status.OK)
        return active & (state.num_updates < max_updates)

    state = jax.lax.while_loop(is_unfinished, lambda state: _advance(update, project, state), state)
    end = jnp.where(state.residual > tolerance, int(Status.MAX_ITERATIONS), int(Status.OK))
    status = jnp.where(state.status == Status.OK, end, state.status).astype(jnp.int32)
    return FixedPoint(
        sites=state.sites,
        residual=state.residual,
        num_updates=state.num_updates,
        status=status,
        nodes=state.nodes,
    )


def _advance(update, project, state: _IterationState) -> _IterationState:
    # Evaluate the trial
    trial = update(state.trial)
    # Measure the change around the mean: far from zero λ1 and mλ2 are large and cancel.
    scaled = trial.scale * trial.change.at[0].add(-trial.mean * trial.change[1])
    norm, residual = jnp.linalg.norm(scaled), jnp.max(jnp.abs(scaled))
    residual = jnp.where(trial.is_complete, residual, jnp.maximum(residual, 1))

    # Accept or undo
    is_valid = (trial.status == Status.OK) & jnp.isfinite(norm) & jnp.isfinite(trial.merit)
    rounding = _MERIT_SLACK * float(jnp.finfo(norm.dtype).eps) * jnp.abs(state.merit)
    not_lower = (trial.merit >= state.merit - rounding) | jnp.isinf(state.merit)
    is_valid &= not_lower | (residual < _MERIT_RESIDUAL)
    is_better = is_valid & (norm < state.norm)
    # Only a Newton step must reduce the residual; a damped update may increase it for a while.
    is_accepted = is_valid & (is_better | ~state.is_newton)
    proposed = state._replace(
        sites=state.trial,
        change=trial.change,
        norm=norm,
        residual=residual,
        merit=trial.merit,
        nodes=trial.nodes,
    )
    accepted = select(is_accepted, proposed, state)

    # Adapt the damping
    newton_failed = state.is_newton & ~is_accepted
    update_is_worse = ~state.is_newton & ~is_better
    # Without a limit that falls for good the damping recovers, fails and recovers again: a cycle.
    damping_limit = jnp.where(update_is_worse & is_valid, _LIMIT_DECAY, 1) * state.damping_limit
    damping_limit = jnp.maximum(damping_limit, _MIN_DAMPING_LIMIT).astype(state.damping_limit.dtype)
    damping = jnp.where(update_is_worse, jnp.where(is_valid, 0.5, 0.25), _DAMPING_GROWTH) * state.damping
    damping = jnp.clip(damping, _MIN_DAMPING, damping_limit)
    damping = jnp.where(state.is_newton, state.damping, damping)

    # Schedule the next Newton step: later after every failure, since each costs an update
    patience = jnp.where(newton_failed, jnp.minimum(2 * state.patience, _MAX_PATIENCE), state.patience)
    patience = jnp.where(state.is_newton & is_accepted, _PATIENCE, patience)
    countdown = jnp.where(newton_failed, patience, jnp.maximum(state.newton_countdown - 1, 0))

    # Propose the next trial
    use_newton = is_accepted & (countdown == 0)
    step = jnp.where(use_newton, _newton_step(trial, residual), damping * accepted.change)
    failure = jnp.where(trial.status == Status.OK, int(Status.NON_FINITE), trial.status)
    is_first = state.num_updates == 0
    return accepted._replace(
        trial=project(accepted.sites + step),
        is_newton=use_newton,
        damping=damping,
        damping_limit=damping_limit,
        newton_countdown=countdown,
        patience=patience,
        num_updates=state.num_updates + 1,
        status=jnp.where(is_first & ~is_valid, failure, state.status).astype(jnp.int32),
    )


def _newton_step(update: SiteUpdate, residual: Array) -> Array:
    """(I − ∂T/∂λ)⁻¹ (T(λ) − λ) to a few digits, or the full update if that is not finite."""

    def operator(x):
        return x - update.scale * update.jacobian(x / update.scale)

    # More digits than the next residual will have are wasted (an inexact Newton method).
    tolerance = jnp.minimum(_MAX_FORCING, residual)
    target = update.scale * update.change
    solution, _ = bicgstab(operator, target, x0=target, tol=tolerance, atol=0.0, maxiter=30)
    step = solution / update.scale
    return jnp.where(jnp.all(jnp.isfinite(step)), step, update.change)
