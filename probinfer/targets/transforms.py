"""Trees of bijectors with the structure of the position, and the pull-back of densities through them.

A constrained value ``theta = T(z)`` is the image of an unconstrained position ``z`` under one bijector a leaf
(``numpyro.distributions.biject_to`` of the leaf's constraint). The density of ``z`` is then
``log p_z(z) = log p(T(z)) + log |det dT(z)/dz|``. NumPyro's distributions, constraints and bijectors are pytrees
themselves; trees that hold them are walked here, with ``is_leaf``, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution, biject_to
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import IdentityTransform, Transform

from probinfer.core.arguments import check_floating
from probinfer.core.binding import LogDensity
from probinfer.core.types import ArrayTree, LogDensityFn, Scalar, strong_array

__all__ = [
    "Bijectors",
    "bijector",
    "describe",
    "finite",
    "forward",
    "forward_and_log_det",
    "from_constraints",
    "from_priors",
    "gives_back",
    "inverse",
    "is_leaf",
    "leaf_names",
    "leaves",
    "log_abs_det_jacobian",
    "map_leaves",
    "name_tree",
    "pullback",
    "structure",
    "with_dtype",
]

Bijectors = Any
"""A tree with a NumPyro ``Transform`` (unconstrained to constrained) at each leaf."""


def is_leaf(node: Any) -> bool:
    """Say whether a node is a distribution, a constraint or a bijector: a leaf of our trees, though a pytree."""
    return isinstance(node, (Distribution, Constraint, Transform))


def leaves(tree: Any) -> list:
    """The leaves of a tree of NumPyro objects."""
    return jax.tree.leaves(tree, is_leaf=is_leaf)


def structure(tree: Any) -> Any:
    """The structure of a tree of NumPyro objects."""
    return jax.tree.structure(tree, is_leaf=is_leaf)


def name_tree(tree: Any) -> Any:
    """The tree of dotted names of a tree of NumPyro objects (see ``leaf_names``)."""
    return structure(tree).unflatten(leaf_names(tree))


def map_leaves(fn: Callable, tree: Any, *rest: Any) -> Any:
    """Map over a tree of NumPyro objects and over trees of the same structure beside it.

    Args:
        fn: called with a leaf of ``tree`` and the matching leaves of ``rest``.
        tree: a tree with NumPyro objects (or anything) at its leaves; ``None`` is an empty tree.
        *rest: trees of the structure of ``tree``.

    Returns:
        The tree of results.

    Raises:
        ValueError: the structures differ.
    """
    expected = structure(tree)
    for other in rest:
        found = structure(other)
        if found != expected:
            raise ValueError(f"the trees differ: expected the structure {expected}, got {found}")
    return jax.tree.map(fn, tree, *rest, is_leaf=is_leaf)


def leaf_names(tree: Any) -> tuple[str, ...]:
    """One dotted name per leaf (dictionary keys, fields, positions); a tree that is one leaf is called "value"."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]]
    return tuple(jax.tree_util.keystr(path, simple=True, separator=".") or "value" for path in paths)


def bijector(leaf: Any) -> Transform:
    """The map from unconstrained space onto a constraint or the support of a distribution.

    Args:
        leaf: a constraint, a bijector (returned as it is), a distribution (its support) or ``None`` (unconstrained).

    Returns:
        The bijector.

    Raises:
        TypeError: ``leaf`` is none of these.
        ValueError: the support is discrete or has no bijector.
    """
    if leaf is None:
        return IdentityTransform()
    if isinstance(leaf, Transform):
        return leaf
    support = leaf.support if isinstance(leaf, Distribution) else leaf
    if not isinstance(support, Constraint):
        raise TypeError(
            f"expected a numpyro constraint, distribution or bijector, or None for an unconstrained leaf; got "
            f"{type(leaf).__name__}"
        )
    if support.is_discrete:
        raise ValueError(
            f"the support {support!r} is discrete, and only continuous parameters can be mapped to unconstrained "
            "space: sum the discrete parameter out of the log density"
        )
    try:
        return biject_to(support)
    except NotImplementedError as error:
        raise ValueError(
            f"no bijector onto the support {support!r} is known: reparametrize, for example a direction on the "
            "sphere as a normalized Gaussian vector"
        ) from error


