r"""Whitened coordinates for distances and random directions, in which ranks stay exactly uniform.

The scale is a symmetric function of each simulation's true value and draws together. Under a correct posterior these
L + 1 values are exchangeable, so the index of the true value is uniform given the scale, and ranks in the new
coordinates are exactly uniform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, ArrayTree, Float

__all__ = ["columns", "each_simulation", "whitening_matrix"]

_MIN_EIGENVALUE = 1e-6  # of the correlation matrix


def columns(tree: ArrayTree, leading: int) -> Float[Array, "*leading D"]:
    """Join the leaves (leading axes, ...) of a tree into one array (leading axes, D), in the order of its leaves."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    flat = [leaf.reshape(*leaf.shape[:leading], -1) for leaf in leaves]
    dtype = jnp.result_type(float) if not flat else jnp.result_type(*flat)
    return jnp.concatenate([leaf.astype(dtype) for leaf in flat], axis=-1)


def whitening_matrix(
    draws: Float[Array, "S L D"], true_values: Float[Array, "S D"], *, whiten: str | None = "pooled"
) -> Float[Array, "D D"]:
    r"""Return W such that W theta has approximately unit scale.

    ``"prior"``: per coordinate, 1.349 over the interquartile range of all values. ``"pooled"``:
    :math:`(DCD)^{-1/2}` with the posterior correlations C averaged over the simulations and the median posterior
    standard deviations D, which resist heavy tails. ``None``: the identity. Coordinates that do not vary have weight
    zero. Simulations with a value that is not finite are left out.

    Args:
        draws: posterior draws.
        true_values: true values.
        whiten: "pooled", "prior" or None.

    Raises:
        ValueError: ``whiten`` is unknown.
    """
    if whiten not in ("pooled", "prior", None):
        raise ValueError(f"whiten must be 'pooled', 'prior' or None, got {whiten!r}")
    if whiten is None:
        return jnp.eye(true_values.shape[-1], dtype=draws.dtype)
    true_values = true_values.astype(draws.dtype)
    return _prior_scale(draws, true_values) if whiten == "prior" else _pooled_scale(draws, true_values)


@jax.jit
def _prior_scale(draws: Array, true_values: Array) -> Array:
    values = jnp.concatenate([draws, true_values[:, None]], axis=1)
    finite = jnp.all(jnp.isfinite(values), axis=(1, 2), keepdims=True)
    values = jnp.where(finite, values, jnp.nan).reshape(-1, values.shape[-1])
    low, high = jnp.nanquantile(values, jnp.asarray([0.25, 0.75], values.dtype), axis=0)
    scale = (high - low) / 1.349
    return jnp.diag(jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0))


@jax.jit
def _pooled_scale(draws: Array, true_values: Array) -> Array:
    correlations, deviations = each_simulation(_correlations, draws, true_values)
    varies = deviations > 0
    count = jnp.maximum(jnp.sum(varies, axis=0), 1).astype(draws.dtype)
    correlation = jnp.sum(correlations, axis=0) / jnp.sqrt(count[:, None] * count[None])
    scale = jnp.nanmedian(jnp.where(varies, deviations, jnp.nan), axis=0)
    values, vectors = jnp.linalg.eigh(correlation)
    root = (vectors * jnp.maximum(values, _MIN_EIGENVALUE) ** -0.5) @ vectors.T
    return jnp.where(scale > 0, root / jnp.where(scale > 0, scale, 1), 0)


def _correlations(draws: Array, true: Array) -> tuple[Array, Array]:
    """Return correlations and standard deviations of one simulation's values; zero if not finite or constant."""
    # One pass over differences from the true value: it lies among the draws, or the covariance is large anyway, so
    # subtracting the squared mean cancels little.
    differences = draws - true
    mean = jnp.sum(differences, axis=0) / (len(draws) + 1)
    covariance = differences.T @ differences / (len(draws) + 1) - mean[:, None] * mean
    covariance = jnp.where(jnp.all(jnp.isfinite(covariance)), covariance, 0)
    deviation = jnp.sqrt(jnp.maximum(jnp.diagonal(covariance), 0))
    inverse = jnp.where(deviation > 0, 1 / jnp.where(deviation > 0, deviation, 1), 0)
    return covariance * inverse[:, None] * inverse, deviation


def each_simulation(function: Callable, *arrays: Array) -> Any:
    """Map over the leading axis: sequentially on a CPU, where one simulation fits into the cache, otherwise at once."""
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda simulation: function(*simulation), arrays)
    return jax.vmap(function)(*arrays)
