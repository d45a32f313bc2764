r"""Coordinates in which distances and random directions mean something, and nothing is given away.

The scale is a symmetric function of each simulation's true value and its draws together. Under a correct posterior
these L + 1 values are exchangeable, and which of them is the true one stays uniform given the scale: ranks in the
new coordinates are exactly uniform.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from probinfer.types import Array, ArrayTree, Float

__all__ = ["columns", "whitening_matrix"]

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
    both = jnp.concatenate([draws, theta[:, None].astype(draws.dtype)], axis=1)
    return _prior_scale(both) if whiten == "prior" else _pooled(both)


@jax.jit
def _prior_scale(both: Array) -> Array:
    good = jnp.all(jnp.isfinite(both), axis=(1, 2), keepdims=True)
    values = jnp.where(good, both, jnp.nan).reshape(-1, both.shape[-1])
    low, high = jnp.nanquantile(values, jnp.asarray([0.25, 0.75], both.dtype), axis=0)
    scale = (high - low) / 1.349
    return jnp.diag(jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0))


@jax.jit
def _pooled(both: Array) -> Array:
    good = jnp.all(jnp.isfinite(both), axis=(1, 2))
    centred = jnp.where(good[:, None, None], both - jnp.mean(both, axis=1, keepdims=True), 0)
    spread = jnp.sqrt(jnp.mean(jnp.square(centred), axis=1))
    moving = spread > 0
    scaled = jnp.where(moving[:, None], centred / jnp.where(moving, spread, 1)[:, None], 0)
    rows = scaled.reshape(-1, both.shape[-1])
    total = rows.T @ rows / both.shape[1]
    count = jnp.maximum(jnp.sum(moving, axis=0), 1).astype(both.dtype)
    correlation = total / jnp.sqrt(count[:, None] * count[None])
    scale = jnp.nanmedian(jnp.where(moving, spread, jnp.nan), axis=0)
    values, vectors = jnp.linalg.eigh(correlation)
    root = (vectors * jnp.maximum(values, _FLOOR) ** -0.5) @ vectors.T
    return jnp.where(scale > 0, root / jnp.where(scale > 0, scale, 1), 0)
