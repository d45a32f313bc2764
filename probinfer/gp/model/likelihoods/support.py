"""The intervals that contain tilted densities, found from the likelihood alone.

The tilted density ∝ N(f; m, v) (p(y | f) / t(f))^η may lie far from the marginal N(m, v) and be much narrower, such as
that of a large count under the prior. Quadrature centered at the marginal then misses it, and its moments are noise.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.types import Array, Float, Int

__all__ = ["Interval", "concave_interval", "estimated_curvature_location", "largest_log_density"]

_LOG_DROP = 40.0  # exp(-40) = 4e-18
_MAX_DISTANCE = 15.0  # the maximum is searched within sinh(15) = 1.6e6 standard deviations
_MIN_CAVITY = 1e-6  # of c = 1 − η λ2 v, which is not positive if there is no cavity
_NUM_PARTS, _NUM_PEAK_STEPS, _NUM_END_STEPS = 16, 7, 2  # a step divides a bracket into 16 parts
_PEAK_TOLERANCE = 1.0  # nats below the maximum at which its search ends
_LOG_RANGE = 20.0  # distances from the maximum down to exp(-20) of the longest
_GRID = np.sinh(np.linspace(-4.0, 4.0, 129))  # 27 standard deviations on each side


class Interval(NamedTuple):
    """An interval around the maximum of a tilted density, in standard deviations of the marginal."""

    peak: Float[Array, "..."]
    """Location of the maximum, from the marginal mean."""
    left: Float[Array, "..."]
    """Distance from the maximum to the lower end."""
    right: Float[Array, "..."]
    """Distance from the maximum to the upper end."""


def concave_interval(
    likelihood: Any,
    y: Float[Array, "..."],
    m: Float[Array, "..."],
    v: Float[Array, "..."],
    lam1: Float[Array, "..."],
    lam2: Float[Array, "..."],
    power: float,
) -> Interval:
    """The interval outside which a log-concave tilted density is below exp(−40) of its maximum.

    The location of the maximum is accurate to one nat of the log density. The result has no derivatives.

    Args:
        likelihood: a log-concave likelihood.
        y: outputs.
        m: marginal means.
        v: marginal variances, positive.
        lam1: first natural parameters of the sites.
        lam2: their precisions.
        power: η.
    """
    data = jax.lax.stop_gradient((likelihood, y, m, jnp.sqrt(v), lam1, lam2))
    likelihood, y, m, stddev, lam1, lam2 = data
    # In z = (f − m)/√v the log density is η log p + linear · z − ½ c z².
    c = jnp.maximum(1 - power * lam2 * stddev * stddev, _MIN_CAVITY)
    linear = power * stddev * (lam2 * m - lam1)

    def log_p(z):
        return likelihood.log_density(y, m + stddev * z)

    def slope(z):
        return power * jax.jvp(log_p, (z,), (jnp.ones_like(z),))[1] + linear - c * z

    # Find the maximum
    peak = _near_maximum(slope, m)

    # Log density relative to the maximum; log p is subtracted first, because its terms in y alone may be large.
    def height(z):
        return power * (log_p(z) - log_p(peak)) + linear * (z - peak) - 0.5 * c * (z - peak) * (z + peak)

    # Find the ends: search the logarithm of the distance, in steps that are the same for all points
    sign = jnp.asarray([-1.0, 1.0], m.dtype).reshape(2, *(1,) * m.ndim)
    longest = jnp.broadcast_to(jnp.sqrt(2 * _LOG_DROP / c), (2, *m.shape))  # the end for the cavity alone

    def narrow(_, bracket):
        distance, step = bracket
        inside = height(peak + sign * distance * jnp.exp(step * _inner_points(distance))) > -_LOG_DROP
        return distance * jnp.exp(step * jnp.sum(inside, axis=0, dtype=m.dtype)), step / _NUM_PARTS

    step = jnp.asarray(_LOG_RANGE / _NUM_PARTS, m.dtype)
    distance, step = jax.lax.fori_loop(0, _NUM_END_STEPS, narrow, (longest * math.exp(-_LOG_RANGE), step))
    left, right = distance * jnp.exp(_NUM_PARTS * step)  # the upper ends of the last brackets
    return Interval(peak, left, right)


def largest_log_density(
    likelihood: Any,
    y: Float[Array, "..."],
    prior_mean: Float[Array, "..."],
    prior_stddev: Float[Array, "..."],
) -> Float[Array, "..."]:
    """The supremum over f of a concave log p(y | f) to rounding, within 10⁶ standard deviations of the prior."""
    likelihood, y, center, stddev = jax.lax.stop_gradient((likelihood, y, prior_mean, prior_stddev))

    def log_p(z):
        return likelihood.log_density(y, center + stddev * z)

    def is_increasing(u):
        z = jnp.sinh(u)
        return jax.jvp(log_p, (z,), (jnp.ones_like(z),))[1] > 0

    ends = jnp.full_like(center, _MAX_DISTANCE)
    return log_p(jnp.sinh(_last_point(is_increasing, -ends, ends, 2 * _NUM_PEAK_STEPS)))


def estimated_curvature_location(
    likelihood: Any, y: Float[Array, "..."], center: Float[Array, "..."], stddev: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The maximum of log p near a cavity and three times its width, for likelihoods without ``curvature_location``."""
    likelihood, y, center, stddev = jax.lax.stop_gradient((likelihood, y, center, stddev))

    def log_p(z):
        return likelihood.log_density(y, center + stddev * z)

    def slope(z):
        return jax.jvp(log_p, (z,), (jnp.ones_like(z),))[1]

    # Choose the best grid point, refine it between its neighbors
    grid = jnp.asarray(_GRID.reshape(-1, *(1,) * center.ndim), center.dtype)
    values = log_p(grid)
    best = jnp.argmax(jnp.where(jnp.isnan(values), -jnp.inf, values), axis=0)
    low, high = (
        jnp.asarray(_GRID, center.dtype)[jnp.clip(best + step, 0, len(_GRID) - 1)] for step in (-1, 1)
    )
    peak = _last_point(lambda z: slope(z) > 0, low, high, _NUM_PEAK_STEPS)
    curvature = -jax.jvp(slope, (peak,), (jnp.ones_like(peak),))[1]
    return center + stddev * peak, 3 * stddev * jax.lax.rsqrt(jnp.clip(curvature, 1e-2, 1e12))


