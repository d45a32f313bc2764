"""Proposals of parameters: independent draws from a Student-t, and local steps of a random walk."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, PRNGKey
from probinfer.numerics.covariance_factor import push
from probinfer.smc.tempered.bridge import FREEDOM

__all__ = ["LOCAL_SCALE", "propose"]

LOCAL_SCALE = 2.562  # over sqrt(d): Sherlock et al. (2015), a random walk with noise


def propose(
    key: PRNGKey, positions: Float[Array, "n d"], mean: Array, root: Array, independent: Array
) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    r"""Propose new positions; return them and :math:`\log q(u' \to u) - \log q(u \to u')`.

    Args:
        key: random key.
        positions: of the particles.
        mean: (d,) of the Student-t.
        root: of its scale matrix.
        independent: draws from the Student-t, or steps of a random walk.
    """
    num, d = positions.shape
    normal = jax.random.normal(key, (num, d + FREEDOM), positions.dtype)
    z, rest = normal[:, :d], normal[:, d:]
    heavy = z / jnp.sqrt(jnp.mean(rest**2, axis=1, keepdims=True))
    step = jax.vmap(partial(push, root))(jnp.where(independent, heavy, z * (LOCAL_SCALE / math.sqrt(d))))
    proposed = jnp.where(independent, mean, positions) + step
    log_t = jax.vmap(partial(_log_student, root))
    odds = log_t(positions - mean) - log_t(proposed - mean)
    return proposed, jnp.where(independent, odds, jnp.zeros_like(odds))


def _log_student(root: Array, centred: Float[Array, " d"]) -> Array:
    if root.ndim == 1:
        z = centred / root
    else:
        z = jax.scipy.linalg.solve_triangular(root, centred, lower=True)
    return -(FREEDOM + centred.shape[0]) / 2 * jnp.log1p(jnp.sum(z**2) / FREEDOM)
