"""Targets from NumPyro models, from log densities of constrained values, and from priors with a likelihood."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer.initialization import init_to_uniform

from probinfer.core.binding import Bound, LogDensity, hold
from probinfer.core.types import ArrayTree, LogDensityFn, Scalar, strong_array
from probinfer.targets import model_sites, numpyro_model, prior_trees, transforms
from probinfer.targets.assembly import assemble, at_example, check_scalar, checked_example, named_terms
from probinfer.targets.base import Prior, Target
from probinfer.targets.transforms import Bijectors

__all__ = ["from_logdensity", "from_numpyro", "from_prior"]


def from_numpyro(
    model: Callable, *args: Any, init_strategy: Callable = init_to_uniform, **kwargs: Any
) -> Target:
    """The posterior of a NumPyro model given its arguments.

    Positions are dictionaries of the unconstrained latent sites; draws add the deterministic sites. The prior is the
    joint density of the latent sites, and the likelihood that of the observed sites with every ``numpyro.factor``;
    ``prior`` is ``None`` where a latent site is improper, masked or scaled. Around a latent site ``scale`` and ``mask``
    act on its log Jacobian too, as in NumPyro's samplers. ``numpyro.param`` and mutable sites keep the values of the
    first run, so random flax and nnx modules and learned reparametrizations run as they do there; a ``Delta`` is its
    value. The model is traced under abstract arrays: arrays among the arguments are data (new data of the same
    shape compiles nothing), everything else is static.

    Args:
        model: a NumPyro model without discrete latent sites and subsampling plates. Handlers
            (``condition``, ``reparam``, ``scale``, ``mask``, ``substitute``) may be around it or in it.
        *args: arguments of the model.
        init_strategy: one of ``numpyro.infer.init_to_*``: where ``init`` draws starting points.
        **kwargs: keyword arguments of the model.

    Returns:
        The target.

    Raises:
        ValueError: the model has a discrete latent site, a subsampling plate, no latent site, a fixed seed, or looks at
            the values of JAX arrays among its arguments; the message says what to do.
    """
    args, kwargs = model_sites.read_arguments(args, kwargs)
    model_sites.refuse_seed_handler(model)
    given = hold(model), hold(args), hold(kwargs)
    sites = model_sites.inspect_model(*given)
    if sites.is_fixed or sites.has_masses:
        given = hold(model_sites.without_fixed_sites(model, args, kwargs, sites)), *given[1:]
        sites = model_sites.inspect_model(*given)
    strategy, settings = _strategy(init_strategy)
    prior = Prior(
        sample=Bound(numpyro_model.prior_sample, *given),
        logdensity_fn=LogDensity(numpyro_model.prior_logdensity, *given),
    )
    return Target(
        logdensity_fn=LogDensity(numpyro_model.logdensity, *given),
        constrain_fn=Bound(numpyro_model.constrain, *given),
        unconstrain_fn=Bound(numpyro_model.unconstrain, *given, sites.latent),
        draw_fn=Bound(numpyro_model.initial_draw, *given, strategy, settings),
        terms_fn=Bound(numpyro_model.terms, *given),
        log_jacobian_fn=LogDensity(numpyro_model.log_jacobian, *given),
        prior=prior if sites.proper else None,
        log_likelihood_fn=LogDensity(numpyro_model.log_likelihood, *given),
        names=sites.names,
    )


def _strategy(init_strategy: Callable) -> tuple[Callable, dict]:
    """Function and settings apart, so that a strategy built anew is the same structure."""
    if not isinstance(init_strategy, functools.partial):
        return init_strategy, {}
    settings = dict(init_strategy.keywords)
    if "values" in settings:
        settings["values"] = jax.tree.map(strong_array, settings["values"])
    return init_strategy.func, settings


def from_logdensity(
    logdensity_fn: LogDensityFn,
    example: ArrayTree,
    constraints: Any = None,
    prior: Any = None,
    log_likelihood_fn: LogDensityFn | None = None,
) -> Target:
    """The posterior with a given log density of the constrained values.

    Args:
        logdensity_fn: log density of the constrained values: the whole posterior (prior times likelihood) up to a
            constant, without Jacobian. ``LogDensity(fn, *data)`` lets new data reuse compiled code.
        example: constrained values inside their supports: gives structure, shapes and dtypes, and the center of the
            starting points where there is no prior.
        constraints: a tree of NumPyro constraints (``None``: unconstrained); one constraint may stand for a branch.
            If it is ``None`` and ``prior`` is a tree of distributions, their supports are taken.
        prior: the prior *contained* in ``logdensity_fn``: a tree of NumPyro distributions with the structure and
            shapes of ``example``, or a ``Prior`` on unconstrained space. It is not added to the log density.
        log_likelihood_fn: log likelihood of the constrained values, for tempering.

    Returns:
        The target. ``init`` draws from the prior; without one it draws uniformly within 2 of the example in
        unconstrained space, the radius halved every 10 tries.

    Raises:
        TypeError: ``example`` is not floating point, or a leaf of ``prior`` or ``constraints`` is of the wrong kind.
        ValueError: structures, shapes or supports disagree, ``example`` is outside its support or not finite, or a
            function does not return a scalar.
    """
    logdensity_fn = _taken("logdensity_fn", logdensity_fn)
    log_likelihood_fn = _taken("log_likelihood_fn", log_likelihood_fn)
    example = checked_example(example)
    is_tree = prior is not None and not isinstance(prior, Prior)
    priors = prior_trees.priors_like(prior, example) if is_tree else None
    bijectors, start = at_example(priors if constraints is None else constraints, example)
    if is_tree:
        prior_trees.check_supports(priors, bijectors)
        prior = _prior_of(priors, bijectors, prior_trees.dtypes_of(example))
    elif prior is not None:
        prior = _checked_prior(prior, start)
    check_scalar("logdensity_fn", logdensity_fn, example)
    return assemble(
        transforms.pullback(logdensity_fn, bijectors),
        bijectors,
        start,
        names=transforms.leaf_names(example),
        terms_fn=Bound(named_terms, bijectors, {"logdensity_fn": logdensity_fn}),
        prior=prior,
        log_likelihood_fn=_likelihood_of(log_likelihood_fn, bijectors, example),
    )


def from_prior(priors: Any, log_likelihood_fn: LogDensityFn) -> Target:
    """The posterior of independent priors, one a leaf, and a log likelihood of the constrained values.

    Args:
        priors: a tree of NumPyro distributions; its structure is that of the values, and the draws have its names.
        log_likelihood_fn: log likelihood of the constrained values; ``LogDensity(fn, *data)`` lets new data reuse
            compiled code.

    Returns:
        The target, in the default floating dtype. ``init`` draws from the prior. ``prior`` is ``None`` where a leaf
        is improper or masked; ``init`` then draws uniformly within 2 of the origin.

    Raises:
        TypeError: a leaf of ``priors`` is not a distribution.
        ValueError: a support is discrete or has no bijector, or the log likelihood is not a scalar.
    """
    dtype = jnp.result_type(float)
    log_likelihood_fn = _taken("log_likelihood_fn", log_likelihood_fn)
    transforms.from_priors(priors)
    priors = transforms.map_leaves(lambda leaf: transforms.with_dtype(leaf, dtype), priors)
    bijectors = transforms.from_priors(priors)
    start = transforms.map_leaves(
        lambda leaf, prior: jnp.zeros(leaf.inverse_shape(tuple(prior.shape())), dtype), bijectors, priors
    )
    values = transforms.forward(bijectors, start)
    likelihood = _likelihood_of(log_likelihood_fn, bijectors, values)
    return assemble(
        LogDensity(_joint_logdensity, priors, bijectors, log_likelihood_fn),
        bijectors,
        start,
        names=transforms.leaf_names(values),
        terms_fn=Bound(_joint_terms, priors, bijectors, log_likelihood_fn),
        prior=_prior_of(priors, bijectors, prior_trees.dtypes_of(values)),
        log_likelihood_fn=likelihood,
    )


def _taken(name: str, fn: Any) -> Any:
    """A function as it is now: bound to several others, it is read once."""
    if fn is None or isinstance(fn, Bound):
        return fn
    if not callable(fn):
        raise TypeError(f"{name} must be a function of the constrained values, got {type(fn).__name__}")
    return LogDensity(fn)


def _joint_logdensity(
    priors: Any, bijectors: Bijectors, log_likelihood_fn: LogDensityFn, position: ArrayTree
) -> Scalar:
    values, log_det = transforms.forward_and_log_det(bijectors, position)
    return prior_trees.log_prob(priors, values) + log_det + log_likelihood_fn(values)


def _joint_terms(
    priors: Any, bijectors: Bijectors, log_likelihood_fn: LogDensityFn, position: ArrayTree
) -> dict:
    terms = named_terms(bijectors, {"log_likelihood_fn": log_likelihood_fn}, position)
    return terms | prior_trees.log_prob_terms(priors, transforms.forward(bijectors, position))


def _likelihood_at(bijectors: Bijectors, log_likelihood_fn: LogDensityFn, position: ArrayTree) -> Scalar:
    return log_likelihood_fn(transforms.forward(bijectors, position))


def _likelihood_of(
    log_likelihood_fn: LogDensityFn | None, bijectors: Bijectors, example: ArrayTree
) -> LogDensity | None:
    if log_likelihood_fn is None:
        return None
    check_scalar("log_likelihood_fn", log_likelihood_fn, example)
    return LogDensity(_likelihood_at, bijectors, log_likelihood_fn)


def _prior_of(priors: Any, bijectors: Bijectors, dtypes: Any) -> Prior | None:
    leaves = transforms.leaves(priors)
    if not all(map(model_sites.is_proper, leaves)):
        return None
    return Prior(
        sample=Bound(prior_trees.sample, priors, bijectors, dtypes),
        logdensity_fn=LogDensity(prior_trees.logdensity, priors, bijectors),
    )


def _checked_prior(prior: Prior, start: ArrayTree) -> Prior:
    """A user's ``Prior`` with its functions made pytrees, held against an unconstrained position."""
    prior = Prior(sample=Bound(prior.sample), logdensity_fn=LogDensity(prior.logdensity_fn))
    drawn = jax.eval_shape(prior.sample, jax.random.key(0))
    found, expected = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (drawn, start))
    if found != expected:
        raise ValueError(
            "prior.sample(key) must draw an unconstrained position with the structure and shapes of the example in "
            f"unconstrained space: expected {expected}, got {found}"
        )
    check_scalar("prior.logdensity_fn", prior.logdensity_fn, start)
    return prior