def _named_bijector(name: str, leaf: Any) -> Transform:
    try:
        return bijector(leaf)
    except (TypeError, ValueError) as error:
        raise type(error)(f"leaf '{name}': {error}") from error


def from_priors(priors: Any) -> Bijectors:
    """The bijectors onto the supports of a tree of distributions.

    Raises:
        TypeError: a leaf is not a distribution.
        ValueError: a support is discrete or has no bijector; the message names the leaf.
    """
    names = leaf_names(priors)
    for name, leaf in zip(names, leaves(priors), strict=True):
        if not isinstance(leaf, Distribution):
            raise TypeError(
                f"leaf '{name}' of the priors must be a numpyro distribution, got {type(leaf).__name__}"
            )
    return map_leaves(_named_bijector, name_tree(priors), priors)


def from_constraints(constraints: Any, example: ArrayTree) -> Bijectors:
    """The bijectors of a tree of constraints, with the structure of an example position.

    Args:
        constraints: constraints, bijectors, distributions or ``None`` (unconstrained) at the leaves. One leaf may stand
            for a whole sub-tree of ``example``.
        example: a constrained position; only its structure is used.

    Returns:
        A tree of the structure of ``example`` with a bijector at each leaf.

    Raises:
        TypeError: a leaf is not a constraint.
        ValueError: the structures differ, or a constraint has no bijector; the message names the leaf.
    """

    def stops(node: Any) -> bool:
        return node is None or is_leaf(node)

    treedef: Any
    named, treedef = jax.tree_util.tree_flatten_with_path(constraints, is_leaf=stops)
    try:
        parts = treedef.flatten_up_to(example)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"the constraints must have the structure of the example (one constraint may stand for a whole branch): "
            f"expected {jax.tree.structure(example)}, got {treedef}"
        ) from error
    names = (jax.tree_util.keystr(path, simple=True, separator=".") or "value" for path, _ in named)
    found = [_named_bijector(name, leaf) for name, (_, leaf) in zip(names, named, strict=True)]
    return treedef.unflatten(_spread(leaf, part) for leaf, part in zip(found, parts, strict=True))


def _spread(leaf: Transform, branch: ArrayTree) -> Bijectors:
    return jax.tree.map(lambda _: leaf, branch)


def with_dtype(leaf: Any, dtype: Any) -> Any:
    """Give the floating parameters of a NumPyro object one dtype; Python floats become arrays (data, not structure)."""

    def convert(value: Any) -> Any:
        if isinstance(value, float) and not isinstance(value, np.generic):
            return jnp.asarray(value, dtype)
        if isinstance(value, (jax.Array, np.ndarray, np.floating)) and jnp.issubdtype(
            value.dtype, jnp.floating
        ):
            return jnp.asarray(value, dtype)
        return value

    return jax.tree.map(convert, leaf)


def forward(bijectors: Bijectors, position: ArrayTree) -> ArrayTree:
    """Map an unconstrained position to constrained values, ``theta = T(z)``."""
    return map_leaves(lambda leaf, z: _like(leaf(z), z), bijectors, position)


def forward_and_log_det(bijectors: Bijectors, position: ArrayTree) -> tuple[ArrayTree, Scalar]:
    """Constrained values ``T(z)`` and ``log |det dT(z)/dz|``, summed over all leaves and batch dimensions."""
    values = forward(bijectors, position)
    terms = map_leaves(_leaf_log_det, bijectors, position, values)
    return values, jnp.asarray(sum(jax.tree.leaves(terms), start=0.0))


def _leaf_log_det(leaf: Transform, z: Any, value: Any) -> Any:
    return _like(jnp.sum(leaf.log_abs_det_jacobian(z, value)), z)


def _like(result: Any, argument: Any) -> Any:
    """Undo the promotion to 64 bits by integer constants inside some of NumPyro's bijectors."""
    return result.astype(argument.dtype) if jnp.issubdtype(result.dtype, jnp.floating) else result


def log_abs_det_jacobian(bijectors: Bijectors, position: ArrayTree) -> Scalar:
    """``log |det dT(z)/dz|`` at an unconstrained position, summed over all leaves and batch dimensions."""
    return forward_and_log_det(bijectors, position)[1]


