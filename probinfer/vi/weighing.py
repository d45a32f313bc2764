"""Draws from a fitted Gaussian with importance weights, and whether the weights can be trusted."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from probinfer.core.types import Array, ArrayTree, Bool, Float, PRNGKey, Scalar
from probinfer.numerics import importance, weights
from probinfer.vi import gaussian
from probinfer.vi.fitting import VIProblem
from probinfer.vi.gaussian import VariationalGaussian
from probinfer.vi.report import MAX_KHAT

__all__ = ["MAX_IDENTITY_ERROR", "MIN_JUDGED_DRAWS", "WeightedDraws", "weighted_draws"]

MAX_IDENTITY_ERROR = 0.1
MIN_JUDGED_DRAWS = 1000
_NUM_ERRORS = 2.5  # standard errors that are tolerated in the identity


class WeightedDraws(NamedTuple):
    """Draws from the Gaussian, and weighted draws.

    Attributes:
        gaussian: leaves (1, num, ...), draws from the Gaussian, of equal weights.
        positions: leaves (1, num, ...), draws from the widened distribution.
        log_weights: of ``positions``.
        khat: as in ``VIInfo``.
        identity: as in ``VIInfo``.
        poor: whether the weights cannot correct the draws.
    """

    gaussian: ArrayTree
    positions: ArrayTree
    log_weights: Float[Array, "1 num"]
    khat: Float[Array, ""]
    identity: Float[Array, ""]
    poor: Bool[Array, ""]


@functools.partial(jax.jit, static_argnames="num")
def weighted_draws(problem: VIProblem, q: VariationalGaussian, key: PRNGKey, num: int) -> WeightedDraws:
    """Draw from a fitted Gaussian, and, with smoothed importance weights, from its widened distribution.

    The weights are judged on ``num`` draws, or on 1000 if fewer are asked for. The weight is zero if the density or its
    gradient is undefined.

    Args:
        problem: the target.
        q: the fitted Gaussian.
        key: random key.
        num: number of draws.
    """
    # Draw
    key_draw, key_widen = jax.random.split(key)
    narrow = gaussian.draw(q, key_draw, max(num, MIN_JUDGED_DRAWS))
    wide = gaussian.widened(q, key_widen, narrow)
    # Weigh
    unravel = ravel_pytree(problem.template)[1]
    value_and_grad_fn = jax.value_and_grad(lambda x: problem.logdensity_fn(unravel(x)))
    if problem.block == 1:
        values, gradients = jax.lax.map(value_and_grad_fn, wide)
    else:
        values, gradients = jax.vmap(value_and_grad_fn)(wide)
    defined = ~jnp.isnan(values) & jnp.all(jnp.isfinite(gradients), axis=1)
    log_ratios = jnp.where(defined, values - gaussian.log_widened(q, wide), -jnp.inf)
    smoothed = importance.psis(log_ratios)
    # Judge
    identity = _identity_error(smoothed.log_weights, wide, jnp.where(defined[:, None], gradients, 0))
    low_ess = weights.ess(smoothed.log_weights) < len(log_ratios) / 4
    # Negated comparisons: NaN is poor
    poor = (~(smoothed.khat <= MAX_KHAT) & low_ess) | ~(identity <= MAX_IDENTITY_ERROR)
    narrow_positions, wide_positions = (
        jax.tree.map(lambda leaf: leaf[None], jax.vmap(unravel)(rows[:num])) for rows in (narrow, wide)
    )
    return WeightedDraws(
        gaussian=narrow_positions,
        positions=wide_positions,
        log_weights=smoothed.log_weights[None, :num],
        khat=smoothed.khat,
        identity=identity,
        poor=poor,
    )


def _identity_error(log_weights: Array, draws: Array, gradients: Array) -> Scalar:
    r"""Return how far weighted draws are from :math:`-E[z_j g_k] = 1_{j = k}`, beyond the noise.

    With covariance C of the draws and a normal target of precision P, the matrix is C P in whitened coordinates: a
    ridge longer than the draws shows in it, even if all variances look right.
    """
    normalized = jnp.exp(weights.normalize(log_weights).log_weights)
    centered = draws - normalized @ draws
    # Whiten in two steps, scales first: a Cholesky factor of badly scaled coordinates loses precision
    scale = jnp.sqrt(normalized @ centered**2)
    standardized = centered / scale
    root = jnp.linalg.cholesky((normalized[:, None] * standardized).T @ standardized)
    z = jax.scipy.linalg.solve_triangular(root, standardized.T, lower=True).T
    g = (gradients * scale) @ root
    moments = -(normalized[:, None] * z).T @ g
    error = jnp.sqrt((normalized[:, None] ** 2 * z**2).T @ g**2)
    deviation = jnp.abs(moments - jnp.eye(len(scale), dtype=moments.dtype))
    return jnp.max(jnp.maximum(deviation - _NUM_ERRORS * error, 0))
