"""Hamiltonian Monte Carlo as a pure function of a key and a data set, made for ``run_many``.

With HMC every data set costs the same, see ``hmc_sampler``. NUTS finds the length of its trajectories itself, up to a
cap. Vectorised trajectory by trajectory it would do as many leapfrogs as the longest of all data sets; it is stepped
by the leapfrog instead, so that a queue keeps all lanes at work.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from probinfer.core.algorithms import as_partial
from probinfer.core.errors import shortened
from probinfer.mcmc.lanes.hmc import HmcPosteriorSampler
from probinfer.mcmc.lanes.nuts import NutsPosteriorSampler
from probinfer.mcmc.nuts_steps import DEEPEST

__all__ = ["posterior_sampler"]


def posterior_sampler(
    logdensity_fn: Callable,
    init_fn: Callable,
    *,
    constrain_fn: Callable | None = None,
    num_warmup: int = 500,
    num_draws: int = 500,
    algorithm: str = "hmc",
    num_leapfrogs: int = 16,
    max_depth: int = 5,
    thin: int = 1,
    target_acceptance: float = 0.8,
) -> HmcPosteriorSampler | NutsPosteriorSampler:
    """Return ``infer_fn(key, x) -> (draws, info)`` that samples the posterior of any data set by HMC or NUTS.

    HMC is the choice for many data sets of a moderate dimension. NUTS suits posteriors whose scales differ so much that
    one length of trajectory does not; its cap keeps a few difficult data sets from costing as much as all others
    together, and how often it was met is counted. ``run_many`` gives NUTS a queue.

    Args:
        logdensity_fn: ``(position, x)`` -> log joint density of an unconstrained position, the Jacobian included.
        init_fn: ``(key, x)`` -> position to start from, for example a draw of the prior, unconstrained.
        constrain_fn: position -> draw; None: the positions are the draws.
        num_warmup: transitions in which step size and diagonal metric are learned, 20 at least.
        num_draws: draws that are kept.
        algorithm: "hmc" or "nuts".
        num_leapfrogs: in each trajectory of HMC, whose step size varies by a fifth either way.
        max_depth: the most doublings of a trajectory of NUTS: at most ``2**max_depth - 1`` leapfrogs.
        thin: transitions per draw.
        target_acceptance: mean acceptance rate that the step size aims at.

    Returns:
        A pure function for ``run_many``; ``info`` is a :class:`SamplerInfo`.

    Raises:
        TypeError: a function is not callable.
        ValueError: an unknown algorithm, a count out of range, or a rate not between 0 and 1.

    References:
        Neal (2011), "MCMC using Hamiltonian dynamics", section 4.2 (jitter). Hoffman and Gelman (2014), "The No-U-turn
        sampler". The warm-up is Stan's, by blackjax's parts.
    """
    functions = {"logdensity_fn": logdensity_fn, "init_fn": init_fn, "constrain_fn": constrain_fn}
    for name, function in functions.items():
        if not callable(function) and not (name == "constrain_fn" and function is None):
            raise TypeError(f"{name} must be a function, got {shortened(function)}")
    if algorithm not in ("hmc", "nuts"):
        raise ValueError(f"algorithm must be 'hmc' or 'nuts', got {shortened(algorithm)}")
    counts = {"num_warmup": num_warmup, "num_draws": num_draws, "thin": thin}
    counts |= {"num_leapfrogs": num_leapfrogs} if algorithm == "hmc" else {"max_depth": max_depth}
    for name, count in counts.items():
        whole = isinstance(count, (int, np.integer)) and not isinstance(count, bool)
        least, most = (20 if name == "num_warmup" else 1), (DEEPEST if name == "max_depth" else np.inf)
        if not whole or not least <= count <= most:
            limit = f"{least} or more" if most == np.inf else f"from {least} to {most}"
            raise ValueError(f"{name} must be a whole number, {limit}, got {shortened(count)}")
    if not 0 < target_acceptance < 1:
        raise ValueError(f"target_acceptance must lie between 0 and 1, got {target_acceptance}")
    sampler = HmcPosteriorSampler if algorithm == "hmc" else NutsPosteriorSampler
    return sampler(
        as_partial(logdensity_fn),
        as_partial(init_fn),
        None if constrain_fn is None else as_partial(constrain_fn),
        jnp.asarray(target_acceptance, jnp.result_type(float)),
        **{name: int(count) for name, count in counts.items()},
    )
