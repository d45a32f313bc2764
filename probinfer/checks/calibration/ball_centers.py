"""Reference points of TARP, the centers of its balls: predicted from the data, or given by the user."""

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
    """Return reference points in whitened coordinates, and the matrix W of these coordinates.

    Args:
        key: random key.
        draws: posterior draws, leaves (S, L, ...).
        theta: true values, leaves (S, ...).
        x: data, leaves (S, ...), or None.
        reference: as in ``tarp``.
        whiten: as in ``tarp``.

    Raises:
        TypeError: ``reference`` is not a function.
        ValueError: ``reference`` returns a wrong structure or shape, or ``whiten`` is unknown.
    """
    if reference is not None and not callable(reference):
        raise TypeError(f"reference must be a function (key, x) -> theta, got {type(reference).__name__}")
    flat, true = columns(draws, 2), columns(theta, 1)
    true = true.astype(flat.dtype)
    matrix = whitening_matrix(flat, true, whiten=whiten)
    if reference is not None:
        return _user_references(key, reference, theta, x, matrix), matrix
    key_first, _ = jax.random.split(key)
    return _predicted_references(key_first, flat, true, x, matrix), matrix


def _predicted_references(
    key: PRNGKey, draws: Array, true_values: Array, x: ArrayTree, matrix: Array
) -> References:
    """Predict references from earlier simulations in random order; without data, take values of other simulations."""
    rng = generator(key)
    order = rng.permutation(len(true_values))
    # One of the L + 1 exchangeable values of another simulation: uses neither its label nor this simulation's data.
    member = rng.integers(draws.shape[1] + 1, size=len(true_values))
    selected = np.asarray(_select_member(draws, true_values, jnp.asarray(member)) @ matrix.T, dtype=float)
    whitened = np.asarray(true_values @ matrix.T, dtype=float)
    others = np.roll(np.where(np.isfinite(selected), selected, 0.0)[order], 1, axis=0)
    inverse_order = np.argsort(order)
    if x is None or not jax.tree.leaves(x):
        return References(others[inverse_order], False, None)
    shuffled = jax.tree.map(lambda leaf: np.asarray(leaf)[order], x)
    finite = np.where(np.isfinite(whitened), whitened, 0.0)[order]
    references = regression_references(rng, shuffled, finite, others)
    return references._replace(points=references.points[inverse_order])


@jax.jit
def _select_member(draws: Array, true_values: Array, member: Array) -> Array:
    """Return one value per simulation: a draw, or the true value where ``member`` is the number of draws."""
    selected = draws[jnp.arange(len(draws)), jnp.minimum(member, draws.shape[1] - 1)]
    return jnp.where((member == draws.shape[1])[:, None], true_values, selected)


def _user_references(
    key: PRNGKey, reference: Callable, theta: ArrayTree, x: ArrayTree, matrix: Array
) -> References:
    """Evaluate the user's references, and check whether other data under the same keys change them."""
    keys = jax.random.split(key, len(jax.tree.leaves(theta)[0]))
    points = _apply(as_partial(reference), keys, x)
    expected_shapes = jax.tree.map(jnp.shape, theta)
    shapes = jax.tree.map(jnp.shape, points)
    if structure(points) != structure(theta) or shapes != expected_shapes:
        raise ValueError(
            "reference must return a point shaped like one theta; over all simulations the shapes are "
            f"{expected_shapes}, got {shapes}"
        )
    other_points = _apply(
        as_partial(reference), keys, jax.tree.map(lambda leaf: jnp.roll(jnp.asarray(leaf), 1, 0), x)
    )
    flat = columns(points, 1)
    uses_data = bool(np.any(np.asarray(flat) != np.asarray(columns(other_points, 1))))
    return References(np.asarray(flat.astype(matrix.dtype) @ matrix.T), uses_data, None)


@jax.jit
def _apply(reference: Callable, keys: Array, x: ArrayTree) -> ArrayTree:
    return (
        jax.vmap(reference)(keys, x) if jax.tree.leaves(x) else jax.vmap(lambda key: reference(key, x))(keys)
    )
