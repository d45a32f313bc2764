"""Fixed points of site updates: damped steps, accelerated, with a retreat.

The sites satisfy λ = T(λ). A damped step is λ + ρ(T(λ) − λ). Anderson's acceleration replaces it by the step that a
least-squares fit of the last few residuals suggests; where that makes the residual grow, or leaves the region where
the approximation exists, the search goes back to the best sites so far and takes a smaller plain step. Residuals are
measured in posterior standard deviations, so that the rule has no unit.

References:
    Walker and Ni (2011), "Anderson acceleration for fixed-point iterations", algorithm AA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.base import Status
from probinfer.types import Array, Float

__all__ = ["FixedPoint", "default_tolerance", "find"]

_MEMORY = 6
_GROWTH = 2.0  # a residual may grow by so much from one step to the next
_SMALLEST_STEP = 0.02


class FixedPoint(NamedTuple):
    """Where the iteration ended."""

    sites: Array
    """(2, N) the best sites found."""
    residual: Array
    """The largest change that another update would make, in posterior standard deviations."""
    num_updates: Array
    """Updates computed."""
    status: Array
    """``Status``: ``OK``, ``MAX_ITERATIONS``, or that of the first update where it failed."""


class _Search(NamedTuple):
    trial: Any  # sites to evaluate next
    sites: Any  # the last accepted sites, their change, scale and residual
    change: Any
    scale: Any
    residual: Any
    sites_memory: Any  # differences of accepted sites and of their changes
    change_memory: Any
    num_stored: Any
    step: Any
    num_updates: Any
    status: Any


def default_tolerance(dtype: Any) -> float:
    """What a residual may be: 1e-8 in float64, 1e-4 in float32."""
    return 1e-8 if jnp.finfo(dtype).bits == 64 else 1e-4


def find(
    update: Callable[[Array], tuple[Array, Array, Array]],
    start: Float[Array, "2 N"],
    *,
    project: Callable[[Array], Array],
    step: float,
    tolerance: float,
    max_updates: int,
) -> FixedPoint:
    """Iterate ``update`` until the sites stop moving.

    Args:
        update: sites to (the change that a full step makes, the scale that makes changes dimensionless, a status).
        start: the first sites.
        project: sites to the nearest allowed ones.
        step: damping ρ of the first steps.
        tolerance: for the residual.
        max_updates: the most updates.

    Returns:
        The best sites. Where the very first update fails, its status.
    """
    change, scale, status = update(start)
    empty = jnp.zeros((_MEMORY, *start.shape), start.dtype)
    residual = _size(change, scale, status)
    search = _Search(
        trial=project(start + step * change),
        sites=start,
        change=change,
        scale=scale,
        residual=residual,
        sites_memory=empty,
        change_memory=empty,
        num_stored=jnp.zeros((), jnp.int32),
        step=jnp.asarray(step, start.dtype),
        num_updates=jnp.ones((), jnp.int32),
        status=jnp.where(jnp.isfinite(residual), int(Status.OK), jnp.maximum(status, int(Status.NON_FINITE))),
    )

    def unfinished(search):
        going = (search.residual > tolerance) & (search.status == Status.OK)
        return going & (search.num_updates < max_updates)

    search = jax.lax.while_loop(unfinished, lambda search: _advance(update, project, search), search)
    stuck = jnp.where(search.residual > tolerance, int(Status.MAX_ITERATIONS), int(Status.OK))
    status = jnp.where(search.status == Status.OK, stuck, search.status).astype(jnp.int32)
    return FixedPoint(search.sites, search.residual, search.num_updates, status)


def _advance(update, project, search: _Search) -> _Search:
    change, scale, status = update(search.trial)
    residual = _size(change, scale, status)
    at_floor = search.step <= _SMALLEST_STEP
    allowed = (residual <= _GROWTH * search.residual) | at_floor
    accepted = jnp.isfinite(residual) & allowed
    moved = _accept(search, change, scale, residual)
    smaller = jnp.maximum(0.5 * search.step, 0.5 * _SMALLEST_STEP)
    back = search._replace(
        trial=search.sites + smaller * search.change,
        num_stored=jnp.zeros_like(search.num_stored),
        step=smaller,
    )
    chosen = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), moved, back)
    return chosen._replace(trial=project(chosen.trial), num_updates=search.num_updates + 1)


def _accept(search: _Search, change, scale, residual) -> _Search:
    place = search.num_stored % _MEMORY
    sites_memory = search.sites_memory.at[place].set(search.trial - search.sites)
    change_memory = search.change_memory.at[place].set(change - search.change)
    num_stored = search.num_stored + 1
    used = (jnp.arange(_MEMORY) < num_stored).astype(change.dtype)
    steps, bends = (memory * used[:, None, None] for memory in (sites_memory, change_memory))
    weights = _least_squares(bends * scale, change * scale)
    correction = jnp.tensordot(weights, steps + search.step * bends, 1)
    return search._replace(
        trial=search.trial + search.step * change - correction,
        sites=search.trial,
        change=change,
        scale=scale,
        residual=residual,
        sites_memory=sites_memory,
        change_memory=change_memory,
        num_stored=num_stored,
    )


def _least_squares(rows: Array, target: Array) -> Array:
    """Weights w of least |target − Σ_k w_k rows_k|², rows of zeros getting zero."""
    rows, target = rows.reshape(len(rows), -1), target.ravel()
    size = jnp.sqrt(jnp.sum(rows * rows, 1))
    unit = rows / jnp.where(size > 0, size, 1)[:, None]
    gram = unit @ unit.T + 10 * float(jnp.finfo(rows.dtype).eps) * len(rows) * jnp.eye(len(rows), dtype=rows.dtype)
    gram = gram + jnp.diag((size == 0).astype(rows.dtype))
    return jnp.linalg.solve(gram, unit @ target) / jnp.where(size > 0, size, 1)


def _size(change, scale, status) -> Array:
    largest = jnp.max(jnp.abs(change * scale))
    return jnp.where((status == Status.OK) & jnp.isfinite(largest), largest, jnp.inf)
