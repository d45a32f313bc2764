"""Groups of numbers that bet together (elements, leaves or particles), with sums and lengths within each group.

The statistics of the groups have one of three layouts. ``"element"``: a tree like the parameters. ``"block"``: a tree
of scalars, one per leaf. ``"particle"``: one array of shape (N,) for all leaves, whose leading axis indexes particles.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.arguments import check_floating
from probinfer.core.types import Array, ArrayTree, Int

__all__ = [
    "Norm",
    "all_finite",
    "broadcast",
    "check_norm",
    "check_params",
    "count_frozen",
    "freeze",
    "inner_products",
    "lengths",
    "outcomes",
    "select_leaves",
    "select_statistics",
    "widen",
    "zeros",
]

Norm = str  # not a Literal: check_norm refuses other values with a clearer message


def check_norm(norm: Any) -> None:
    """Refuse unknown names of norms.

    Raises:
        ValueError: The name is unknown.
    """
    if norm not in ("element", "block", "particle"):
        raise ValueError(f"norm must be 'element', 'block' or 'particle', got {norm!r}")


def check_params(params: ArrayTree, *, particles: bool) -> None:
    """Refuse parameters that cannot be optimized.

    Raises:
        TypeError: A leaf is not floating point.
        ValueError: There is no leaf, or the particles have no common leading axis.
    """
    named = jax.tree_util.tree_leaves_with_path(params)
    if not named:
        raise ValueError("the parameters have no leaves; pass a tree with at least one floating-point array")
    for path, leaf in named:
        check_floating(f"parameter '{jax.tree_util.keystr(path, simple=True, separator='.')}'", leaf)
    counts = {jnp.shape(leaf)[:1] for _, leaf in named}
    if particles and (len(counts) > 1 or () in counts):
        shapes = [jnp.shape(leaf) for _, leaf in named]
        raise ValueError(
            f"the leading axis of every leaf must index the same particles, got shapes {shapes}; "
            "stack the particles along axis 0"
        )


def _wide_dtype(leaf: Any) -> Any:
    """Return the dtype in which a leaf is summed: its own, at least float32."""
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def zeros(tree: ArrayTree) -> ArrayTree:
    """Return zeros in the shape of the parameters, at least float32."""
    return jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), _wide_dtype(leaf)), tree)


def widen(tree: ArrayTree) -> ArrayTree:
    """Return the parameters, at least float32."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(_wide_dtype(leaf)), tree)


def outcomes(gradients: ArrayTree) -> ArrayTree:
    """Return minus the gradients of a loss, at least float32."""
    return jax.tree.map(lambda leaf: -jnp.asarray(leaf).astype(_wide_dtype(leaf)), gradients)


def _trailing(leaf: Array) -> tuple[int, ...]:
    return tuple(range(1, leaf.ndim))


def _particle_column(values: Array, leaf: Array) -> Array:
    """Return one value per particle (N,) with trailing axes, to broadcast against a leaf (N, ...)."""
    return values.reshape((-1,) + (1,) * (leaf.ndim - 1))


def _combine_leaves(combine: Any, parts: list[Array]) -> Array:
    """Combine the statistics (N,) of all leaves, in their widest dtype."""
    dtype = jnp.result_type(*parts)
    return reduce(combine, (part.astype(dtype) for part in parts))


def inner_products(norm: Norm, a: ArrayTree, b: ArrayTree) -> ArrayTree:
    """Return the inner products within the groups."""
    products = jax.tree.map(jnp.multiply, a, b)
    if norm == "element":
        return products
    if norm == "block":
        return jax.tree.map(jnp.sum, products)
    return _combine_leaves(
        jnp.add, [jnp.sum(leaf, axis=_trailing(leaf)) for leaf in jax.tree.leaves(products)]
    )


def lengths(norm: Norm, tree: ArrayTree) -> ArrayTree:
    """Return the Euclidean lengths of the groups, scaled so that squares neither overflow nor vanish."""
    magnitudes = jax.tree.map(jnp.abs, tree)
    if norm == "element":
        return magnitudes
    if norm == "block":
        largest = jax.tree.map(lambda leaf: jnp.max(leaf, initial=0.0), magnitudes)
    else:
        tops = [jnp.max(leaf, axis=_trailing(leaf), initial=0.0) for leaf in jax.tree.leaves(magnitudes)]
        largest = _combine_leaves(jnp.maximum, tops)
    unit = jax.tree.map(lambda top: jnp.where(top > 0, top, jnp.ones_like(top)), largest)
    scaled = jax.tree.map(jnp.divide, magnitudes, broadcast(norm, unit, magnitudes))
    squares = inner_products(norm, scaled, scaled)
    return jax.tree.map(lambda top, square: top * jnp.sqrt(square), largest, squares)


def broadcast(norm: Norm, statistic: ArrayTree, template: ArrayTree) -> ArrayTree:
    """Return a statistic of the groups in the layout and the dtypes of the leaves of ``template``."""
    if norm == "particle":
        return jax.tree.map(lambda leaf: _particle_column(statistic, leaf).astype(leaf.dtype), template)
    return jax.tree.map(lambda value, leaf: value.astype(leaf.dtype), statistic, template)


def all_finite(norm: Norm, tree: ArrayTree) -> ArrayTree:
    """Return for every group whether all its numbers are finite."""
    finite = jax.tree.map(jnp.isfinite, tree)
    if norm == "element":
        return finite
    if norm == "block":
        return jax.tree.map(jnp.all, finite)
    return reduce(jnp.logical_and, [jnp.all(leaf, axis=_trailing(leaf)) for leaf in jax.tree.leaves(finite)])


def select_leaves(norm: Norm, usable: ArrayTree, new: ArrayTree, old: ArrayTree) -> ArrayTree:
    """Return the new leaves where their group is usable, and the old ones elsewhere."""
    if norm != "particle":
        return select_statistics(usable, new, old)
    return jax.tree.map(
        lambda leaf, old_leaf: jnp.where(_particle_column(usable, leaf), leaf, old_leaf), new, old
    )


def select_statistics(usable: ArrayTree, new: ArrayTree, old: ArrayTree) -> ArrayTree:
    """Return the new statistics of usable groups, and the old ones of the others."""
    return jax.tree.map(jnp.where, usable, new, old)


def count_frozen(usable: ArrayTree) -> Int[Array, ""]:
    """Return how many groups are not usable."""
    return sum(
        (jnp.sum(~leaf, dtype=jnp.int32) for leaf in jax.tree.leaves(usable)), jnp.zeros((), jnp.int32)
    )


def freeze(norm: Norm, usable: ArrayTree, new: Any, old: Any, statistics: tuple[str, ...]) -> Any:
    """Return the new state of the groups that are usable and the old one of the others, and count these.

    Args:
        norm: who bets.
        usable: which groups are usable.
        new: a state with trees ``displacement`` and ``total``, statistics and ``num_nonfinite``.
        old: the state before.
        statistics: names of the fields with one number per group.
    """
    leaves = {
        name: select_leaves(norm, usable, getattr(new, name), getattr(old, name))
        for name in ("displacement", "total")
    }
    numbers = {name: select_statistics(usable, getattr(new, name), getattr(old, name)) for name in statistics}
    return old._replace(**leaves, **numbers, num_nonfinite=old.num_nonfinite + count_frozen(usable))
