"""Cavities: a marginal N(m, v) divided by a power of its site t(f) = exp(lam1 f − ½ lam2 f²)."""

from __future__ import annotations

import jax.numpy as jnp

from probinfer.core.types import Array, Float

__all__ = ["cavity", "log_ratio_from_cavity"]


def cavity(
    m: Float[Array, " N"],
    v: Float[Array, " N"],
    lam1: Float[Array, " N"],
    lam2: Float[Array, " N"],
    power: float,
) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
    """Mean and variance of the density ∝ N(f; m, v) / t(f)^power, and c = 1 − power lam2 v.

    Returns:
        ``(mean, variance, c)``; if c is not positive there is no such density, and mean and variance are NaN.

    References:
        Rasmussen and Williams (2006), eq. 3.56 (for power 1).
    """
    c = 1 - power * lam2 * v
    positive = jnp.where(c > 0, c, jnp.nan)
    return (m - power * lam1 * v) / positive, v / positive, c


def log_ratio_from_cavity(
    log_normalizer: Float[Array, " N"],
    m: Float[Array, " N"],
    v: Float[Array, " N"],
    lam1: Float[Array, " N"],
    lam2: Float[Array, " N"],
    power: float,
) -> Float[Array, " N"]:
    """Log E_{N(m, v)}[(p/t)^power] from the log of ∫ p^power cavity df.

    log Ẑ − ½ log c + power [½ lam2 m² − lam1 m + ½ power lam1² v] / c: never divides by lam2, which may be 0.
    """
    c = 1 - power * lam2 * v
    bracket = 0.5 * lam2 * m**2 - lam1 * m + 0.5 * power * lam1**2 * v
    return log_normalizer - 0.5 * jnp.log(c) + power * bracket / c
