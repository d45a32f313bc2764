"""A NumPyro model read as a density: latent sites, their supports, and the log density site by site.

Every function takes ``(model, args, kwargs)`` first, so that a target binds them once with the arrays in ``args`` and
``kwargs`` as data. The model is executed under NumPyro's handlers at each evaluation: supports that depend on other
sites, reparametrization, scaling and masking work because the model itself says what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.util import sum_rightmost
from numpyro.infer.util import compute_log_probs, constrain_fn
from numpyro.primitives import factor

from probinfer.core.types import ArrayTree, PRNGKey, Scalar, strong_array
from probinfer.targets import transforms
from probinfer.targets.fixed_sites import is_latent

__all__ = [
    "LogTerms",
    "constrain",
    "initial_draw",
    "log_jacobian",
    "log_likelihood",
    "log_terms",
    "logdensity",
    "prior_logdensity",
    "prior_sample",
    "terms",
    "trace_at_start",
    "unconstrain",
]


class LogTerms(NamedTuple):
    """The summands of the unconstrained log density, each a dictionary from site names to scalars.

    Attributes:
        prior: log densities of the latent sites at their constrained values.
        jacobian: log Jacobians of the latent sites.
        likelihood: log densities of the observed sites and the values of the ``factor`` sites.
    """

    prior: dict[str, Any]
    jacobian: dict[str, Any]
    likelihood: dict[str, Any]


# Starting points and draws from the prior.


def trace_at_start(
    model: Callable, args: tuple, kwargs: dict, strategy: Callable, settings: dict, key: PRNGKey
) -> dict:
    """A trace of the model with its latent sites where one of NumPyro's initialization strategies puts them."""
    seeded = handlers.substitute(handlers.seed(model, key), substitute_fn=partial(strategy, **settings))
    return handlers.trace(seeded).get_trace(*args, **kwargs)


def _unconstrained_latents(trace: Mapping) -> dict:
    position = {
        name: biject_to(site["fn"].support).inv(site["value"])
        for name, site in trace.items()
        if is_latent(site)
    }
    return transforms.finite(position)


def initial_draw(
    model: Callable, args: tuple, kwargs: dict, strategy: Callable, settings: dict, key: PRNGKey, attempt: Any
) -> ArrayTree:
    """An unconstrained position from one of NumPyro's initialization strategies; every attempt draws alike."""
    del attempt
    return _unconstrained_latents(trace_at_start(model, args, kwargs, strategy, settings, key))


def prior_sample(model: Callable, args: tuple, kwargs: dict, key: PRNGKey) -> ArrayTree:
    """An unconstrained draw of the latent sites from their joint prior (ancestral sampling)."""
    return _unconstrained_latents(handlers.trace(handlers.seed(model, key)).get_trace(*args, **kwargs))


# The log density and its summands.


def _constrain_site(position: ArrayTree, site: dict) -> Any:
    """The constrained value ``T(z)`` of a latent site, ``None`` elsewhere."""
    if site["name"] not in position:
        return None
    return biject_to(site["fn"].support)(_unconstrained_step(position, site))


def _unconstrained_step(position: ArrayTree, site: dict) -> Any:
    """The unconstrained value of a site; inside NumPyro's scan, which asks for one step of the stacked site, of it."""
    z, to_support = position[site["name"]], biject_to(site["fn"].support)
    step = (site.get("infer") or {}).get("_scan_current_index")
    if step is None:
        return z
    extra = to_support.codomain.event_dim - to_support.domain.event_dim
    return z[step] if jnp.ndim(z) > len(site["fn"].shape()) - extra else z


def _constrain_with_factor(position: ArrayTree, site: dict) -> Any:
    """The constrained value of a latent site, and its log Jacobian as a factor at the same place of the model.

    Handlers there (``scale``, ``mask``, plates) act on the factor as they do on the site, as in NumPyro's samplers.
    """
    value = _constrain_site(position, site)
    if value is None:
        return None
    z = _unconstrained_step(position, site)
    log_det = biject_to(site["fn"].support).log_abs_det_jacobian(z, value)
    extra = jnp.ndim(log_det) - jnp.ndim(value) + len(site["fn"].event_shape)
    factor(_jacobian_name(site["name"]), sum_rightmost(log_det, extra))
    return value


