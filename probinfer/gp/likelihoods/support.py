"""Where tilted densities are: the interval that holds one, found from the likelihood alone.

The tilted density ∝ N(f; m, v) (p(y | f) / t(f))^η may lie far from the marginal N(m, v) and be much narrower, as that
of a large count under the prior is. Quadrature that is centered at the marginal then sees nothing of it, and the
moments that it gives are noise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.types import Array, Float

__all__ = ["Interval", "automatic_bend", "concave_interval", "largest_log_density"]

_DROP = 40.0  # exp(-40) = 4e-18
_FARTHEST = 15.0  # the maximum is looked for within sinh(15) = 1.6e6 standard deviations
_SMALLEST_CAVITY = 1e-6  # of c = 1 − η λ2 v, which is not positive where there is no cavity
_PARTS, _PEAK_STEPS, _END_STEPS = 16, 7, 3
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
    """Beyond it a log-concave tilted density is below exp(−40) of its maximum. Without derivatives.

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

    def up(u):
        z = jnp.sinh(u)
        return power * jax.jvp(log_p, (z,), (jnp.ones_like(z),))[1] + pull > rest * z

    farthest = jnp.full_like(m, _FARTHEST)
    peak = jnp.sinh(_last(up, -farthest, farthest, _PEAK_STEPS))

    def height(z):  # log_density first: constants of y cancel
        return power * (log_p(z) - log_p(peak)) + pull * (z - peak) - 0.5 * rest * (z - peak) * (z + peak)

    sign = jnp.asarray([-1.0, 1.0], m.dtype).reshape(2, *(1,) * m.ndim)
    longest = jnp.broadcast_to(0.5 * jnp.log(2 * _DROP / rest), (2, *m.shape))  # the cavity alone
    ends = _last(
        lambda log_distance: height(peak + sign * jnp.exp(log_distance)) > -_DROP,
        longest - _SHORTEST,
        longest,
        _END_STEPS,
    )
    left, right = jnp.exp(ends + _SHORTEST * float(_PARTS) ** -_END_STEPS)  # just beyond
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


def _last(up, low, high, num_steps):
    """The last place in an interval where ``up`` holds, which does so up to there: 4 binary digits a step."""

    def narrow(_, bracket):
        low, step = bracket
        grid = low + step * jnp.arange(1.0, _PARTS, dtype=low.dtype).reshape(-1, *(1,) * low.ndim)
        count = jnp.sum(up(grid), axis=0, dtype=low.dtype)
        return low + step * count, step / _PARTS

    low, step = jax.lax.fori_loop(0, num_steps, narrow, (low, (high - low) / _PARTS))
    return low + 0.5 * _PARTS * step
