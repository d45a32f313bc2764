"""Simulation-based calibration of a NumPyro model, which provides the simulator and the densities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.distributions import Unit
from numpyro.infer.util import compute_log_probs

from probinfer.checks.calibration.simulation_based import SBCReport, sbc
from probinfer.core.arguments import check_key
from probinfer.core.binding import Bound
from probinfer.core.errors import shortened
from probinfer.core.types import ArrayTree, PRNGKey, Scalar
from probinfer.mcmc.lanes.sampler import posterior_sampler
from probinfer.running.checkpoint import Checkpoint
from probinfer.targets import model_sites, numpyro_model

__all__ = ["sbc_numpyro"]

_IMPROPER = (
    "a site has no proper prior (improper, masked or scaled), so no true value can be drawn from it: give it a proper "
    "prior"
)


def sbc_numpyro(
    key: PRNGKey,
    model: Callable,
    *args: Any,
    observed: str | Sequence[str] | None = None,
    sampler: Callable = posterior_sampler,
    num_simulations: int = 1000,
    quantities: Sequence[Callable] | Mapping[str, Callable] = (),
    reference: Callable | None = None,
    num_projections: int = 20,
    level: float = 0.05,
    mode: str = "auto",
    batch_size: int | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool | str | None = None,
    **kwargs: Any,
) -> SBCReport:
    """Check that inference for a NumPyro model is calibrated.

    The true values are the latent sites (on their constrained scale), the data those sites that are observed. The
    log prior, log likelihood and log joint density of the model are among the test quantities.

    Args:
        key: random key.
        model: a NumPyro model whose latent sites are continuous and have proper priors.
        *args: its arguments.
        observed: names of the sites that are data. None: the sites that are observed when the model is called with
            these arguments; their values do not matter.
        sampler: ``(logdensity_fn, init_fn, constrain_fn=...)`` -> ``infer_fn``, where ``logdensity_fn(position, x)``
            and ``init_fn(key, x)`` work on unconstrained positions and x maps observed sites to data. Default: HMC,
            ``mcmc.posterior_sampler``; ``functools.partial`` sets its options.
        num_simulations: as in ``sbc``.
        quantities: functions ``(theta, x)`` -> scalar of two dictionaries keyed by site, as in ``sbc``.
        reference: as in ``sbc``.
        num_projections: as in ``sbc``.
        level: as in ``sbc``.
        mode: as in ``sbc``.
        batch_size: as in ``sbc``.
        checkpoint: as in ``sbc``.
        progress: as in ``sbc``.
        **kwargs: keyword arguments of the model.

    Returns:
        The report of ``sbc``; ``theta`` and ``x`` are dictionaries keyed by site.

    Raises:
        TypeError: ``key`` is not a key.
        ValueError: no site is observed, a name is not a site, latent sites are discrete or without a proper prior,
            observed sites are not named, there are factor sites, or ``sbc`` refuses the input.

    Example:
        >>> import functools, jax, numpyro, numpyro.distributions as dist
        >>> from probinfer import checks, mcmc
        >>> def model(y=None):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(mean, 0.5), obs=y)
        >>> sampler = functools.partial(mcmc.posterior_sampler, num_warmup=100, num_draws=100)
        >>> report = checks.sbc_numpyro(
        ...     jax.random.key(0), model, observed="y", sampler=sampler, num_simulations=200
        ... )
        >>> report.passed
        True
    """
    check_key(key)
    names = _observed_sites(model, args, kwargs, observed)
    latent = _latent_sites(model, args, kwargs, names)
    infer_fn = sampler(
        Bound(_logdensity, model, args, kwargs),
        Bound(_sample_initial, model, args, kwargs),
        constrain_fn=Bound(_constrain, model, args, kwargs, latent),
    )
    return sbc(
        key,
        Bound(_prior_sample, model, args, kwargs, latent),
        Bound(_simulate, model, args, kwargs, names),
        infer_fn,
        log_prior_fn=Bound(_log_prior, model, args, kwargs, latent),
        log_likelihood_fn=Bound(_log_likelihood, model, args, kwargs, names),
        num_simulations=num_simulations,
        quantities=quantities,
        reference=reference,
        num_projections=num_projections,
        level=level,
        mode=mode,
        batch_size=batch_size,
        checkpoint=checkpoint,
        progress=progress,
    )


class _Site(NamedTuple):
    is_observed: bool
    value: jax.ShapeDtypeStruct
    is_factor: bool


def _sites(model: Callable, args: tuple, kwargs: dict) -> dict[str, _Site]:
    """Return the sample sites of a model by abstract evaluation."""
    flags: dict[str, tuple[bool, bool]] = {}

    def record(key):
        trace = handlers.trace(handlers.seed(model, key)).get_trace(*args, **kwargs)
        sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
        flags.update(
            {name: (site["is_observed"], isinstance(site["fn"], Unit)) for name, site in sites.items()}
        )
        return {name: site["value"] for name, site in sites.items()}

    try:
        values = jax.eval_shape(record, jax.random.key(0))
    except NotImplementedError as error:
        raise ValueError(_IMPROPER) from error
    return {
        name: _Site(is_observed, values[name], is_factor) for name, (is_observed, is_factor) in flags.items()
    }


def _observed_sites(model: Callable, args: tuple, kwargs: dict, observed: Any) -> tuple[str, ...]:
    """Return the names of the sites that are data, which the model must be able to simulate."""
    sites = _sites(model, args, kwargs)
    if factors := [name for name, site in sites.items() if site.is_factor]:
        raise ValueError(
            f"the model has factor sites, {factors}, which have a density but cannot be simulated: write them as "
            "sample sites, or use checks.sbc with a simulator"
        )
    if observed is None:
        names = tuple(name for name, site in sites.items() if site.is_observed)
        if not names:
            raise ValueError(
                f"no site of the model is observed: name those that are data, observed=..., from {sorted(sites)}, or "
                "pass the data as arguments of the model"
            )
    else:
        names = (observed,) if isinstance(observed, str) else tuple(observed)
        if not names or not set(names) <= set(sites):
            raise ValueError(
                f"observed must name sample sites of the model, {sorted(sites)}, got {shortened(observed)}"
            )
    if unnamed := [name for name, site in sites.items() if site.is_observed and name not in names]:
        raise ValueError(
            f"the sites {unnamed} are observed too: name them in observed, so that they are simulated as well"
        )
    return names


def _latent_sites(model: Callable, args: tuple, kwargs: dict, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the latent sites; refuse sites without a proper prior."""
    sites = _sites(model, args, kwargs)
    data = {name: jnp.zeros(sites[name].value.shape, sites[name].value.dtype) for name in names}
    inspected = model_sites.inspect_model(handlers.condition(model, data=data), args, kwargs)
    if not inspected.proper:
        raise ValueError(_IMPROPER)
    return inspected.latent