def inverse(bijectors: Bijectors, values: ArrayTree) -> ArrayTree:
    """Map constrained values to the unconstrained position, ``z = T^{-1}(theta)``.

    Outside jit the values are checked: ``z`` must be finite and ``T(z)`` must give the values back to the square root
    of the rounding unit. A value on the boundary of its support (zero for a positive parameter) has no finite image
    and is refused. Under jit nothing is checked: such values give infinite or NaN positions.

    Args:
        bijectors: a tree of bijectors.
        values: constrained values in the same structure; floating point.

    Returns:
        The unconstrained position; shapes differ from those of ``values`` for simplices, correlation factors and
        the like.

    Raises:
        TypeError: a value is not floating point.
        ValueError: the structures differ, or a value is outside its support or on its boundary; the leaf is named.
    """
    values = jax.tree.map(strong_array, values)
    return map_leaves(_inverse_leaf, name_tree(bijectors), bijectors, values)


def _inverse_leaf(name: str, leaf: Transform, value: Any) -> Any:
    check_floating(f"leaf '{name}'", value)
    try:
        z = _like(leaf.inv(value), value)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"leaf '{name}' of shape {jnp.shape(value)} does not fit its support: {error}"
        ) from error
    if not (isinstance(value, jax.core.Tracer) or isinstance(z, jax.core.Tracer)):
        _refuse_outside(name, leaf, np.asarray(value), np.asarray(z))
    return z


def gives_back(leaf: Transform, value: Any, z: Any) -> Any:
    """Say entrywise whether ``T(z)`` gives the value back, to the square root of the rounding unit."""
    limits = np.finfo(value.dtype)
    tolerance = float(np.sqrt(limits.eps)) * np.max(np.abs(value), initial=0.0) + float(limits.tiny)
    return np.abs(np.asarray(leaf(jnp.asarray(z))) - value) <= tolerance


def _refuse_outside(name: str, leaf: Transform, value: np.ndarray, z: np.ndarray) -> None:
    if np.all(np.isfinite(z)) and np.all(gives_back(leaf, value, z)):
        return
    support = f"the support {describe(leaf)}"
    if np.any(np.isnan(value)):
        raise ValueError(f"leaf '{name}' is NaN; expected a value inside {support}")
    bad = ~np.isfinite(z) if z.shape == value.shape else np.zeros((), bool)
    where = tuple(int(i) for i in np.argwhere(bad)[0]) if bad.any() else ()
    shown = f"{value[where]}" + (f" at index {where}" if where else "")
    if np.any(np.isinf(z)) and not np.any(np.isnan(z)):
        raise ValueError(
            f"leaf '{name}' lies on the boundary of {support}, where the unconstrained position is infinite: got "
            f"{shown}; move it inside"
        )
    raise ValueError(f"leaf '{name}' is outside {support}: got {shown}; pass a value inside it")


def describe(leaf: Transform) -> str:
    """The image of a bijector in words."""
    try:
        return repr(leaf.codomain)
    except NotImplementedError:
        return f"of the bijector {type(leaf).__name__}"


def finite(position: ArrayTree) -> ArrayTree:
    """Pull infinite coordinates of an unconstrained position back to the largest that exp can take.

    A draw from a prior may round to the boundary of its support (a gamma variate to zero), whose image is infinite.
    Minus or plus infinity becomes 0.999 times the logarithm of the smallest normal number, or its opposite: the
    exponentials of both are normal numbers. NaN stays NaN.
    """

    def clip(z: jax.Array) -> jax.Array:
        bound = -0.999 * float(np.log(jnp.finfo(z.dtype).tiny))
        return jnp.where(jnp.isinf(z), jnp.sign(z) * bound, z)

    return jax.tree.map(clip, position)


def pullback(logdensity_fn: LogDensityFn, bijectors: Bijectors) -> LogDensity:
    """The log density of the unconstrained position, ``log p(T(z)) + log |det dT(z)/dz|``.

    Args:
        logdensity_fn: log density of the constrained values.
        bijectors: a tree of bijectors with the structure of the position.

    Returns:
        A ``LogDensity`` of the unconstrained position; the arrays of the bijectors are data.
    """
    return LogDensity(_pulled_back, bijectors, logdensity_fn)


def _pulled_back(bijectors: Bijectors, logdensity_fn: LogDensityFn, position: ArrayTree) -> Scalar:
    values, log_det = forward_and_log_det(bijectors, position)
    return logdensity_fn(values) + log_det
