"""Draws of a fitted Gaussian with importance weights, and whether these can be trusted."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from probinfer.core.types import Array, ArrayTree, Float, PRNGKey
from probinfer.numerics import importance, weights
from probinfer.vi import gaussian
from probinfer.vi.fitting import Problem
from probinfer.vi.report import KHAT

__all__ = ["FEWEST", "IDENTITY", "Weighted", "weighted_draws"]

IDENTITY = 0.1
FEWEST = 1000
_ERRORS = 2.5  # standard errors that the identity is not blamed for


class Weighted(NamedTuple):
    """Positions (1, num, ...): ``gaussian`` of equal weights, ``positions`` with ``log_weights`` (1, num).

    ``khat`` and ``identity`` as in ``VIInfo``; ``poor`` says that the weights mend nothing.
    """

    gaussian: ArrayTree
    positions: ArrayTree
    log_weights: Float[Array, "1 num"]
    khat: Array
    identity: Array
    poor: Array


@functools.partial(jax.jit, static_argnames="num")
def weighted_draws(problem: Problem, frame: gaussian.Frame, key: PRNGKey, num: int) -> Weighted:
    """Draw from a fitted Gaussian, and with smoothed importance weights from its widened law.

    The verdict is on ``num`` draws, or on 1000 where fewer are asked for. Where the density or its gradient is
    undefined, the weight is zero.

    Args:
        problem: the target.
        frame: the Gaussian at rest.
        key: random key.
        num: how many draws.
    """
    key_draw, key_widen = jax.random.split(key)
    narrow = gaussian.draw(frame, key_draw, max(num, FEWEST))
    wide = gaussian.widened(frame, key_widen, narrow)
    unravel = ravel_pytree(problem.like)[1]
    both = jax.value_and_grad(lambda x: problem.logdensity_fn(unravel(x)))
    values, gradients = jax.lax.map(both, wide) if problem.block == 1 else jax.vmap(both)(wide)
    defined = ~jnp.isnan(values) & jnp.all(jnp.isfinite(gradients), axis=1)
    ratios = jnp.where(defined, values - gaussian.log_widened(frame, wide), -jnp.inf)
    smoothed = importance.psis(ratios)
    identity = _breach(smoothed.log_weights, wide, jnp.where(defined[:, None], gradients, 0))
    few = weights.ess(smoothed.log_weights) < len(ratios) / 4
    poor = (~(smoothed.khat <= KHAT) & few) | ~(identity <= IDENTITY)
    first, second = (
        jax.tree.map(lambda leaf: leaf[None], jax.vmap(unravel)(rows[:num])) for rows in (narrow, wide)
    )
    return Weighted(first, second, smoothed.log_weights[None, :num], smoothed.khat, identity, poor)


def _breach(log_weights: Array, draws: Array, gradients: Array) -> Array:
    r"""How far the weighted draws are from :math:`-E[z_j g_k] = 1_{j = k}`, beyond the noise.

    With covariance C of the draws and a normal target of precision P, the matrix is that of C P in whitened
    coordinates: a ridge whose length the draws do not see shows in it, whatever single variances say.
    """
    shares = jnp.exp(weights.normalize(log_weights).log_weights)
    centred = draws - shares @ draws
    scale = jnp.sqrt(shares @ centred**2)
    covariance = (shares[:, None] * (centred / scale)).T @ (centred / scale)
    root = jnp.linalg.cholesky(covariance)
    z = jax.scipy.linalg.solve_triangular(root, (centred / scale).T, lower=True).T
    pulled = (gradients * scale) @ root
    found = -(shares[:, None] * z).T @ pulled
    error = jnp.sqrt((shares[:, None] ** 2 * z**2).T @ pulled**2)
    return jnp.max(jnp.maximum(jnp.abs(found - jnp.eye(len(scale), dtype=found.dtype)) - _ERRORS * error, 0))
