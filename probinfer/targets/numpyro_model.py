"""A NumPyro model read as a density: latent sites, their supports, and the log density site by site.

Every function takes ``(model, args, kwargs)`` first, so that a target binds them once with the arrays in ``args`` and
``kwargs`` as data. The model is executed under NumPyro's handlers at each evaluation: supports that depend on other
sites, reparametrisation, scaling and masking work because the model itself says what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.distributions import Distribution, ImproperUniform, MaskedDistribution, biject_to
from numpyro.distributions.util import is_identically_one, sum_rightmost
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.util import compute_log_probs, constrain_fn
from numpyro.primitives import Messenger, factor

from probinfer import transforms
from probinfer.logdensity import Bound
from probinfer.targets.fixed_sites import PointMasses, fixed_values, is_point_mass
from probinfer.types import ArrayTree, PRNGKey, Scalar, strong_array

__all__ = [
    "LogTerms",
    "ModelSites",
    "constrain",
    "initial_draw",
    "inspect_model",
    "is_proper",
    "log_jacobian",
    "log_likelihood",
    "log_terms",
    "logdensity",
    "prior_logdensity",
    "prior_sample",
    "read_arguments",
    "refuse_seed_handler",
    "terms",
    "unconstrain",
    "without_fixed_sites",
]


class ModelSites(NamedTuple):
    """What a model is made of.

    Attributes:
        latent: names of the continuous latent sites: the position.
        names: dotted names of the constrained draws, deterministic sites included.
        proper: every latent site has a normalised density and can be sampled.
        is_fixed: some sites are ``param`` or mutable.
        has_masses: some latent sites are point masses.
    """

    latent: tuple[str, ...]
    names: tuple[str, ...]
    proper: bool
    is_fixed: bool
    has_masses: bool


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


# What is in the model.

# Raised by JAX where Python asks for the value of an abstract array.
_LOOKED_AT = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def read_arguments(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments of a model: a list of floating numbers, as in ``y=[0.1, 0.2]``, is an array and no tree of numbers.

    Lists of whole numbers stay lists, because they are sizes as often as data.
    """
    return tuple(map(_read, args)), {name: _read(value) for name, value in kwargs.items()}


def _read(value: Any) -> Any:
    if not isinstance(value, list) or not value:
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        return value
    return array if array.dtype.kind == "f" and _all_numbers(value) else value


def _all_numbers(value: Any) -> bool:
    return all(
        _all_numbers(item) if isinstance(item, list) else isinstance(item, (int, float)) for item in value
    )


def inspect_model(model: Any, args: Any, kwargs: Any) -> ModelSites:
    """Run a model once on abstract arrays and say what it is made of; nothing is computed.

    Args:
        model: a NumPyro model.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        The names of its sites.

    Raises:
        ValueError: the model has no latent site, a discrete latent site, a plate that subsamples, a support without
            bijector, or looks at the values of JAX arrays among its arguments.
    """
    found: dict[str, Any] = {}

    def record(bound: Bound) -> dict:
        found.update(bound(jax.random.key(0)))
        return {name: site["value"] for name, site in found.items() if _is_drawn(site)}

    try:
        draws = jax.eval_shape(record, Bound(_trace_at_start, model, args, kwargs, init_to_uniform, {}))
    except _LOOKED_AT as error:
        raise ValueError(
            "the model looks at the values of its array arguments (a size, an index or a branch made from them), but "
            "JAX arrays are data and may change without a new trace: pass np.asarray(array), whose values the model "
            "may look at (new values compile again), or compute the number outside and pass it as a Python int. The "
            f"cause: {str(error).splitlines()[0]}"
        ) from error
    except NotImplementedError as error:
        raise ValueError(
            "a latent site has a support onto which NumPyro has no bijector: reparametrise that site"
        ) from error
    for name, site in found.items():
        _refuse_site(name, site)
    is_fixed = any(site["type"] in ("param", "mutable") for site in found.values())
    has_masses = any(is_point_mass(site) for site in found.values())
    latent = tuple(name for name, site in found.items() if _is_latent(site))
    if not latent:
        raise ValueError(
            "the model has no latent site: every sample site is observed, so there is nothing to infer"
        )
    proper = all(is_proper(found[name]["fn"]) and not _is_scaled(found[name]) for name in latent)
    proper = proper and _can_sample(Bound(prior_sample, model, args, kwargs))
    return ModelSites(latent, transforms.leaf_names(draws), proper, is_fixed, has_masses)


