"""Where tilted densities are: the interval that holds one, found from the likelihood alone.

The tilted density ∝ N(f; m, v) (p(y | f) / t(f))^η may lie far from the marginal N(m, v) and be much narrower, as that
of a large count under the prior is. Quadrature that is centered at the marginal then sees nothing of it, and the
moments that it gives are noise.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.types import Array, Float

__all__ = ["Interval", "automatic_bend", "concave_interval", "largest_log_density"]

_DROP = 40.0  # exp(-40) = 4e-18
_FARTHEST = 15.0  # the maximum is looked for within sinh(15) = 1.6e6 standard deviations
_SMALLEST_CAVITY = 1e-6  # of c = 1 − η λ2 v, which is not positive where there is no cavity
_PARTS, _PEAK_STEPS, _END_STEPS = 16, 7, 2
_NEAR = 1.0  # nats below the maximum where its search ends
_SHORTEST = 20.0  # distances from the maximum down to exp(-20) of the longest
_GRID = np.sinh(np.linspace(-4.0, 4.0, 129))  # 27 standard deviations on each side


class Interval(NamedTuple):
    """In standard deviations of the marginal: the maximum, and the distances to both ends."""

    peak: Array
    left: Array
    right: Array


def concave_interval(
    likelihood: Any,
    y: Float[Array, "..."],
    m: Float[Array, "..."],
    v: Float[Array, "..."],
    lam1: Float[Array, "..."],
    lam2: Float[Array, "..."],
    power: float,
) -> Interval:
    """Beyond it a log-concave tilted density is below exp(−40) of its maximum, which is known to a nat. No derivatives.

    Args:
        likelihood: log-concave.
        y: outputs.
        m: marginal means.
        v: marginal variances, positive.
        lam1: first natural parameters of the sites.
        lam2: their precisions.
        power: η.
    """
    data = jax.lax.stop_gradient((likelihood, y, m, jnp.sqrt(v), lam1, lam2))
    likelihood, y, m, stddev, lam1, lam2 = data
    rest = jnp.maximum(1 - power * lam2 * stddev * stddev, _SMALLEST_CAVITY)
    pull = power * stddev * (lam2 * m - lam1)

    def log_p(z):
        return likelihood.log_density(y, m + stddev * z)

    def slope(z):
        return power * jax.jvp(log_p, (z,), (jnp.ones_like(z),))[1] + pull - rest * z

    peak = _near_maximum(slope, m)

    def height(z):  # log_density first: constants of y cancel
        return power * (log_p(z) - log_p(peak)) + pull * (z - peak) - 0.5 * rest * (z - peak) * (z + peak)

    sign = jnp.asarray([-1.0, 1.0], m.dtype).reshape(2, *(1,) * m.ndim)
    longest = jnp.broadcast_to(jnp.sqrt(2 * _DROP / rest), (2, *m.shape))  # the cavity alone

    def narrow(_, bracket):
        # The logarithm of the distance is searched, in steps that are the same for all.
        distance, step = bracket
        inside = height(peak + sign * distance * jnp.exp(step * _inner(distance))) > -_DROP
        return distance * jnp.exp(step * jnp.sum(inside, axis=0, dtype=m.dtype)), step / _PARTS

    step = jnp.asarray(_SHORTEST / _PARTS, m.dtype)
    distance, step = jax.lax.fori_loop(0, _END_STEPS, narrow, (longest * math.exp(-_SHORTEST), step))
    left, right = distance * jnp.exp(_PARTS * step)  # just beyond
    return Interval(peak, left, right)


def largest_log_density(
    likelihood: Any,
    y: Float[Array, "..."],
    prior_mean: Float[Array, "..."],
    prior_stddev: Float[Array, "..."],
) -> Float[Array, "..."]:
    """The supremum over f of a concave log p(y | f), to rounding; within 10⁶ standard deviations of the prior."""
    likelihood, y, center, stddev = jax.lax.stop_gradient((likelihood, y, prior_mean, prior_stddev))

    def log_p(z):
        return likelihood.log_density(y, center + stddev * z)

    def up(u):
        z = jnp.sinh(u)
        return jax.jvp(log_p, (z,), (jnp.ones_like(z),))[1] > 0

    ends = jnp.full_like(center, _FARTHEST)
    return log_p(jnp.sinh(_last(up, -ends, ends, 2 * _PEAK_STEPS)))


def automatic_bend(
    likelihood: Any, y: Float[Array, "..."], center: Float[Array, "..."], stddev: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Where log p is largest near a cavity, and three times its width there: a bend for likelihoods that name none."""
    likelihood, y, center, stddev = jax.lax.stop_gradient((likelihood, y, center, stddev))

    def log_p(z):
        return likelihood.log_density(y, center + stddev * z)

    def slope(z):
        return jax.jvp(log_p, (z,), (jnp.ones_like(z),))[1]

    grid = jnp.asarray(_GRID.reshape(-1, *(1,) * center.ndim), center.dtype)
    values = log_p(grid)
    best = jnp.argmax(jnp.where(jnp.isnan(values), -jnp.inf, values), axis=0)
    low, high = (
        jnp.asarray(_GRID, center.dtype)[jnp.clip(best + step, 0, len(_GRID) - 1)] for step in (-1, 1)
    )
    peak = _last(lambda z: slope(z) > 0, low, high, _PEAK_STEPS)
    curvature = -jax.jvp(slope, (peak,), (jnp.ones_like(peak),))[1]
    return center + stddev * peak, 3 * stddev * jax.lax.rsqrt(jnp.clip(curvature, 1e-2, 1e12))


