"""The hyperparameter posterior of a Gaussian process as a ``Target``, for any engine.

p(θ | y) ∝ p(y | θ) p(θ), where p(y | θ) is the evidence of any inference method. A position is a dictionary from dotted
names to the values of the free hyperparameters; ``rebuild`` inserts it into the model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution

from probinfer.core.types import Array, Float
from probinfer.gp.approximation.conditioning import condition, reference_sites
from probinfer.gp.approximation.sites import Sites
from probinfer.gp.model.leaves import constraint_of, get_leaf, leaf_names, map_named
from probinfer.gp.model.model import Model
from probinfer.gp.model.priors import Tied, fixed
from probinfer.targets import LogDensity, Target, from_prior

__all__ = ["FreeHyperparameters", "free_hyperparameters", "hyper_posterior", "rebuild"]


@dataclasses.dataclass(frozen=True)
class FreeHyperparameters:
    """The learned leaves of a model: hashable, so that it can be static in jitted functions.

    Attributes:
        names: dotted names of the leaves with a distribution.
        ties: pairs (leaf, leaf whose value it takes).
    """

    names: tuple[str, ...]
    ties: tuple[tuple[str, str], ...] = ()

    def values(self, model: Any) -> dict[str, Any]:
        """The free hyperparameters of a model by name."""
        return {name: get_leaf(model, name) for name in self.names}


def free_hyperparameters(model: Model, prior: Any) -> tuple[FreeHyperparameters, dict[str, Distribution]]:
    """Read a prior tree: the learned leaves and their distributions.

    Args:
        model: the model.
        prior: a tree shaped like it, with distributions, ``fixed`` and ties at its leaves.

    Returns:
        The free leaves, and their priors by dotted name.

    Raises:
        TypeError: a leaf of the prior is neither a distribution, ``gp.fixed`` nor a tie.
        ValueError: the prior does not have the structure of the model, a shape or a support does not fit, or no leaf is
            free.
    """
    leaves: dict[str, Any] = {}
    for name in leaf_names(model):
        try:
            leaves[name] = get_leaf(prior, name)
        except KeyError as error:
            raise ValueError(
                f"the prior has nothing for {name}; make it with gp.default_prior(model, X) and replace leaves"
            ) from error
    priors = {name: value for name, value in leaves.items() if isinstance(value, Distribution)}
    ties = tuple((name, value.source) for name, value in leaves.items() if isinstance(value, Tied))
    for name, value in leaves.items():
        if not (isinstance(value, (Distribution, Tied)) or value is fixed):
            raise TypeError(
                f"the prior of {name} must be a NumPyro distribution, gp.fixed or a tie, got {type(value).__name__}"
            )
    for name, distribution in priors.items():
        _check_prior(model, name, distribution)
    for name, source in ties:
        _check_tie(model, name, source, priors)
    if not priors:
        raise ValueError(
            "every hyperparameter is fixed, so nothing is left to learn; use gp.condition instead"
        )
    return FreeHyperparameters(tuple(priors), ties), priors


def rebuild(free: FreeHyperparameters, model: Model, values: dict[str, Any]) -> Model:
    """Insert free hyperparameters into the model; fixed leaves keep its values, tied ones take those of their source.

    Args:
        free: the learned leaves.
        model: the model.
        values: by dotted name; arrays may have further leading axes.

    Returns:
        The model at these values.
    """
    source = {**{name: name for name in free.names}, **dict(free.ties)}
    return map_named(lambda name, leaf: values[source[name]] if name in source else leaf, model)


def hyper_posterior(
    model: Model,
    prior: Any,
    X: Float[Array, "N D"],
    y: Float[Array, " N"],
    inference: Any,
    *,
    sites: Sites | None = None,
) -> tuple[FreeHyperparameters, Target]:
    """The target p(θ | y) ∝ p(y | θ) p(θ).

    Its first initial position has the model's own values, further ones are drawn from the prior. Iterative inference
    starts at the sites of the model's own values, so the density is a function of the position alone; it is NaN where
    there is no evidence (see ``admissible``).

    Args:
        model: the model; fixed leaves keep its values.
        prior: a tree shaped like the model.
        X: checked inputs.
        y: checked outputs.
        inference: the method whose evidence is used for p(y | θ).
        sites: start of its searches; by default the sites of the model's own values.

    Returns:
        The learned leaves, and the target over a dictionary of their values.

    Raises:
        TypeError: see ``free_hyperparameters``.
        ValueError: see ``free_hyperparameters``.
    """
    free, priors = free_hyperparameters(model, prior)
    sites = reference_sites(model, X, y, inference) if sites is None else sites
    target = from_prior(priors, LogDensity(_log_evidence_at, free, inference, model, X, y, sites))
    return free, dataclasses.replace(target, start=target.unconstrain(free.values(model)))


def _log_evidence_at(free, inference, model, X, y, sites, values):
    # NaN if there is no evidence: an energy far from a fixed point may exceed every evidence, and would win the search.
    return condition(rebuild(free, model, values), X, y, inference, sites=sites).log_evidence


def _check_prior(model, name, prior):
    value = get_leaf(model, name)
    shape = tuple(prior.batch_shape) + tuple(prior.event_shape)
    if shape != np.shape(value):
        raise ValueError(
            f"the prior of {name} has shape {shape}, the hyperparameter {np.shape(value)}; "
            f"use .expand({list(np.shape(value))}) or set the model's initial value to that shape"
        )
    constraint, support = constraint_of(model, name), prior.support
    if prior.is_discrete:
        raise ValueError(
            f"the prior of {name} is discrete ({type(prior).__name__}); hyperparameters are continuous"
        )
    points = None if support is constraint else _support_points(support)
    if points is not None and not bool(np.all(np.asarray(constraint(points)))):
        raise ValueError(
            f"the prior of {name} has support {support}, but the hyperparameter must be {constraint}; "
            "use for example LogNormal, Gamma or HalfNormal"
        )
    if isinstance(value, jax.Array) and not bool(np.all(np.asarray(support(np.asarray(value))))):
        raise ValueError(
            f"the model's value of {name} is outside the support {support} of its prior; start inside it"
        )


def _support_points(support):
    """Points of a support, on both sides of zero if it has both; None if no bijector is known for it."""
    from numpyro.distributions import biject_to

    try:
        return biject_to(support)(jnp.asarray([-20.0, -1.0, 0.0, 1.0, 20.0]))
    except (NotImplementedError, TypeError, ValueError):
        return None


def _check_tie(model, name, source, priors):
    if source not in priors:
        raise ValueError(f"{name} is tied to {source}, which has no prior of its own")
    if np.shape(get_leaf(model, name)) != np.shape(get_leaf(model, source)):
        raise ValueError(
            f"{name} is tied to {source} but their shapes differ: {np.shape(get_leaf(model, name))} and "
            f"{np.shape(get_leaf(model, source))}"
        )
