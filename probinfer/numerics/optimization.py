"""Minimization without a step size: L-BFGS whose line search evaluates the objective once per iteration.

The direction is ``optax.scale_by_lbfgs``; the line search is a state machine. Every iteration evaluates value and
gradient at one trial point ``x + t d`` and then either accepts it and computes the next direction, or narrows a bracket
``low < t* < high`` of the step and tries another ``t``. So the objective is traced and compiled once, and batched
restarts do not wait for one another in nested loops. The first point is a trial of step zero, which is always accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer.core.algorithms import Algorithm, algorithm, as_partial
from probinfer.core.status import Status
from probinfer.core.trees import select
from probinfer.core.types import Array, Bool, Int, PRNGKey, PyTree, Scalar, field, pytree
from probinfer.numerics import line_search

__all__ = [
    "LBFGSInfo",
    "LBFGSState",
    "OptimizeResult",
    "continue_search",
    "lbfgs",
    "minimize",
    "search_result",
    "start_search",
]

_FLAT_STEPS = 3  # in a row: a single flat step may be a bad step


class OptimizeResult(NamedTuple):
    """The result of a minimization.

    Attributes:
        position: the last accepted iterate x.
        value: f(x).
        gradient_norm: ``max_i |g_i| max(|x_i|, 1) / max(|f|, 1)``, the number that is compared with the tolerance.
        status: a ``Status``.
        num_steps: accepted steps.
        num_evaluations: evaluations of value and gradient.
    """

    position: PyTree
    value: Scalar
    gradient_norm: Scalar
    status: Int[Array, ""]
    num_steps: Int[Array, ""]
    num_evaluations: Int[Array, ""]


class LBFGSState(NamedTuple):
    """An accepted iterate, the line through it, and the next trial.

    Attributes:
        position: the accepted iterate x.
        value: f(x).
        gradient: the gradient at x.
        direction: d, the direction of the line ``x + t d``.
        memory: the past steps and gradient changes of L-BFGS.
        line: the line search along d.
        forced: the next trial is accepted if it is finite, whatever its value.
        gradient_norm: as in ``OptimizeResult``.
        num_flat: number of flat steps in a row.
        status: a ``Status``, final if ``done``.
        done: whether the search has ended.
        num_steps: accepted steps.
        num_evaluations: evaluations of value and gradient.
    """

    position: PyTree
    value: Scalar
    gradient: PyTree
    direction: PyTree
    memory: optax.ScaleByLBFGSState
    line: line_search.LineSearch
    forced: Bool[Array, ""]
    gradient_norm: Scalar
    num_flat: Int[Array, ""]
    status: Int[Array, ""]
    done: Bool[Array, ""]
    num_steps: Int[Array, ""]
    num_evaluations: Int[Array, ""]


class LBFGSInfo(NamedTuple):
    """One evaluation.

    Attributes:
        value: of the last accepted iterate.
        gradient_norm: as in ``OptimizeResult``.
        accepted: whether this trial was accepted.
        done: whether the search has ended.
        status: a ``Status``, final if ``done``.
    """

    value: Scalar
    gradient_norm: Scalar
    accepted: Bool[Array, ""]
    done: Bool[Array, ""]
    status: Int[Array, ""]


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
        max_steps: maximum number of accepted steps.
        tolerance: bound on ``max_i |g_i| max(|x_i|, 1) / max(|f|, 1)``; by default the root of the machine
            epsilon.
        decrease: a difference of the objective that does not matter, in its own units. A step is flat if it decreases
            the objective by no more, and its slope predicts no more. ``None``: the objective has no such unit.
        memory_size: number of past steps in the memory of L-BFGS.

    Returns:
        The last accepted iterate. ``status`` is ``OK``, ``MAX_ITERATIONS``, ``LINE_SEARCH_STALLED`` (no point on the
        line has the decrease that the slope predicts) or ``NON_FINITE`` (at the first point).

    Raises:
        TypeError: the position has leaves that are not floating point.

    References:
        Liu and Nocedal (1989), algorithm 2.1; the line search is :mod:`probinfer.numerics.line_search`.
    """
    config = _config(_result_type(position), tolerance, decrease, memory_size)
    return _minimize(config, as_partial(fn), position, jnp.asarray(max_steps))


