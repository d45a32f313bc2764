"""What a NumPyro model is made of: its sites are read once, when a target is made, and what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro import handlers
from numpyro.distributions import Distribution, ImproperUniform, MaskedDistribution
from numpyro.distributions.util import is_identically_one
from numpyro.infer.initialization import init_to_uniform
from numpyro.primitives import Messenger

from probinfer.core.binding import Bound
from probinfer.targets import transforms
from probinfer.targets.fixed_sites import PointMasses, fixed_values, is_latent, is_point_mass
from probinfer.targets.numpyro_model import prior_sample, trace_at_start

__all__ = [
    "ModelSites",
    "inspect_model",
    "is_proper",
    "read_arguments",
    "refuse_seed_handler",
    "without_fixed_sites",
]


class ModelSites(NamedTuple):
    """What a model is made of.

    Attributes:
        latent: names of the continuous latent sites: the position.
        names: dotted names of the constrained draws, deterministic sites included.
        proper: every latent site has a normalized density and can be sampled.
        is_fixed: some sites are ``param`` or mutable.
        has_masses: some latent sites are point masses.
    """

    latent: tuple[str, ...]
    names: tuple[str, ...]
    proper: bool
    is_fixed: bool
    has_masses: bool


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
        draws = jax.eval_shape(record, Bound(trace_at_start, model, args, kwargs, init_to_uniform, {}))
    except _LOOKED_AT as error:
        raise ValueError(
            "the model looks at the values of its array arguments (a size, an index or a branch made from them), but "
            "JAX arrays are data and may change without a new trace: pass np.asarray(array), whose values the model "
            "may look at (new values compile again), or compute the number outside and pass it as a Python int. The "
            f"cause: {str(error).splitlines()[0]}"
        ) from error
    except NotImplementedError as error:
        raise ValueError(
            "a latent site has a support onto which NumPyro has no bijector: reparametrize that site"
        ) from error
    for name, site in found.items():
        _refuse_site(name, site)
    is_fixed = any(site["type"] in ("param", "mutable") for site in found.values())
    has_masses = any(is_point_mass(site) for site in found.values())
    latent = tuple(name for name, site in found.items() if is_latent(site))
    if not latent:
        raise ValueError(
            "the model has no latent site: every sample site is observed, so there is nothing to infer"
        )
    proper = all(is_proper(found[name]["fn"]) and not _is_scaled(found[name]) for name in latent)
    proper = proper and _can_sample(Bound(prior_sample, model, args, kwargs))
    return ModelSites(latent, transforms.leaf_names(draws), proper, is_fixed, has_masses)


def is_proper(distribution: Distribution) -> bool:
    """Say whether a distribution is normalized and can be sampled: not improper, and no part of it masked."""
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


def _is_drawn(site: Mapping) -> bool:
    return is_latent(site) or site["type"] == "deterministic" or is_point_mass(site)


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
    if is_latent(site) and site["fn"].support.is_discrete:
        raise ValueError(
            f"site '{name}' is a discrete latent variable ({type(site['fn']).__name__}): sum it out of the model, for "
            "example a label by numpyro.distributions.MixtureSameFamily or MixtureGeneral, any other by enumerating "
            "its values and adding logsumexp of their log densities with numpyro.factor"
        )