class _Bracket(NamedTuple):
    low: Array  # in u, z = sinh u
    step: Array
    left: Array  # slopes at both ends
    right: Array
    num_steps: Array


def _near_maximum(slope, like):
    """Where a concave function is within a nat of its maximum: it falls by no more than its slopes say."""

    def narrow(bracket):
        # sinh of sums, by functions of the summands alone: the step is the same for all
        apart = bracket.step * _inner(bracket.low)
        slopes = slope(jnp.sinh(bracket.low) * jnp.cosh(apart) + jnp.cosh(bracket.low) * jnp.sinh(apart))
        up = slopes > 0
        low = bracket.low + bracket.step * jnp.sum(up, axis=0, dtype=bracket.low.dtype)
        left = jnp.min(jnp.where(up, slopes, bracket.left), axis=0)
        right = jnp.max(jnp.where(slopes <= 0, slopes, bracket.right), axis=0)
        return _Bracket(low, bracket.step / _PARTS, left, right, bracket.num_steps + 1)

    def wide(bracket):
        length = jnp.sinh(bracket.low + _PARTS * bracket.step) - jnp.sinh(bracket.low)
        near = (bracket.left - bracket.right) * length <= _NEAR
        return ~jnp.all(near) & (bracket.num_steps < _PEAK_STEPS)

    ends = jnp.full_like(like, _FARTHEST)
    infinite = jnp.full_like(like, jnp.inf)
    step = jnp.asarray(2 * _FARTHEST / _PARTS, like.dtype)
    start = _Bracket(-ends, step, infinite, -infinite, jnp.zeros((), jnp.int32))
    found = jax.lax.while_loop(wide, narrow, start)
    return jnp.sinh(found.low + 0.5 * _PARTS * found.step)


def _inner(like):
    """1 ... 15 with as many axes behind."""
    return jnp.arange(1.0, _PARTS, dtype=like.dtype).reshape(-1, *(1,) * like.ndim)


def _last(up, low, high, num_steps):
    """The last place in an interval where ``up`` holds, which does so up to there: 4 binary digits a step."""

    def narrow(_, bracket):
        low, step = bracket
        count = jnp.sum(up(low + step * _inner(low)), axis=0, dtype=low.dtype)
        return low + step * count, step / _PARTS

    low, step = jax.lax.fori_loop(0, num_steps, narrow, (low, (high - low) / _PARTS))
    return low + 0.5 * _PARTS * step
