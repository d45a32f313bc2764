"""Trees of NumPyro distributions as priors: held against an example, sampled and evaluated on unconstrained space."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions.transforms import IndependentTransform, Transform

from probinfer.core.types import ArrayTree, PRNGKey, PyTree, Scalar
from probinfer.targets import transforms
from probinfer.targets.transforms import Bijectors

__all__ = [
    "check_supports",
    "dtypes_of",
    "log_prob",
    "log_prob_terms",
    "logdensity",
    "priors_like",
    "same_support",
    "sample",
]


def dtypes_of(example: ArrayTree) -> PyTree:
    """The tree of dtypes of a tree of arrays: static leaves for ``sample``."""
    return jax.tree.map(lambda leaf: leaf.dtype, example)


def priors_like(priors: Any, example: ArrayTree) -> Any:
    """Hold a tree of distributions against an example, and give their parameters its dtypes.

    Args:
        priors: distributions in the structure of ``example``.
        example: constrained values.

    Returns:
        The priors; Python floats among their parameters have become arrays, so that new values are new data.

    Raises:
        TypeError: a leaf is not a distribution.
        ValueError: the structures differ, or a distribution has another shape than its leaf.
    """
    transforms.from_priors(priors)
    try:
        return transforms.map_leaves(_prior_like, priors, transforms.name_tree(priors), example)
    except ValueError as error:
        raise ValueError(f"the priors do not fit the example: {error}") from error


def _prior_like(prior: Any, name: str, leaf: jax.Array) -> Any:
    if tuple(prior.shape()) != leaf.shape:
        raise ValueError(
            f"leaf '{name}' has shape {leaf.shape}, but its prior {type(prior).__name__} has shape {prior.shape()} "
            f"(batch {prior.batch_shape}, event {prior.event_shape}); use prior.expand({leaf.shape}) for "
            "independent entries"
        )
    return transforms.with_dtype(prior, leaf.dtype)


def check_supports(priors: Any, bijectors: Bijectors) -> None:
    """Refuse priors whose support is not the constraint of their leaf.

    Raises:
        ValueError: the supports differ; the message names the leaf.
    """
    leaves = transforms.leaves(priors)
    supports = transforms.leaves(transforms.from_priors(priors))
    given = transforms.leaves(bijectors)
    for name, prior, support, constraint in zip(
        transforms.leaf_names(priors), leaves, supports, given, strict=True
    ):
        if not same_support(support, constraint, tuple(prior.shape())):
            raise ValueError(
                f"leaf '{name}' is constrained to {transforms.describe(constraint)}, but its prior "
                f"{type(prior).__name__} has the support {transforms.describe(support)}: take a prior on the "
                "constrained set (LogNormal, Gamma or HalfNormal for a positive parameter), truncate it "
                "(numpyro.distributions.TruncatedNormal), or change the constraint"
            )


def sample(priors: Any, bijectors: Bijectors, dtypes: PyTree, key: PRNGKey) -> ArrayTree:
    """An unconstrained draw; a variate rounded to the boundary of its support is pulled back to a finite position."""
    treedef = transforms.structure(priors)
    keys = treedef.unflatten(list(jax.random.split(key, treedef.num_leaves)))
    values = transforms.map_leaves(
        lambda prior, k, dtype: prior.sample(k).astype(dtype), priors, keys, dtypes
    )
    position = transforms.map_leaves(
        lambda leaf, value: leaf.inv(value).astype(value.dtype), bijectors, values
    )
    return transforms.finite(position)


def log_prob_terms(priors: Any, values: ArrayTree) -> dict[str, Scalar]:
    """The log density of each leaf of the constrained values, by name."""
    terms = transforms.map_leaves(lambda prior, value: jnp.sum(prior.log_prob(value)), priors, values)
    return dict(zip(transforms.leaf_names(priors), jax.tree.leaves(terms), strict=True))


def log_prob(priors: Any, values: ArrayTree) -> Scalar:
    """The log density of constrained values under independent priors, one a leaf."""
    terms = list(log_prob_terms(priors, values).values())
    return jnp.asarray(sum(terms, start=0.0))


def logdensity(priors: Any, bijectors: Bijectors, position: ArrayTree) -> Scalar:
    """The log density of an unconstrained position under the priors, log Jacobian included."""
    values, log_det = transforms.forward_and_log_det(bijectors, position)
    return log_prob(priors, values) + log_det


def same_support(first: Transform, second: Transform, shape: tuple[int, ...]) -> bool:
    """Say whether two bijectors have one image: equal codomains, or each image of test points lies in the other.

    Args:
        first: a bijector.
        second: a bijector.
        shape: the shape of the constrained value.

    Returns:
        Whether the supports agree (open and closed bounds are the same support). Traced bounds are not compared.
    """
    first, second = _base(first), _base(second)
    if any(isinstance(bound, jax.core.Tracer) for bound in jax.tree.leaves((first, second))):
        return True
    with jax.ensure_compile_time_eval():
        return first == second or (_covers(first, second, shape) and _covers(second, first, shape))


def _base(leaf: Transform) -> Transform:
    while isinstance(leaf, IndependentTransform):
        leaf = leaf.base_transform
    return leaf


def _covers(outer: Transform, inner: Transform, shape: tuple[int, ...]) -> bool:
    """Say whether images of fixed, widely spread points under ``inner`` lie in the image of ``outer``."""
    try:
        points = np.random.default_rng(0).normal(scale=2.0, size=(16, *inner.inverse_shape(shape)))
        values = np.asarray(inner(jnp.asarray(points, jnp.result_type(float))))
        z = np.asarray(outer.inv(jnp.asarray(values)))
        return bool(np.all(np.isfinite(z)) and np.all(transforms.gives_back(outer, values, z)))
    except (TypeError, ValueError, IndexError):
        return False
