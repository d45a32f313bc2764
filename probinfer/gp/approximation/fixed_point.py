"""Fixed points of site updates: Newton's method on λ = T(λ), with damped updates where it does not help.

A Newton step solves (I − ∂T/∂λ) δ = T(λ) − λ, which costs a few products of N² operations beside the N³ of an update,
and squares the residual near the solution. A step that does not make the residual smaller is taken back; some damped
updates λ + ρ(T(λ) − λ) follow before the next is tried. Residuals are measured in posterior standard deviations, so
that the rules have no unit.

Where the sites that are looked for maximize a merit (the evidence lower bound, whose natural gradient a damped update
follows), a step that makes it smaller is taken back too, so that the search cannot run away from a bad start.

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
from probinfer.core.types import Array, Float

__all__ = ["FixedPoint", "Point", "check_settings", "default_tolerance", "find"]

_PATIENCE, _LONGEST_PATIENCE = 3, 12  # damped updates after a Newton step that did not help
_RECOVERY, _LOWERING, _SMALLEST_DAMPING = 1.3, 0.7, 0.02
_SHORTEST = 1e-5  # damping after steps that were taken back
_SLACK = 100.0  # machine epsilons of the merit that are rounding
_NEAR = 1e-3  # residuals below which the merit, stationary at the solution, says no more
_FORCING = 0.1  # the linear system is solved to this fraction at first, to the residual later


class FixedPoint(NamedTuple):
    """Where the iteration ended."""

    sites: Array
    """(2, N) the sites."""
    residual: Array
    """The largest change that another update would make, in posterior standard deviations."""
    num_updates: Array
    """Updates computed."""
    status: Array
    """``Status``: ``OK``, ``MAX_ITERATIONS``, or that of the first update where it failed."""
    nodes: Any = None
    """What the update at the sites used, so that it need not be found again."""


class Point(NamedTuple):
    """An update at some sites."""

    change: Any
    """(2, N) T(λ) - λ."""
    scale: Any
    """(2, N) factors that make changes dimensionless."""
    status: Any
    """``Status``."""
    jacobian: Callable[[Array], Array]
    """δ ↦ ∂T/∂λ δ."""
    mean: Any
    """(N,) the marginal means m: a change of (mλ2, λ2) leaves the mean where it is."""
    complete: Any
    """Whether every site could be updated: one that could not be has no change, and yet is no solution."""
    merit: Any
    """What the solution maximizes; a constant where that is not known."""
    nodes: Any
    """Quadrature nodes of the update, without derivative; None where it has none."""


class _Search(NamedTuple):
    trial: Any  # sites to evaluate next, and whether a Newton step led there
    is_newton: Any
    sites: Any  # the last accepted sites, their change, its norm and its largest entry
    change: Any
    size: Any
    residual: Any
    merit: Any
    nodes: Any
    damping: Any
    ceiling: Any  # of the damping: falls for good with every update that makes the residual larger
    wait: Any  # damped updates until the next Newton step, and how many there will be after one that fails
    patience: Any
    num_updates: Any
    status: Any


def check_settings(engine: Any) -> None:
    """Check the settings that every iterative engine has.

    Raises:
        ValueError: one is outside its range.
    """
    name = type(engine).__name__
    if engine.num_nodes < 2 or engine.max_updates < 1:
        raise ValueError(
            f"{name} needs num_nodes >= 2 and max_updates >= 1, got {engine.num_nodes} and {engine.max_updates}"
        )
    if engine.tolerance is not None and not engine.tolerance > 0:
        raise ValueError(f"{name}.tolerance must be positive, got {engine.tolerance}")


def default_tolerance(dtype: Any) -> float:
    """What a residual may be: 1e-8 in float64, 1e-4 in float32."""
    return 1e-8 if jnp.finfo(dtype).bits == 64 else 1e-4


def find(
    update: Callable[[Array], Point],
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
        nodes: of any update: for their shapes.
        project: sites to the nearest allowed ones.
        tolerance: for the residual.
        max_updates: the most updates.

    Returns:
        The last sites that were accepted. Where the very first update fails, its status.
    """
    zero, infinite = jnp.zeros_like(start), jnp.full((), jnp.inf, start.dtype)
    count = jnp.zeros((), jnp.int32)
    search = _Search(
        trial=start,
        is_newton=jnp.array(False),
        sites=start,
        change=zero,
        size=infinite,
        residual=infinite,
        merit=-infinite,
        nodes=nodes,
        damping=jnp.ones((), start.dtype),
        ceiling=jnp.ones((), start.dtype),
        wait=count,
        patience=count + _PATIENCE,
        num_updates=count,
        status=count,
    )

    def unfinished(search):
        going = (search.residual > tolerance) & (search.status == Status.OK)
        return going & (search.num_updates < max_updates)

    search = jax.lax.while_loop(unfinished, lambda search: _advance(update, project, search), search)
    stuck = jnp.where(search.residual > tolerance, int(Status.MAX_ITERATIONS), int(Status.OK))
    status = jnp.where(search.status == Status.OK, stuck, search.status).astype(jnp.int32)
    return FixedPoint(search.sites, search.residual, search.num_updates, status, search.nodes)


