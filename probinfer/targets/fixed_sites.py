"""Sites of a NumPyro model that are no unknowns: parameters, states of modules, and point masses.

NumPyro's samplers give ``numpyro.param`` and mutable sites the values of the first run of the model and keep them:
``random_flax_module`` and ``random_nnx_module`` replace these values by latent sites, and a learned reparametrization
stays at its start. The same is done here, once, when the target is made. A latent site with a ``Delta`` distribution is
the number that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.distributions import Delta, Distribution
from numpyro.infer.initialization import init_to_uniform
from numpyro.primitives import Messenger, factor

__all__ = ["PointMasses", "fixed_values", "is_latent", "is_point_mass"]

_FIXED = ("param", "mutable")


def is_latent(site: Mapping) -> bool:
    """Whether a site is an unknown: a sample site that is neither observed nor a point mass."""
    return site["type"] == "sample" and not site["is_observed"] and not is_point_mass(site)


def is_point_mass(site: Mapping) -> bool:
    """Whether a site is a latent one of a single value."""
    return site["type"] == "sample" and not site["is_observed"] and _mass_of(site["fn"]) is not None


def _mass_of(distribution: Any) -> Delta | None:
    """The ``Delta`` inside a distribution that is expanded or made independent."""
    while isinstance(distribution, Distribution) and not isinstance(distribution, Delta):
        distribution = getattr(distribution, "base_dist", None)
    return distribution if isinstance(distribution, Delta) else None


class PointMasses(Messenger):
    """A handler under which latent point masses are deterministic sites; their log density, if any, is a factor."""

    def process_message(self, msg: dict) -> None:
        """Give the site its value."""
        if msg["type"] != "sample" or msg["value"] is not None or not is_point_mass(msg):
            return
        distribution = msg["fn"]
        value = jnp.broadcast_to(distribution.mean, distribution.shape())
        msg["value"], msg["type"] = value, "deterministic"
        factor(f"_{msg['name']}_log_density", distribution.log_prob(value))


def fixed_values(model: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The values of ``param`` and mutable sites in the first run of a model, by name; arrays among them are data.

    The run has a key of its own, the same always: a module whose parameters are random draws them from it.

    Args:
        model: a NumPyro model.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    started = handlers.substitute(handlers.seed(model, jax.random.key(0)), substitute_fn=init_to_uniform)
    trace = handlers.trace(started).get_trace(*args, **kwargs)
    return {name: site["value"] for name, site in trace.items() if site["type"] in _FIXED}