# Sampling


def _sample_sites(model: Callable, args: tuple, kwargs: dict, key: PRNGKey, fixed: ArrayTree) -> dict:
    """Return the values of all sample sites: given for the ``fixed`` sites, sampled for all others and the data."""
    seeded = handlers.seed(handlers.substitute(handlers.uncondition(model), data=fixed), key)
    trace = handlers.trace(seeded).get_trace(*args, **kwargs)
    return {name: site["value"] for name, site in trace.items() if site["type"] == "sample"}


def _prior_sample(model: Callable, args: tuple, kwargs: dict, latent: tuple, key: PRNGKey) -> ArrayTree:
    values = _sample_sites(model, args, kwargs, key, {})
    return {name: values[name] for name in latent}


def _simulate(
    model: Callable, args: tuple, kwargs: dict, names: tuple, key: PRNGKey, parameters: ArrayTree
) -> ArrayTree:
    values = _sample_sites(model, args, kwargs, key, parameters)
    return {name: values[name] for name in names}


# Densities: the sampler uses unconstrained positions, the ranks use constrained values


def _log_prior(model: Callable, args: tuple, kwargs: dict, latent: tuple, parameters: ArrayTree) -> Scalar:
    """Log prior of constrained values; the data are sampled, since the model needs some, and do not matter."""
    seeded = handlers.seed(
        handlers.substitute(handlers.uncondition(model), data=parameters), jax.random.key(0)
    )
    log_probs, _ = compute_log_probs(seeded, args, kwargs, {})
    return _total(log_probs, latent)


def _log_likelihood(
    model: Callable, args: tuple, kwargs: dict, names: tuple, parameters: ArrayTree, x: ArrayTree
) -> Scalar:
    conditioned = handlers.substitute(handlers.condition(model, data=x), data=parameters)
    log_probs, _ = compute_log_probs(conditioned, args, kwargs, {})
    return _total(log_probs, names)


def _total(log_probs: dict, names: tuple) -> Scalar:
    return jnp.asarray(sum(log_probs[name] for name in names))


def _logdensity(model: Callable, args: tuple, kwargs: dict, position: ArrayTree, x: ArrayTree) -> Scalar:
    return numpyro_model.logdensity(handlers.condition(model, data=x), args, kwargs, position)


def _sample_initial(model: Callable, args: tuple, kwargs: dict, key: PRNGKey, x: ArrayTree) -> ArrayTree:
    """Sample an unconstrained position from the prior."""
    return numpyro_model.prior_sample(handlers.condition(model, data=x), args, kwargs, key)


def _constrain(model: Callable, args: tuple, kwargs: dict, latent: tuple, position: ArrayTree) -> ArrayTree:
    seeded = handlers.seed(handlers.uncondition(model), jax.random.key(0))
    values = numpyro_model.constrain(seeded, args, kwargs, position)
    return {name: values[name] for name in latent}
