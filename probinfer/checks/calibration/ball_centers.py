"""Where the balls of TARP are centred: predicted from the data, or as the user says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.checks.calibration.references import References, generator, regression_references
from probinfer.checks.calibration.whitening import columns, whitening_matrix
from probinfer.core.algorithms import as_partial
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey
from probinfer.targets.transforms import structure

__all__ = ["reference_points"]


def reference_points(
    key: PRNGKey,
    draws: ArrayTree,
    theta: ArrayTree,
    x: ArrayTree,
    reference: Any = None,
    whiten: str | None = "pooled",
) -> tuple[References, Float[Array, "D D"]]:
    """Reference points in whitened coordinates, and the matrix W of these coordinates.

    Args:
        key: random key.
        draws: posterior draws, leaves (S, L, ...).
        theta: true values, leaves (S, ...).
        x: data, leaves (S, ...), or None.
        reference: as in ``tarp``.
        whiten: as in ``tarp``.

    Raises:
        TypeError: ``reference`` is not a function.
        ValueError: ``reference`` returns another structure or shape, or an unknown ``whiten``.
    """
    if reference is not None and not callable(reference):
        raise TypeError(f"reference must be a function (key, x) -> theta, got {type(reference).__name__}")
    flat, true = columns(draws, 2), columns(theta, 1)
    true = true.astype(flat.dtype)
    matrix = whitening_matrix(flat, true, whiten=whiten)
    if reference is not None:
        return _users(key, reference, theta, x, matrix), matrix
    key_first, key_order = jax.random.split(key)
    return _default(key_first, key_order, flat, true, x, matrix), matrix


def _default(
    key: PRNGKey, key_order: PRNGKey, draws: Array, theta: Array, x: ArrayTree, matrix: Array
) -> References:
    rng = generator(key)
    order = rng.permutation(len(theta))
    # A member of another simulation's values, the true one among them: uses no label and not this one's data.
    member = rng.integers(draws.shape[1] + 1, size=len(theta))
    picked = np.asarray(_pick(draws, theta, jnp.asarray(member)) @ matrix.T, dtype=float)
    white = np.asarray(theta @ matrix.T, dtype=float)
    others = np.roll(np.where(np.isfinite(picked), picked, 0.0)[order], 1, axis=0)
    back = np.argsort(order)
    if x is None or not jax.tree.leaves(x):
        return References(others[back], False, None)
    shuffled = jax.tree.map(lambda leaf: np.asarray(leaf)[order], x)
    safe = np.where(np.isfinite(white), white, 0.0)[order]
    found = regression_references(rng, shuffled, safe, others)
    return found._replace(points=found.points[back])


@jax.jit
def _pick(draws: Array, theta: Array, member: Array) -> Array:
    """One value of each simulation: a draw, or the true value where ``member`` is the number of draws."""
    drawn = draws[jnp.arange(len(draws)), jnp.minimum(member, draws.shape[1] - 1)]
    return jnp.where((member == draws.shape[1])[:, None], theta, drawn)


def _users(key: PRNGKey, reference: Callable, theta: ArrayTree, x: ArrayTree, matrix: Array) -> References:
    """The user's references, and whether other data under the same keys give other points."""
    number = len(jax.tree.leaves(theta)[0])
    keys = jax.random.split(key, number)
    points = _apply(as_partial(reference), keys, x)
    like = jax.tree.map(jnp.shape, theta)
    found = jax.tree.map(jnp.shape, points)
    if structure(points) != structure(theta) or found != like:
        raise ValueError(f"reference must return a point shaped like one theta, {like} over all, got {found}")
    other = _apply(
        as_partial(reference), keys, jax.tree.map(lambda leaf: jnp.roll(jnp.asarray(leaf), 1, 0), x)
    )
    flat = columns(points, 1)
    uses = bool(np.any(np.asarray(flat) != np.asarray(columns(other, 1))))
    return References(np.asarray(flat.astype(matrix.dtype) @ matrix.T), uses, None)


@jax.jit
def _apply(reference: Callable, keys: Array, x: ArrayTree) -> ArrayTree:
    return (
        jax.vmap(reference)(keys, x) if jax.tree.leaves(x) else jax.vmap(lambda key: reference(key, x))(keys)
    )