def lbfgs(fn: Callable, *, tolerance: float | None = None, memory_size: int = 10) -> Algorithm:
    """Return the minimizer as an algorithm: each step is one evaluation, and ``state.done`` says when to stop.

    Args:
        fn: differentiable function of the position.
        tolerance: see :func:`minimize`.
        memory_size: see :func:`minimize`.

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
        lambda state: _is_running(state, max_steps),
        lambda state: _advance(config, fn, state),
        _init(config, fn, position),
    )
    return search_result(state)


def _is_running(state: LBFGSState, max_steps: Any) -> Bool[Array, ""]:
    return ~state.done & (state.num_steps < max_steps)


def start_search(position: PyTree, *, memory_size: int = 10) -> LBFGSState:
    """Return the first state of ``minimize``, without an evaluation of the objective.

    Args:
        position: as in ``minimize``.
        memory_size: as in ``minimize``.
    """
    return _init(_config(_result_type(position), None, None, memory_size), None, position)


def continue_search(
    fn: Callable,
    state: LBFGSState,
    *,
    max_steps: int | Int[Array, ""],
    num_evaluations: int | Int[Array, ""],
    tolerance: float | Scalar | None = None,
    decrease: float | Scalar | None = None,
    memory_size: int = 10,
) -> tuple[LBFGSState, Bool[Array, ""]]:
    """Continue ``minimize`` up to a total number of evaluations; a search in pieces equals one without.

    Args:
        fn: as in ``minimize``.
        state: the state of ``start_search``, or of the piece before.
        max_steps: maximum number of accepted steps in total.
        num_evaluations: total number of evaluations at which the piece ends.
        tolerance: as in ``minimize``.
        decrease: as in ``minimize``.
        memory_size: as in ``minimize``.

    Returns:
        The state, and whether the search has not ended yet.
    """
    config, fn = _config(_result_type(state.position), tolerance, decrease, memory_size), as_partial(fn)
    state = jax.lax.while_loop(
        lambda state: _is_running(state, max_steps) & (state.num_evaluations < num_evaluations),
        lambda state: _advance(config, fn, state),
        state,
    )
    return state, _is_running(state, max_steps)


def search_result(state: LBFGSState) -> OptimizeResult:
    """Return the last accepted iterate of a search."""
    status = jnp.where(state.done, state.status, int(Status.MAX_ITERATIONS))
    return OptimizeResult(
        position=state.position,
        value=state.value,
        gradient_norm=state.gradient_norm,
        status=status,
        num_steps=state.num_steps,
        num_evaluations=state.num_evaluations,
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
        line=line_search.start_search(inf, zero, zero),
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
    new = select(state.done, state, _advance(config, fn, state))
    info = LBFGSInfo(
        value=new.value,
        gradient_norm=new.gradient_norm,
        accepted=new.num_steps > state.num_steps,
        done=new.done,
        status=new.status,
    )
    return new, info


def _advance(config: _Config, fn: Callable, state: LBFGSState) -> LBFGSState:
    """Evaluate one trial point, then accept it, try another step, or end the line."""
    # Evaluate the trial point.
    line = state.line
    position = jax.tree.map(lambda x, d: x + line.step.astype(x.dtype) * d, state.position, state.direction)
    value, gradient = jax.value_and_grad(fn)(position)
    value = value.astype(state.value.dtype)
    state = state._replace(num_evaluations=state.num_evaluations + 1)
    trial = line_search.LinePoint(line.step, value, _dot(gradient, state.direction))
    finite = jnp.isfinite(value) & _all_finite(gradient)
    # Accept it, or narrow the bracket; after too many trials, end the line.
    accepted = finite & (state.forced | line_search.is_accepted(line, trial))
    searched = state._replace(line=line_search.narrow_bracket(line, trial, finite))
    exhausted = state.forced | (searched.line.num_trials >= line_search.MAX_TRIALS)
    rest = select(exhausted, _end_line(config, searched), searched)
    return select(accepted, _accept(config, state, position, value, gradient), rest)


def _accept(config: _Config, state: LBFGSState, position, value, gradient) -> LBFGSState:
    """Accept a trial point: update the memory, choose the next direction, and test for convergence."""
    # A pair (position change, gradient change) without positive curvature would make the metric indefinite.
    position_change = jax.tree.map(jnp.subtract, position, state.position)
    gradient_change = jax.tree.map(jnp.subtract, gradient, state.gradient)
    epsilon = float(jnp.finfo(value.dtype).eps)
    has_curvature = _dot(position_change, gradient_change) > epsilon * jnp.sqrt(
        _dot(position_change, position_change) * _dot(gradient_change, gradient_change)
    )
    update = optax.scale_by_lbfgs(config.memory_size).update
    # The next direction; back to the gradient if it is no direction of descent.
    ascent, memory = update(gradient, state.memory, position)
    direction = jax.tree.map(jnp.negative, ascent)
    slope = _dot(gradient, direction)
    use_memory = has_curvature & (slope < 0) & jnp.isfinite(slope)
    restart = _restart(config, position, gradient)
    memory, direction, slope, step = select(
        use_memory, (memory, direction, slope, jnp.ones_like(value)), restart
    )
    # Test for convergence.
    norm = _gradient_norm(position, value, gradient)
    value_change = jnp.abs(state.value - value)
    flat = value_change <= 4 * epsilon * jnp.maximum(jnp.abs(value), 1)
    if config.decrease is not None:
        flat |= (value_change <= config.decrease) & (jnp.abs(slope * step) <= 2 * config.decrease)
    num_flat = jnp.where(flat & ~state.forced, state.num_flat + 1, 0)
    tolerance = epsilon**0.5 if config.tolerance is None else config.tolerance.astype(value.dtype)
    return state._replace(
        position=position,
        value=value,
        gradient=gradient,
        direction=direction,
        memory=memory,
        line=line_search.start_search(value, slope, step),
        forced=jnp.zeros_like(state.forced),
        gradient_norm=norm,
        num_flat=num_flat,
        done=(norm <= tolerance) | (num_flat >= _FLAT_STEPS),
        num_steps=state.num_steps + 1,
    )


def _restart(config: _Config, position, gradient) -> tuple:
    """Return an empty memory, the negative gradient, its slope, and a step of one per cent of the position."""
    memory = _empty_memory(position, config.memory_size)
    memory = memory._replace(count=memory.count + 1, params=position, updates=gradient)
    size = jnp.maximum(_max_abs(gradient), jnp.finfo(_result_type(gradient)).tiny)
    direction = jax.tree.map(lambda g: -g / size.astype(g.dtype), gradient)
    return memory, direction, _dot(gradient, direction), 0.01 * jnp.maximum(_max_abs(position), 1)


def _end_line(config: _Config, state: LBFGSState) -> LBFGSState:
    """End a line without a Wolfe point: accept ``low`` if it decreased f, else try the gradient once, else stop."""
    line = state.line
    improved = line.low.value < state.value
    memory, direction, slope, step = _restart(config, state.position, state.gradient)
    is_rounding = jnp.abs(slope) * step <= line_search.rounding(state.value)
    first_line = state.memory.count <= 1
    has_converged = jnp.zeros_like(first_line)
    if config.decrease is not None:
        has_converged = ~first_line & (jnp.abs(line.origin.slope) <= 2 * config.decrease)
        is_rounding |= has_converged
    stalled = jnp.where(is_rounding, int(Status.OK), int(Status.LINE_SEARCH_STALLED))
    accept_low = state._replace(line=line._replace(step=line.low.step), forced=jnp.ones_like(state.forced))
    steepest_descent = state._replace(
        memory=memory, direction=direction, line=line_search.start_search(state.value, slope, step)
    )
    stop = state._replace(
        done=jnp.ones_like(state.done),
        status=jnp.where(state.forced, int(Status.NON_FINITE), stalled).astype(state.status.dtype),
        num_steps=jnp.maximum(state.num_steps, 0),
    )
    ends = state.forced | ((first_line | has_converged) & ~improved)
    return select(ends, stop, select(improved, accept_low, steepest_descent))


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
