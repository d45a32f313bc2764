"""Who bets: every number, every leaf or every particle; sums and sizes within one such group.

Three layouts of the same statistics. ``"element"``: a tree like the parameters. ``"block"``: a tree of scalars, one a
leaf. ``"particle"``: one array of shape (N,) for all leaves, whose leading axis counts the particles.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.errors import check_floating
from probinfer.core.types import Array, ArrayTree, Int

__all__ = [
    "Norm",
    "check_norm",
    "check_params",
    "choose",
    "count_frozen",
    "finite",
    "inner",
    "outcomes",
    "select",
    "size",
    "spread",
    "wide",
    "zeros",
]

Norm = str  # a value outside the three is refused by check_norm, in words


def check_norm(norm: Any) -> None:
    """Refuse what is not the name of a norm.

    Raises:
        ValueError: an unknown name.
    """
    if norm not in ("element", "block", "particle"):
        raise ValueError(f"norm must be 'element', 'block' or 'particle', got {norm!r}")


def check_params(params: ArrayTree, *, particles: bool) -> None:
    """Refuse parameters that cannot be moved.

    Raises:
        TypeError: a leaf that is not floating point.
        ValueError: no leaf at all, or particles without one common leading axis.
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
            f"the leading axis of every leaf must count the same particles, got shapes {shapes}; "
            "stack the particles along axis 0"
        )


def _wide(leaf: Any) -> Any:
    """The dtype in which a leaf is summed: its own, at least float32."""
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def zeros(tree: ArrayTree) -> ArrayTree:
    """Zeros in the shape of the parameters, at least float32."""
    return jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), _wide(leaf)), tree)


def wide(tree: ArrayTree) -> ArrayTree:
    """The parameters, at least float32."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(_wide(leaf)), tree)


def outcomes(gradients: ArrayTree) -> ArrayTree:
    """Minus the gradients of a loss, at least float32."""
    return jax.tree.map(lambda leaf: -jnp.asarray(leaf).astype(_wide(leaf)), gradients)


def _trailing(leaf: Array) -> tuple[int, ...]:
    return tuple(range(1, leaf.ndim))


def _together(combine: Any, parts: list[Array]) -> Array:
    """Combine what the leaves say of the same particles, in their widest dtype."""
    wide = jnp.result_type(*parts)
    return reduce(combine, (part.astype(wide) for part in parts))


def inner(norm: Norm, a: ArrayTree, b: ArrayTree) -> ArrayTree:
    """Inner products within the groups."""
    products = jax.tree.map(jnp.multiply, a, b)
    if norm == "element":
        return products
    if norm == "block":
        return jax.tree.map(jnp.sum, products)
    return _together(jnp.add, [jnp.sum(leaf, axis=_trailing(leaf)) for leaf in jax.tree.leaves(products)])


def size(norm: Norm, tree: ArrayTree) -> ArrayTree:
    """Euclidean lengths of the groups; squares neither overflow nor vanish."""
    magnitudes = jax.tree.map(jnp.abs, tree)
    if norm == "element":
        return magnitudes
    if norm == "block":
        largest = jax.tree.map(lambda leaf: jnp.max(leaf, initial=0.0), magnitudes)
    else:
        tops = [jnp.max(leaf, axis=_trailing(leaf), initial=0.0) for leaf in jax.tree.leaves(magnitudes)]
        largest = _together(jnp.maximum, tops)
    unit = jax.tree.map(lambda top: jnp.where(top > 0, top, jnp.ones_like(top)), largest)
    scaled = jax.tree.map(jnp.divide, magnitudes, spread(norm, unit, magnitudes))
    return jax.tree.map(lambda top, square: top * jnp.sqrt(square), largest, inner(norm, scaled, scaled))


def spread(norm: Norm, statistic: ArrayTree, like: ArrayTree) -> ArrayTree:
    """Bring a statistic of the groups to the leaves, to broadcast against them."""
    if norm == "particle":
        return jax.tree.map(
            lambda leaf: statistic.reshape((-1,) + (1,) * (leaf.ndim - 1)).astype(leaf.dtype), like
        )
    return jax.tree.map(lambda value, leaf: value.astype(leaf.dtype), statistic, like)


def finite(norm: Norm, tree: ArrayTree) -> ArrayTree:
    """Say of every group whether all its numbers are finite."""
    fine = jax.tree.map(jnp.isfinite, tree)
    if norm == "element":
        return fine
    if norm == "block":
        return jax.tree.map(jnp.all, fine)
    return reduce(jnp.logical_and, [jnp.all(leaf, axis=_trailing(leaf)) for leaf in jax.tree.leaves(fine)])


def select(norm: Norm, usable: ArrayTree, new: ArrayTree, old: ArrayTree) -> ArrayTree:
    """Take the new leaves where their group is usable."""
    if norm != "particle":
        return choose(usable, new, old)
    return jax.tree.map(
        lambda leaf, before: jnp.where(usable.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, before), new, old
    )


def choose(usable: ArrayTree, new: ArrayTree, old: ArrayTree) -> ArrayTree:
    """Take the new statistics of the groups that are usable."""
    return jax.tree.map(jnp.where, usable, new, old)


def count_frozen(usable: ArrayTree) -> Int[Array, ""]:
    """How many groups are not usable."""
    return sum(
        (jnp.sum(~leaf, dtype=jnp.int32) for leaf in jax.tree.leaves(usable)), jnp.zeros((), jnp.int32)
    )
