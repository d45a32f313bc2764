"""A line search as a state machine: a bracket of the step, narrowed by one trial at a time.

On the line ``x + t d`` the end ``low`` has a negative slope and a value no higher than that of ``t = 0``. Beyond it
there is nothing yet, or an end ``high`` with a positive slope or a higher value, or a wall: a step whose value is not
finite. A trial is accepted under the Wolfe conditions or, where values agree to rounding, under the approximate Wolfe
conditions, which compare slopes instead of values.

References:
    Hager and Zhang (2005), "A new conjugate gradient method with guaranteed descent and an efficient line search",
    conditions T1, T2 and the bracket update of section 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Bool, Scalar

__all__ = ["MAX_TRIALS", "LineSearch", "Point", "judge", "rounding", "search", "start"]

MAX_TRIALS = 30
_SUFFICIENT_DECREASE = 1e-4
_APPROXIMATE_DECREASE = 0.1
_CURVATURE = 0.9


class Point(NamedTuple):
    """A point on the line: step ``t``, value ``f(x + t d)``, slope ``d . grad f(x + t d)``."""

    step: Any
    value: Any
    slope: Any


class LineSearch(NamedTuple):
    """The bracket and the next trial.

    ``origin`` is the point of step zero; ``bracketed`` says that ``high`` is there, ``wall`` that nothing finite is
    known of it but its step; ``width`` is that of the bracket before the last trial; ``num_trials`` counts.
    """

    origin: Point
    low: Point
    high: Point
    bracketed: Any
    wall: Any
    width: Any
    step: Any
    num_trials: Any


def start(value: Scalar, slope: Scalar, step: Scalar) -> LineSearch:
    """Begin a search along a direction of negative slope.

    Args:
        value: at the origin.
        slope: at the origin.
        step: the first trial.
    """
    zero, no = jnp.zeros_like(value), jnp.array(False)
    origin = Point(zero, value, slope)
    return LineSearch(origin, origin, Point(zero, zero, zero), no, no, zero, step, jnp.zeros((), jnp.int32))


def judge(line: LineSearch, trial: Point) -> Bool[Array, ""]:
    """Accept a trial: ``f(t) <= f(0) + c t f'(0)`` or its approximate form, and ``f'(t) >= 0.9 f'(0)``.

    Args:
        line: the search.
        trial: a point with a finite value and slope.
    """
    origin = line.origin
    decrease = trial.value <= origin.value + _SUFFICIENT_DECREASE * trial.step * origin.slope
    approximate = (trial.slope <= (2 * _APPROXIMATE_DECREASE - 1) * origin.slope) & (
        trial.value <= origin.value + rounding(origin.value)
    )
    return (decrease | approximate) & (trial.slope >= _CURVATURE * origin.slope)


def search(line: LineSearch, trial: Point, finite: Bool[Array, ""]) -> LineSearch:
    """Narrow the bracket by a rejected trial and choose the next step.

    Args:
        line: the search.
        trial: the point that was evaluated.
        finite: whether its value and gradient are finite; if not, they are not looked at.
    """
    trial = jax.tree.map(lambda x: jnp.where(finite, x, 0), trial)._replace(step=trial.step)
    is_low = finite & (trial.slope < 0) & (trial.value <= line.origin.value + rounding(line.origin.value))
    low = jax.tree.map(lambda new, old: jnp.where(is_low, new, old), trial, line.low)
    high = jax.tree.map(lambda old, new: jnp.where(is_low, old, new), line.high, trial)
    bracketed = line.bracketed | ~is_low
    wall = jnp.where(is_low, line.wall, ~finite)
    width = high.step - low.step
    slow = line.bracketed & (width > 0.6 * line.width)
    inner = jnp.where(wall, low.step + 0.3 * width, _interpolate(low, high, slow))
    return LineSearch(
        origin=line.origin,
        low=low,
        high=high,
        bracketed=bracketed,
        wall=wall,
        width=width,
        step=jnp.where(bracketed, inner, _extrapolate(line.low, low)),
        num_trials=line.num_trials + 1,
    )


def rounding(value: Scalar) -> Scalar:
    """Return ``|f| eps^(2/3)``: smaller differences of the objective are taken for noise.

    Args:
        value: of the objective.
    """
    return jnp.abs(value) * float(jnp.finfo(value.dtype).eps) ** (2 / 3)


def _interpolate(low: Point, high: Point, slow: Array) -> Array:
    """Minimise the cubic through both ends, kept off the ends; bisect when the bracket shrinks slowly."""
    width = high.step - low.step
    chord = low.slope + high.slope - 3 * (high.value - low.value) / width
    root = jnp.sqrt(jnp.maximum(chord**2 - low.slope * high.slope, 0))
    cubic = 1 - (high.slope + root - chord) / (high.slope - low.slope + 2 * root)
    secant = low.slope / (low.slope - high.slope)
    flat = jnp.abs(high.value - low.value) <= rounding(low.value)
    fraction = jnp.where(flat & (high.slope > 0), secant, cubic)
    fraction = jnp.where(slow | ~jnp.isfinite(fraction), 0.5, fraction)
    return low.step + jnp.clip(fraction, 0.1, 0.9) * width


def _extrapolate(previous: Point, low: Point) -> Array:
    """Follow the secant of the slopes beyond the last step, between twice and a hundred times as far."""
    bends = low.slope > previous.slope
    rise = jnp.where(bends, low.slope - previous.slope, 1)
    secant = low.step - low.slope * (low.step - previous.step) / rise
    return jnp.clip(jnp.where(bends, secant, 100 * low.step), 2 * low.step, 100 * low.step)