def _jacobian_name(name: str) -> str:
    """The end of the name of the factor: ``handlers.scope`` writes its prefix before it."""
    return f"|{name}|log_det"


def log_terms(model: Callable, args: tuple, kwargs: dict, position: ArrayTree) -> LogTerms:
    """The log density of an unconstrained position, summand by summand.

    Args:
        model: a NumPyro model.
        args: its arguments.
        kwargs: its keyword arguments.
        position: unconstrained values of the latent sites, by name.

    Returns:
        The summands; scales and masks of the model are applied, to the Jacobians too.
    """
    substituted = handlers.substitute(model, substitute_fn=partial(_constrain_with_factor, position))
    log_probs, _ = compute_log_probs(substituted, args, kwargs, {})
    prior = {name: log_probs.pop(name) for name in position}
    ends = {_jacobian_name(name): name for name in position}
    found = {key: key[key.index("|") :] for key in log_probs if "|" in key}
    jacobian = {ends[end]: log_probs.pop(key) for key, end in found.items() if end in ends}
    return LogTerms(prior, jacobian, log_probs)


def _total(*groups: dict) -> Scalar:
    return jnp.asarray(sum((value for group in groups for value in group.values()), start=0.0))


def terms(model: Callable, args: tuple, kwargs: dict, position: ArrayTree) -> dict:
    """The summands of the log density in one dictionary, by site (latent sites with their Jacobian)."""
    groups = log_terms(model, args, kwargs, position)
    return {name: groups.prior[name] + groups.jacobian[name] for name in position} | groups.likelihood


def logdensity(model: Callable, args: tuple, kwargs: dict, position: ArrayTree) -> Scalar:
    """Log prior plus log likelihood plus log Jacobian at an unconstrained position."""
    return _total(*log_terms(model, args, kwargs, position))


def prior_logdensity(model: Callable, args: tuple, kwargs: dict, position: ArrayTree) -> Scalar:
    """Log density of the latent sites at an unconstrained position, log Jacobian included."""
    groups = log_terms(model, args, kwargs, position)
    return _total(groups.prior, groups.jacobian)


def log_likelihood(model: Callable, args: tuple, kwargs: dict, position: ArrayTree) -> Scalar:
    """Log density of the observed sites, ``factor`` sites included, at an unconstrained position."""
    return _total(log_terms(model, args, kwargs, position).likelihood)


def log_jacobian(model: Callable, args: tuple, kwargs: dict, position: ArrayTree) -> Scalar:
    """``log |det d constrained / d unconstrained|`` of the latent sites, scaled and masked where they are."""
    return _total(log_terms(model, args, kwargs, position).jacobian)


# Values.


def constrain(model: Callable, args: tuple, kwargs: dict, position: ArrayTree) -> dict:
    """Constrained values of the latent sites and the values of the deterministic sites, by name."""
    return constrain_fn(model, args, kwargs, position, return_deterministic=True)


def unconstrain(
    model: Callable, args: tuple, kwargs: dict, latent: tuple[str, ...], values: Mapping
) -> ArrayTree:
    """The unconstrained position of given values of the latent sites; other entries are ignored.

    Raises:
        ValueError: a latent site is missing, has the wrong shape, or its value is outside its support.
    """
    missing = [name for name in latent if name not in values]
    if missing:
        raise ValueError(f"values for the latent sites {missing} are missing; got {sorted(values)}")
    chosen = {name: strong_array(values[name]) for name in latent}
    substituted = handlers.substitute(handlers.substitute(model, data=chosen), substitute_fn=_check_site)
    trace = handlers.trace(substituted).get_trace(*args, **kwargs)
    return transforms.inverse({name: biject_to(trace[name]["fn"].support) for name in latent}, chosen)


def _check_site(site: dict) -> None:
    """Refuse a substituted value before the sites that depend on it are built; within a scan it is abstract."""
    if not is_latent(site):
        return
    value, name, shape = site["value"], site["name"], tuple(site["fn"].shape())
    if jnp.shape(value) != shape:
        raise ValueError(f"site '{name}' has shape {shape}, got a value of shape {jnp.shape(value)}")
    transforms.inverse({name: biject_to(site["fn"].support)}, {name: value})
