"""Minimisation without a step size: L-BFGS whose line search evaluates the objective once a loop iteration.

The direction is ``optax.scale_by_lbfgs``; the line search is a state machine. Every iteration of the loop
evaluates value and gradient at one trial point ``x + t d`` and then decides: accept it and turn, or keep a
bracket ``low < t* < high`` of the step and try another ``t``. So the objective is traced and compiled once,
and batched restarts do not wait for one another in nested loops. The first point is itself a forced
acceptance of step zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer.core.algorithms import Algorithm, algorithm, as_partial
from probinfer.core.status import Status
from probinfer.core.types import Array, Bool, Int, PRNGKey, PyTree, Scalar, field, pytree
from probinfer.numerics import line_search

__all__ = ["LBFGSInfo", "LBFGSState", "OptimizeResult", "begin", "descend", "lbfgs", "minimize", "result"]

_FLAT_STEPS = 3  # in a row; a single one may be a bad step


class OptimizeResult(NamedTuple):
    """Where the minimisation ended.

    ``gradient_norm`` is ``max_i |g_i| max(|x_i|, 1) / max(|f|, 1)``, the number compared with the tolerance.
    """

    position: Any
    value: Any
    gradient_norm: Any
    status: Any
    num_steps: Any
    num_evaluations: Any


class LBFGSState(NamedTuple):
    """An accepted iterate, the line through it, and the trial that comes next."""

    position: Any
    value: Any
    gradient: Any
    direction: Any
    memory: optax.ScaleByLBFGSState
    line: line_search.LineSearch
    forced: Any
    gradient_norm: Any
    num_flat: Any
    status: Any
    done: Any
    num_steps: Any
    num_evaluations: Any


class LBFGSInfo(NamedTuple):
    """One evaluation: the accepted value so far, and whether the trial was accepted."""

    value: Any
    gradient_norm: Any
    accepted: Any
    done: Any
    status: Any


@pytree
class _Config:
    tolerance: Any  # None: the root of the machine epsilon
    decrease: Any  # None: only the rounding of the objective
    memory_size: int = field(static=True, default=10)


def minimize(
    fn: Callable,
    position: PyTree,
    *,
    max_steps: int | Int[Array, ""] = 1000,
    tolerance: float | Scalar | None = None,
    decrease: float | Scalar | None = None,
    memory_size: int = 10,
) -> OptimizeResult:
    """Find ``argmin_x f(x)`` by L-BFGS.

    The search ends when the scaled gradient is below the tolerance, when three steps in a row decrease the
    objective by no more than its rounding or than ``decrease``, or when no step along the negative gradient decreases
    it.

    Args:
        fn: differentiable function of the position. A ``Partial`` or another callable pytree brings its
            arrays as data: the same function with new arrays traces nothing.
        position: pytree of floating-point arrays, finite value required.
        max_steps: the most accepted steps.
        tolerance: bound on ``max_i |g_i| max(|x_i|, 1) / max(|f|, 1)``; by default the root of the machine
            epsilon.
        decrease: a difference of the objective that does not matter, in its own units; a step also has to promise no
            more by its slope. ``None``: for objectives without such a unit.
        memory_size: past steps that shape the metric.

    Returns:
        The last accepted iterate. ``status`` is ``OK``, ``MAX_ITERATIONS``, ``LINE_SEARCH_STALLED`` (the
        decrease the slope promises was not found anywhere on the line) or ``NON_FINITE`` (at the start).

    Raises:
        TypeError: the position has leaves that are not floating point.

    References:
        Liu and Nocedal (1989), algorithm 2.1; the line search is :mod:`probinfer.numerics.line_search`.
    """
    config = _config(_result_type(position), tolerance, decrease, memory_size)
    return _minimize(config, as_partial(fn), position, jnp.asarray(max_steps))


def lbfgs(fn: Callable, *, tolerance: float | None = None, memory_size: int = 10) -> Algorithm:
    """Return the minimiser as an algorithm: each step is one evaluation, ``state.done`` says when to stop.

    Args:
        fn: differentiable function of the position.
        tolerance: see :func:`minimize`.
        memory_size: past steps that shape the metric.

    Returns:
        ``init(position)`` and ``step(key, state)``; the key is not used.
    """
    config = _config(jnp.result_type(float), tolerance, None, memory_size)
    return algorithm(_init, _step, config, as_partial(fn))


def _config(dtype, tolerance, decrease, memory_size: int) -> _Config:
    tolerance, decrease = (None if b is None else jnp.asarray(b, dtype) for b in (tolerance, decrease))
    return _Config(tolerance, decrease, memory_size)


@jax.jit
def _minimize(config: _Config, fn: Callable, position: PyTree, max_steps: jax.Array) -> OptimizeResult:
    state = jax.lax.while_loop(
        lambda state: _unfinished(state, max_steps),
        lambda state: _advance(config, fn, state),
        _init(config, fn, position),
    )
    return result(state)


def _unfinished(state: LBFGSState, max_steps: Any) -> Bool[Array, ""]:
    return ~state.done & (state.num_steps < max_steps)


def begin(position: PyTree, *, memory_size: int = 10) -> LBFGSState:
    """Return the state of ``minimize`` at its start; nothing is evaluated.

    Args:
        position: as in ``minimize``, like ``memory_size``.
        memory_size: past steps that shape the metric.
    """
    return _init(_config(_result_type(position), None, None, memory_size), None, position)


def descend(
    fn: Callable,
    state: LBFGSState,
    *,
    max_steps: int | Int[Array, ""],
    num_evaluations: int | Int[Array, ""],
    tolerance: float | Scalar | None = None,
    decrease: float | Scalar | None = None,
    memory_size: int = 10,
) -> tuple[LBFGSState, Bool[Array, ""]]:
    """Go on with ``minimize`` until so many evaluations were made, all in all: a piece of it, equal to the whole.

    Args:
        fn: as in ``minimize``, like what is not named here.
        state: of ``begin`` or of another piece.
        max_steps: the most accepted steps, all in all.
        num_evaluations: where the piece ends.
        tolerance: as in ``minimize``.
        decrease: as in ``minimize``.
        memory_size: past steps that shape the metric.

    Returns:
        The state, and whether there is more to do.
    """
    config, fn = _config(_result_type(state.position), tolerance, decrease, memory_size), as_partial(fn)
    state = jax.lax.while_loop(
        lambda state: _unfinished(state, max_steps) & (state.num_evaluations < num_evaluations),
        lambda state: _advance(config, fn, state),
        state,
    )
    return state, _unfinished(state, max_steps)


def result(state: LBFGSState) -> OptimizeResult:
    """Return the last accepted iterate of a search.

    Args:
        state: of the search.
    """
    status = jnp.where(state.done, state.status, int(Status.MAX_ITERATIONS))
    return OptimizeResult(
        state.position, state.value, state.gradient_norm, status, state.num_steps, state.num_evaluations
    )


def _init(config: _Config, fn: Any, position: PyTree) -> LBFGSState:
    dtype = _result_type(position)
    position = jax.tree.map(jnp.asarray, position)
    zeros = jax.tree.map(jnp.zeros_like, position)
    zero, inf = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
    count = jnp.zeros((), jnp.int32)
    return LBFGSState(
        position=position,
        value=inf,
        gradient=zeros,
        direction=zeros,
        memory=_empty_memory(position, config.memory_size),
        line=line_search.start(inf, zero, zero),
        forced=jnp.array(True),
        gradient_norm=inf,
        num_flat=count,
        status=count,
        done=jnp.array(False),
        num_steps=count - 1,
        num_evaluations=count,
    )


def _step(config: _Config, fn: Callable, key: PRNGKey, state: LBFGSState) -> tuple[LBFGSState, LBFGSInfo]:
    del key
    new = jax.tree.map(lambda old, new: jnp.where(state.done, old, new), state, _advance(config, fn, state))
    accepted = new.num_steps > state.num_steps
    return new, LBFGSInfo(new.value, new.gradient_norm, accepted, new.done, new.status)


def _advance(config: _Config, fn: Callable, state: LBFGSState) -> LBFGSState:
    """Evaluate one trial point, then accept it, try another step, or give the line up."""
    line = state.line
    position = jax.tree.map(lambda x, d: x + line.step.astype(x.dtype) * d, state.position, state.direction)
    value, gradient = jax.value_and_grad(fn)(position)
    value = value.astype(state.value.dtype)
    state = state._replace(num_evaluations=state.num_evaluations + 1)
    trial = line_search.Point(line.step, value, _dot(gradient, state.direction))
    finite = jnp.isfinite(value) & _all_finite(gradient)
    accepted = finite & (state.forced | line_search.judge(line, trial))
    searched = state._replace(line=line_search.search(line, trial, finite))
    exhausted = state.forced | (searched.line.num_trials >= line_search.MAX_TRIALS)
    rest = _select(exhausted, _give_up(config, searched), searched)
    return _select(accepted, _turn(config, state, position, value, gradient), rest)


def _turn(config: _Config, state: LBFGSState, position, value, gradient) -> LBFGSState:
    """Accept a trial point: update the metric, choose the next direction, judge convergence."""
    moved = jax.tree.map(jnp.subtract, position, state.position)
    bent = jax.tree.map(jnp.subtract, gradient, state.gradient)
    epsilon = float(jnp.finfo(value.dtype).eps)
    curved = _dot(moved, bent) > epsilon * jnp.sqrt(_dot(moved, moved) * _dot(bent, bent))
    update = optax.scale_by_lbfgs(config.memory_size).update
    ascent, memory = update(gradient, state.memory, position)
    direction = jax.tree.map(jnp.negative, ascent)
    slope = _dot(gradient, direction)
    good = curved & (slope < 0) & jnp.isfinite(slope)
    restart = _restart(config, position, gradient)
    memory, direction, slope, step = _select(good, (memory, direction, slope, jnp.ones_like(value)), restart)
    norm = _gradient_norm(position, value, gradient)
    gained = jnp.abs(state.value - value)
    flat = gained <= 4 * epsilon * jnp.maximum(jnp.abs(value), 1)
    if config.decrease is not None:
        flat |= (gained <= config.decrease) & (jnp.abs(slope * step) <= 2 * config.decrease)
    num_flat = jnp.where(flat & ~state.forced, state.num_flat + 1, 0)
    tolerance = epsilon**0.5 if config.tolerance is None else config.tolerance.astype(value.dtype)
    return state._replace(
        position=position,
        value=value,
        gradient=gradient,
        direction=direction,
        memory=memory,
        line=line_search.start(value, slope, step),
        forced=jnp.zeros_like(state.forced),
        gradient_norm=norm,
        num_flat=num_flat,
        done=(norm <= tolerance) | (num_flat >= _FLAT_STEPS),
        num_steps=state.num_steps + 1,
    )


def _restart(config: _Config, position, gradient) -> tuple:
    """Forget the past: memory, negative gradient, slope, and a first step of one per cent of the position."""
    memory = _empty_memory(position, config.memory_size)
    memory = memory._replace(count=memory.count + 1, params=position, updates=gradient)
    size = jnp.maximum(_max_abs(gradient), jnp.finfo(_result_type(gradient)).tiny)
    direction = jax.tree.map(lambda g: -g / size.astype(g.dtype), gradient)
    return memory, direction, _dot(gradient, direction), 0.01 * jnp.maximum(_max_abs(position), 1)


def _give_up(config: _Config, state: LBFGSState) -> LBFGSState:
    """End a search without a Wolfe point: take ``low`` if it moved, else the gradient once, else stop."""
    line = state.line
    improved = line.low.value < state.value
    memory, direction, slope, step = _restart(config, state.position, state.gradient)
    promised = jnp.abs(slope) * step <= line_search.rounding(state.value)
    fresh = state.memory.count <= 1
    settled = jnp.zeros_like(fresh)
    if config.decrease is not None:
        settled = ~fresh & (jnp.abs(line.origin.slope) <= 2 * config.decrease)
        promised |= settled
    stalled = jnp.where(promised, int(Status.OK), int(Status.LINE_SEARCH_STALLED))
    retry = state._replace(line=line._replace(step=line.low.step), forced=jnp.ones_like(state.forced))
    plain = state._replace(
        memory=memory, direction=direction, line=line_search.start(state.value, slope, step)
    )
    stop = state._replace(
        done=jnp.ones_like(state.done),
        status=jnp.where(state.forced, int(Status.NON_FINITE), stalled).astype(state.status.dtype),
        num_steps=jnp.maximum(state.num_steps, 0),
    )
    ends = state.forced | ((fresh | settled) & ~improved)
    return _select(ends, stop, _select(improved, retry, plain))


def _empty_memory(position, memory_size: int) -> optax.ScaleByLBFGSState:
    memory = optax.scale_by_lbfgs(memory_size).init(position)
    return memory._replace(weights_memory=memory.weights_memory.astype(_result_type(position)))


def _gradient_norm(position, value, gradient) -> jax.Array:
    scaled = jax.tree.map(lambda g, x: g * jnp.maximum(jnp.abs(x), 1), gradient, position)
    return _max_abs(scaled) / jnp.maximum(jnp.abs(value), 1)


def _dot(a, b) -> jax.Array:
    return jnp.sum(
        jnp.stack([jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)])
    )


def _max_abs(tree) -> jax.Array:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(tree)]))


def _all_finite(tree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def _select(condition, yes, no):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _result_type(tree) -> jnp.dtype:
    """Return the common dtype of the leaves.

    Raises:
        TypeError: a leaf is not floating point.
    """
    dtype = jnp.result_type(*jax.tree.leaves(tree))
    if not all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in jax.tree.leaves(tree)):
        raise TypeError(
            f"the position must have floating-point leaves, got {jax.tree.map(jnp.result_type, tree)}; "
            "convert them, for example with jnp.asarray(x, float)"
        )
    return dtype
