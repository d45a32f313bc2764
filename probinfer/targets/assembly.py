"""What the constructors of targets share: the example and its bijectors, checks, and the fields made of bijectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.arguments import check_finite, check_floating
from probinfer.core.binding import Bound, LogDensity
from probinfer.core.types import ArrayTree, PRNGKey, strong_array
from probinfer.targets import transforms
from probinfer.targets.base import Prior, Target
from probinfer.targets.transforms import Bijectors

__all__ = ["assemble", "at_example", "check_scalar", "checked_example", "named_terms"]


def checked_example(example: ArrayTree) -> ArrayTree:
    """The example with arrays at its leaves.

    Raises:
        TypeError: a leaf is not floating point.
        ValueError: there is no leaf, or a leaf is not finite.
    """
    example = jax.tree.map(strong_array, example)
    leaves = jax.tree.leaves(example)
    if not leaves:
        raise ValueError("the example has no leaves: there is nothing to infer")
    for name, leaf in zip(transforms.leaf_names(example), leaves, strict=True):
        check_floating(f"leaf '{name}' of the example", leaf)
        check_finite(f"leaf '{name}' of the example", leaf)
    return example


def at_example(constraints: Any, example: ArrayTree) -> tuple[Bijectors, ArrayTree]:
    """The bijectors of the example's structure and dtypes, and its unconstrained position.

    Raises:
        TypeError: a constraint is of the wrong kind.
        ValueError: the structures or shapes differ, or the example is outside its support.
    """
    bijectors = transforms.from_constraints(constraints, example)
    bijectors = transforms.map_leaves(
        lambda leaf, e: transforms.with_dtype(leaf, e.dtype), bijectors, example
    )
    start = transforms.inverse(bijectors, example)
    for name, leaf, value in zip(
        transforms.leaf_names(example),
        jax.tree.leaves(example),
        jax.tree.leaves(jax.eval_shape(transforms.forward, bijectors, start)),
        strict=True,
    ):
        if value.shape != leaf.shape:
            raise ValueError(
                f"leaf '{name}' of the example has shape {leaf.shape}, but its constraint has {value.shape}: give "
                "bounds that broadcast to the leaf, not beyond it"
            )
    return bijectors, start


def check_scalar(name: str, fn: Any, example: ArrayTree) -> None:
    """Refuse a function of the constrained values that does not return one floating number; nothing is computed.

    Raises:
        TypeError: ``fn`` is not callable.
        ValueError: the result is not a floating scalar.
    """
    if not callable(fn):
        raise TypeError(f"{name} must be a function of the constrained values, got {type(fn).__name__}")
    result = jax.eval_shape(lambda values: fn(values), example)
    if getattr(result, "shape", None) != () or not jnp.issubdtype(result.dtype, jnp.floating):
        raise ValueError(
            f"{name} must return one floating number (shape ()), got {result}; sum over observations"
        )


def assemble(
    logdensity_fn: Bound,
    bijectors: Bijectors,
    start: ArrayTree,
    *,
    names: tuple[str, ...],
    terms_fn: Bound,
    prior: Prior | None = None,
    log_likelihood_fn: Bound | None = None,
) -> Target:
    """A target whose bijectors are known: the fields that follow from them, and starting points.

    Args:
        logdensity_fn: log density of the unconstrained position.
        bijectors: tree of bijectors.
        start: an unconstrained position: the center of the starting points where there is no prior.
        names: names of the leaves.
        terms_fn: position to the named summands of the log density.
        prior: the normalized prior, where known.
        log_likelihood_fn: log likelihood of the position, where known.

    Returns:
        The target.
    """
    return Target(
        logdensity_fn=logdensity_fn,
        constrain_fn=Bound(transforms.forward, bijectors),
        unconstrain_fn=Bound(_unconstrain, bijectors, start),
        draw_fn=Bound(_draw_around, start) if prior is None else Bound(_draw_from_prior, prior.sample),
        terms_fn=terms_fn,
        log_jacobian_fn=LogDensity(transforms.log_abs_det_jacobian, bijectors),
        prior=prior,
        log_likelihood_fn=log_likelihood_fn,
        names=names,
    )


def named_terms(bijectors: Bijectors, fns: dict, position: ArrayTree) -> dict:
    """The values of named functions of the constrained values, and the log Jacobian, at a position."""
    values, log_det = transforms.forward_and_log_det(bijectors, position)
    return {name: fn(values) for name, fn in fns.items()} | {"the bijectors (log Jacobian)": log_det}


def _draw_from_prior(sample: Callable, key: PRNGKey, attempt: Any) -> ArrayTree:
    del attempt
    return sample(key)


def _draw_around(start: ArrayTree, key: PRNGKey, attempt: Any) -> ArrayTree:
    """Uniform within ``2 * 2^-floor(attempt / 10)`` of the start."""
    leaves = jax.tree.leaves(start)
    keys = jax.random.split(key, len(leaves))
    radius = 2.0 * jnp.exp2(-(attempt // 10).astype(leaves[0].dtype))
    drawn = [
        leaf + radius.astype(leaf.dtype) * jax.random.uniform(k, leaf.shape, leaf.dtype, -1.0, 1.0)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(start), drawn)


def _unconstrain(bijectors: Bijectors, start: ArrayTree, values: ArrayTree) -> ArrayTree:
    position = transforms.inverse(bijectors, values)
    for name, z, expected in zip(
        transforms.leaf_names(start), jax.tree.leaves(position), jax.tree.leaves(start), strict=True
    ):
        if z.shape != expected.shape:
            raise ValueError(
                f"leaf '{name}' gives an unconstrained position of shape {z.shape}, expected {expected.shape}"
            )
    return position
