"""A line search as a state machine: a bracket of the step, narrowed by one trial at a time.

On the line ``x + t d`` the end ``low`` has a negative slope and a value no higher than that of ``t = 0``. The other end
is unknown at first; later it is ``high``, with a positive slope or a higher value, or a wall, a step whose value is not
finite. A trial is accepted under the Wolfe conditions or, if values agree to rounding, under the approximate Wolfe
conditions, which compare slopes instead of values.

References:
    Hager and Zhang (2005), "A new conjugate gradient method with guaranteed descent and an efficient line search",
    conditions T1, T2 and the bracket update of section 4.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.trees import select
from probinfer.core.types import Array, Bool, Int, Scalar

__all__ = [
    "MAX_TRIALS",
    "LinePoint",
    "LineSearch",
    "is_accepted",
    "narrow_bracket",
    "rounding",
    "start_search",
]

MAX_TRIALS = 30
_SUFFICIENT_DECREASE = 1e-4
_APPROXIMATE_DECREASE = 0.1
_CURVATURE = 0.9


class LinePoint(NamedTuple):
    """A point on the line: step ``t``, value ``f(x + t d)``, slope ``d . grad f(x + t d)``."""

    step: Scalar
    value: Scalar
    slope: Scalar


class LineSearch(NamedTuple):
    """The bracket and the next trial.

    Attributes:
        origin: the point of step zero.
        low: the end with a negative slope.
        high: the other end, once there is one.
        bracketed: whether ``high`` is known.
        wall: whether ``high`` is a step whose value is not finite.
        width: ``high.step - low.step`` before the last trial.
        step: the next trial.
        num_trials: trials so far.
    """

    origin: LinePoint
    low: LinePoint
    high: LinePoint
    bracketed: Bool[Array, ""]
    wall: Bool[Array, ""]
    width: Scalar
    step: Scalar
    num_trials: Int[Array, ""]


def start_search(value: Scalar, slope: Scalar, step: Scalar) -> LineSearch:
    """Begin a search along a direction of negative slope.

    Args:
        value: at the origin.
        slope: at the origin.
        step: the first trial.
    """
    zero = jnp.zeros_like(value)
    origin = LinePoint(zero, value, slope)
    return LineSearch(
        origin=origin,
        low=origin,
        high=LinePoint(zero, zero, zero),
        bracketed=jnp.array(False),
        wall=jnp.array(False),
        width=zero,
        step=step,
        num_trials=jnp.zeros((), jnp.int32),
    )


def is_accepted(line: LineSearch, trial: LinePoint) -> Bool[Array, ""]:
    """Return whether ``f(t) <= f(0) + c t f'(0)``, or its approximate form, and ``f'(t) >= 0.9 f'(0)``.

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


def narrow_bracket(line: LineSearch, trial: LinePoint, finite: Bool[Array, ""]) -> LineSearch:
    """Narrow the bracket by a rejected trial and choose the next step.

    Args:
        line: the search.
        trial: the point that was evaluated.
        finite: whether its value and gradient are finite; if not, only its step is used.
    """
    trial = jax.tree.map(lambda x: jnp.where(finite, x, 0), trial)._replace(step=trial.step)
    is_low = finite & (trial.slope < 0) & (trial.value <= line.origin.value + rounding(line.origin.value))
    low = select(is_low, trial, line.low)
    high = select(is_low, line.high, trial)
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
    """Return ``|f| eps^(2/3)``: smaller differences of the objective count as rounding.

    Args:
        value: of the objective.
    """
    return jnp.abs(value) * float(jnp.finfo(value.dtype).eps) ** (2 / 3)


def _interpolate(low: LinePoint, high: LinePoint, slow: Array) -> Array:
    """Minimize the cubic through both ends, away from the ends; bisect if the bracket shrinks slowly."""
    width = high.step - low.step
    chord = low.slope + high.slope - 3 * (high.value - low.value) / width
    root = jnp.sqrt(jnp.maximum(chord**2 - low.slope * high.slope, 0))
    cubic = 1 - (high.slope + root - chord) / (high.slope - low.slope + 2 * root)
    secant = low.slope / (low.slope - high.slope)
    flat = jnp.abs(high.value - low.value) <= rounding(low.value)
    fraction = jnp.where(flat & (high.slope > 0), secant, cubic)
    fraction = jnp.where(slow | ~jnp.isfinite(fraction), 0.5, fraction)
    return low.step + jnp.clip(fraction, 0.1, 0.9) * width


def _extrapolate(previous: LinePoint, low: LinePoint) -> Array:
    """Follow the secant of the slopes beyond the last step, between twice and a hundred times as far."""
    bends = low.slope > previous.slope
    rise = jnp.where(bends, low.slope - previous.slope, 1)
    secant = low.step - low.slope * (low.step - previous.step) / rise
    return jnp.clip(jnp.where(bends, secant, 100 * low.step), 2 * low.step, 100 * low.step)