class _Bracket(NamedTuple):
    low: Float[Array, "..."]  # lower ends in u, z = sinh u
    step: Float[Array, ""]  # a part of the bracket
    left_slope: Float[Array, "..."]  # at the lower end
    right_slope: Float[Array, "..."]  # at the upper end
    num_steps: Int[Array, ""]


def _near_maximum(slope, template):
    """A point at which a concave function is within a nat of its maximum, which its slopes bound.

    Args:
        slope: derivative of the function.
        template: an array of the shape and dtype of the result.
    """

    def narrow(bracket):
        # sinh of sums, by functions of the summands alone: the steps are the same for all points
        steps = bracket.step * _inner_points(bracket.low)
        slopes = slope(jnp.sinh(bracket.low) * jnp.cosh(steps) + jnp.cosh(bracket.low) * jnp.sinh(steps))
        is_increasing = slopes > 0
        return _Bracket(
            low=bracket.low + bracket.step * jnp.sum(is_increasing, axis=0, dtype=bracket.low.dtype),
            step=bracket.step / _NUM_PARTS,
            left_slope=jnp.min(jnp.where(is_increasing, slopes, bracket.left_slope), axis=0),
            right_slope=jnp.max(jnp.where(slopes <= 0, slopes, bracket.right_slope), axis=0),
            num_steps=bracket.num_steps + 1,
        )

    def is_unfinished(bracket):
        length = jnp.sinh(bracket.low + _NUM_PARTS * bracket.step) - jnp.sinh(bracket.low)
        is_near = (bracket.left_slope - bracket.right_slope) * length <= _PEAK_TOLERANCE
        return ~jnp.all(is_near) & (bracket.num_steps < _NUM_PEAK_STEPS)

    bracket = _Bracket(
        low=jnp.full_like(template, -_MAX_DISTANCE),
        step=jnp.asarray(2 * _MAX_DISTANCE / _NUM_PARTS, template.dtype),
        left_slope=jnp.full_like(template, jnp.inf),
        right_slope=jnp.full_like(template, -jnp.inf),
        num_steps=jnp.zeros((), jnp.int32),
    )
    bracket = jax.lax.while_loop(is_unfinished, narrow, bracket)
    return jnp.sinh(bracket.low + 0.5 * _NUM_PARTS * bracket.step)


def _inner_points(template):
    """1 ... 15, with as many axes behind as the template has."""
    return jnp.arange(1.0, _NUM_PARTS, dtype=template.dtype).reshape(-1, *(1,) * template.ndim)


def _last_point(predicate, low, high, num_steps):
    """The last point of an interval up to which a predicate holds: 4 binary digits a step."""

    def narrow(_, bracket):
        low, step = bracket
        count = jnp.sum(predicate(low + step * _inner_points(low)), axis=0, dtype=low.dtype)
        return low + step * count, step / _NUM_PARTS

    low, step = jax.lax.fori_loop(0, num_steps, narrow, (low, (high - low) / _NUM_PARTS))
    return low + 0.5 * _NUM_PARTS * step
