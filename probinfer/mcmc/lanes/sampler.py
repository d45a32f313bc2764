"""Hamiltonian Monte Carlo as a pure function of a key and a data set, made for ``run_many``.

With HMC every data set costs the same (``lanes.hmc``). NUTS (``lanes.nuts``) chooses the length of its trajectories
itself, up to a cap. Vectorized by trajectories, all data sets would take as many leapfrogs as the one with the longest
trajectory; NUTS is therefore stepped by the leapfrog, so that a queue keeps all lanes busy.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from probinfer.core.algorithms import as_partial
from probinfer.core.errors import shortened
from probinfer.mcmc.lanes.hmc import HMCPosteriorSampler
from probinfer.mcmc.lanes.nuts import NUTSPosteriorSampler
from probinfer.mcmc.nuts_steps import DEPTH_LIMIT

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
) -> HMCPosteriorSampler | NUTSPosteriorSampler:
    """Return ``infer_fn(key, x) -> (draws, info)`` that samples the posterior of any data set by HMC or NUTS.

    HMC is the choice for many data sets of a moderate dimension. NUTS suits posteriors whose scales differ so much that
    no single trajectory length fits; its cap keeps a few difficult data sets from costing as much as all others
    together, and the trajectories that reach it are counted. ``run_many`` gives NUTS a queue.

    Args:
        logdensity_fn: ``(position, x)`` -> log joint density of an unconstrained position, the Jacobian included.
        init_fn: ``(key, x)`` -> initial position, for example an unconstrained draw from the prior.
        constrain_fn: position -> draw; None: the positions are the draws.
        num_warmup: transitions in which step size and diagonal metric are learned, at least 20.
        num_draws: draws that are returned.
        algorithm: "hmc" or "nuts".
        num_leapfrogs: of each HMC trajectory, whose step size is jittered by up to a fifth.
        max_depth: maximum number of doublings of a NUTS trajectory: at most ``2**max_depth - 1`` leapfrogs.
        thin: transitions per draw.
        target_acceptance: mean acceptance rate that the step size aims at.

    Returns:
        A pure function for ``run_many``; ``info`` is a :class:`SamplerInfo`.

    Raises:
        TypeError: a function is not callable.
        ValueError: an unknown algorithm, a count out of range, or a rate not between 0 and 1.

    References:
        Neal (2011), "MCMC using Hamiltonian dynamics", section 4.2 (jitter). Hoffman and Gelman (2014), "The No-U-turn
        sampler". The warm-up is Stan's, built from blackjax.
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
        is_integer = isinstance(count, (int, np.integer)) and not isinstance(count, bool)
        lower, upper = (20 if name == "num_warmup" else 1), (DEPTH_LIMIT if name == "max_depth" else np.inf)
        if not is_integer or not lower <= count <= upper:
            limits = f"{lower} or more" if upper == np.inf else f"from {lower} to {upper}"
            raise ValueError(f"{name} must be a whole number, {limits}, got {shortened(count)}")
    if not 0 < target_acceptance < 1:
        raise ValueError(f"target_acceptance must lie between 0 and 1, got {target_acceptance}")
    sampler = HMCPosteriorSampler if algorithm == "hmc" else NUTSPosteriorSampler
    return sampler(
        as_partial(logdensity_fn),
        as_partial(init_fn),
        None if constrain_fn is None else as_partial(constrain_fn),
        jnp.asarray(target_acceptance, jnp.result_type(float)),
        **{name: int(count) for name, count in counts.items()},
    )
