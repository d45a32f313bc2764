r"""Coordinates in which distances and random directions mean something, and nothing is given away.

The scale is a symmetric function of each simulation's true value and its draws together. Under a correct posterior
these L + 1 values are exchangeable, and which of them is the true one stays uniform given the scale: ranks in the
new coordinates are exactly uniform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, ArrayTree, Float

__all__ = ["columns", "each_simulation", "whitening_matrix"]

_FLOOR = 1e-6  # of an eigenvalue of the correlation matrix


def columns(tree: ArrayTree, leading: int) -> Float[Array, "*leading D"]:
    """Join the leaves (leading axes, ...) of a tree into one array (leading axes, D), in the order of its leaves."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    flat = [leaf.reshape(*leaf.shape[:leading], -1) for leaf in leaves]
    dtype = jnp.result_type(float) if not flat else jnp.result_type(*flat)
    return jnp.concatenate([leaf.astype(dtype) for leaf in flat], axis=-1)


def whitening_matrix(
    draws: Float[Array, "S L D"], theta: Float[Array, "S D"], *, whiten: str | None = "pooled"
) -> Float[Array, "D D"]:
    r"""Return W such that W theta has about unit scale.

    ``"prior"``: the interquartile range of everything, over 1.349, by coordinate. ``"pooled"``: the posterior
    correlations averaged over the simulations, with the median posterior standard deviations, so that one heavy
    tail does not decide for all; :math:`W = (DCD)^{-1/2}`. ``None``: the identity. Coordinates that do not vary
    get the weight zero. Simulations with a value that is not finite are left out.

    Args:
        draws: posterior draws.
        theta: true values.
        whiten: "pooled", "prior" or None.

    Raises:
        ValueError: another word for ``whiten``.
    """
    if whiten not in ("pooled", "prior", None):
        raise ValueError(f"whiten must be 'pooled', 'prior' or None, got {whiten!r}")
    if whiten is None:
        return jnp.eye(theta.shape[-1], dtype=draws.dtype)
    theta = theta.astype(draws.dtype)
    return _prior_scale(draws, theta) if whiten == "prior" else _pooled(draws, theta)


@jax.jit
def _prior_scale(draws: Array, theta: Array) -> Array:
    both = jnp.concatenate([draws, theta[:, None]], axis=1)
    good = jnp.all(jnp.isfinite(both), axis=(1, 2), keepdims=True)
    values = jnp.where(good, both, jnp.nan).reshape(-1, both.shape[-1])
    low, high = jnp.nanquantile(values, jnp.asarray([0.25, 0.75], both.dtype), axis=0)
    scale = (high - low) / 1.349
    return jnp.diag(jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0))


@jax.jit
def _pooled(draws: Array, theta: Array) -> Array:
    correlations, spread = each_simulation(_correlations, draws, theta)
    moving = spread > 0
    count = jnp.maximum(jnp.sum(moving, axis=0), 1).astype(draws.dtype)
    correlation = jnp.sum(correlations, axis=0) / jnp.sqrt(count[:, None] * count[None])
    scale = jnp.nanmedian(jnp.where(moving, spread, jnp.nan), axis=0)
    values, vectors = jnp.linalg.eigh(correlation)
    root = (vectors * jnp.maximum(values, _FLOOR) ** -0.5) @ vectors.T
    return jnp.where(scale > 0, root / jnp.where(scale > 0, scale, 1), 0)


def _correlations(draws: Array, theta: Array) -> tuple[Array, Array]:
    """Correlations and standard deviations of one simulation's values; zero for what is not finite or still."""
    # Deviations from the true value, one pass: it lies among the draws, or else the covariance is wide anyway.
    deviations = draws - theta
    mean = jnp.sum(deviations, axis=0) / (len(draws) + 1)
    covariance = deviations.T @ deviations / (len(draws) + 1) - mean[:, None] * mean
    covariance = jnp.where(jnp.all(jnp.isfinite(covariance)), covariance, 0)
    spread = jnp.sqrt(jnp.maximum(jnp.diagonal(covariance), 0))
    inverse = jnp.where(spread > 0, 1 / jnp.where(spread > 0, spread, 1), 0)
    return covariance * inverse[:, None] * inverse, spread


def each_simulation(function: Callable, *arrays: Array) -> Any:
    """Map over the leading axis: one after another on a CPU, where a simulation fits into the cache, else at once."""
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda one: function(*one), arrays)
    return jax.vmap(function)(*arrays)