def _advance(update, project, search: _Search) -> _Search:
    point = update(search.trial)
    # Around the mean: far from zero λ1 and mλ2 are large and cancel.
    scaled = point.scale * point.change.at[0].add(-point.mean * point.change[1])
    size, residual = jnp.linalg.norm(scaled), jnp.max(jnp.abs(scaled))
    residual = jnp.where(point.complete, residual, jnp.maximum(residual, 1))
    valid = (point.status == Status.OK) & jnp.isfinite(size) & jnp.isfinite(point.merit)
    rounding = _SLACK * float(jnp.finfo(size.dtype).eps) * jnp.abs(search.merit)
    not_lower = (point.merit >= search.merit - rounding) | jnp.isinf(search.merit)
    valid &= not_lower | (residual < _NEAR)
    better = valid & (size < search.size)
    accepted = valid & (
        better | ~search.is_newton
    )  # a damped update may make the residual larger for a while
    moved = search._replace(
        sites=search.trial,
        change=point.change,
        size=size,
        residual=residual,
        merit=point.merit,
        nodes=point.nodes,
    )
    kept = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), moved, search)
    failed_newton = search.is_newton & ~accepted
    worse_update = ~search.is_newton & ~better
    # Without a ceiling the damping recovers, fails and recovers again: a cycle.
    ceiling = jnp.where(worse_update & valid, _LOWERING, 1) * search.ceiling
    ceiling = jnp.maximum(ceiling, _SMALLEST_DAMPING).astype(search.ceiling.dtype)
    damping = jnp.where(worse_update, jnp.where(valid, 0.5, 0.25), _RECOVERY) * search.damping
    damping = jnp.clip(damping, _SHORTEST, ceiling)
    damping = jnp.where(search.is_newton, search.damping, damping)
    patience = jnp.where(failed_newton, jnp.minimum(2 * search.patience, _LONGEST_PATIENCE), search.patience)
    patience = jnp.where(search.is_newton & accepted, _PATIENCE, patience)
    wait = jnp.where(failed_newton, patience, jnp.maximum(search.wait - 1, 0))
    use_newton = accepted & (wait == 0)
    step = jnp.where(use_newton, _newton_step(point, residual), damping * kept.change)
    failed = jnp.where(point.status == Status.OK, int(Status.NON_FINITE), point.status)
    first = search.num_updates == 0
    return kept._replace(
        trial=project(kept.sites + step),
        is_newton=use_newton,
        damping=damping,
        ceiling=ceiling,
        wait=wait,
        patience=patience,
        num_updates=search.num_updates + 1,
        status=jnp.where(first & ~valid, failed, search.status).astype(jnp.int32),
    )


def _newton_step(point: Point, residual: Array) -> Array:
    """(I − ∂T/∂λ)⁻¹ (T(λ) − λ) to a few digits, or the full update where it is not finite."""

    def operator(x):
        return x - point.scale * point.jacobian(x / point.scale)

    # No more digits than the next residual will have.
    tolerance = jnp.minimum(_FORCING, residual)
    target = point.scale * point.change
    solved, _ = bicgstab(operator, target, x0=target, tol=tolerance, atol=0.0, maxiter=30)
    step = solved / point.scale
    return jnp.where(jnp.all(jnp.isfinite(step)), step, point.change)