def is_proper(distribution: Distribution) -> bool:
    """Say whether a distribution is normalised and can be sampled: not improper, and no part of it masked."""
    if isinstance(distribution, (ImproperUniform, MaskedDistribution)):
        return False
    base = getattr(distribution, "base_dist", None)
    return is_proper(base) if isinstance(base, Distribution) else True


def _can_sample(sample: Bound) -> bool:
    try:
        jax.eval_shape(sample, jax.random.key(0))
    except NotImplementedError:
        return False
    return True


def _is_latent(site: Mapping) -> bool:
    return site["type"] == "sample" and not site["is_observed"] and not is_point_mass(site)


def _is_drawn(site: Mapping) -> bool:
    return _is_latent(site) or site["type"] == "deterministic" or is_point_mass(site)


def _is_scaled(site: Mapping) -> bool:
    return site["scale"] is not None and not is_identically_one(site["scale"])


def without_fixed_sites(model: Callable, args: tuple, kwargs: dict, sites: ModelSites) -> Callable:
    """The model with the values of the sites that are no unknowns; itself where there are none."""
    if sites.has_masses:
        model = PointMasses(model)
    return handlers.substitute(model, data=fixed_values(model, args, kwargs)) if sites.is_fixed else model


def refuse_seed_handler(model: Any) -> None:
    """Refuse a model whose draws are fixed."""
    while isinstance(model, Messenger):
        if isinstance(model, handlers.seed):
            raise ValueError(
                "the model is wrapped in handlers.seed, which fixes every draw: pass it without the seed"
            )
        model = model.fn


def _refuse_site(name: str, site: Mapping) -> None:
    if site["type"] == "plate" and site["args"][1] not in (None, site["args"][0]):
        raise ValueError(
            f"plate '{name}' draws a new subsample at every evaluation, so this model has no one log density: use all "
            "rows, or targets.minibatch(log_prior_fn, log_likelihood_fn, data, batch_size)"
        )
    if _is_latent(site) and site["fn"].support.is_discrete:
        raise ValueError(
            f"site '{name}' is a discrete latent variable ({type(site['fn']).__name__}): sum it out of the model, for "
            "example a label by numpyro.distributions.MixtureSameFamily or MixtureGeneral, any other by enumerating "
            "its values and adding logsumexp of their log densities with numpyro.factor"
        )


# Starting points and draws from the prior.


def _trace_at_start(
    model: Callable, args: tuple, kwargs: dict, strategy: Callable, settings: dict, key: PRNGKey
) -> dict:
    seeded = handlers.substitute(handlers.seed(model, key), substitute_fn=partial(strategy, **settings))
    return handlers.trace(seeded).get_trace(*args, **kwargs)


def _unconstrained_latents(trace: Mapping) -> dict:
    position = {
        name: biject_to(site["fn"].support).inv(site["value"])
        for name, site in trace.items()
        if _is_latent(site)
    }
    return transforms.finite(position)


def initial_draw(
    model: Callable, args: tuple, kwargs: dict, strategy: Callable, settings: dict, key: PRNGKey, attempt: Any
) -> ArrayTree:
    """An unconstrained position from one of NumPyro's initialisation strategies; every attempt draws alike."""
    del attempt
    return _unconstrained_latents(_trace_at_start(model, args, kwargs, strategy, settings, key))


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
    if not _is_latent(site):
        return
    value, name, shape = site["value"], site["name"], tuple(site["fn"].shape())
    if jnp.shape(value) != shape:
        raise ValueError(f"site '{name}' has shape {shape}, got a value of shape {jnp.shape(value)}")
    transforms.inverse({name: biject_to(site["fn"].support)}, {name: value})
