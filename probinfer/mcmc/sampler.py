"""Hamiltonian Monte Carlo as a pure function of a key and a data set, made for ``run_many``.

With HMC every data set costs the same: a warm-up of fixed length learns step size and diagonal metric, then both are
frozen and trajectories of a fixed number of leapfrogs follow. Their length in time is jittered through the step size,
so that none resonates. With no loop of unknown length data sets run side by side without waiting for one another.

NUTS finds the length itself, up to a cap. Vectorised trajectory by trajectory it would do as many leapfrogs as the
longest of all data sets; it is stepped by the leapfrog instead, so that a queue keeps all lanes at work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.mcmc import hmc

from probinfer.base import as_partial
from probinfer.errors import shortened
from probinfer.mcmc.nuts_sampler import NutsPosteriorSampler
from probinfer.mcmc.nuts_steps import DEEPEST
from probinfer.mcmc.sampler_info import SamplerInfo, sampler_info
from probinfer.types import Array, ArrayTree, PRNGKey, field, pytree

__all__ = ["PosteriorSampler", "posterior_sampler"]

_JITTER = 0.2  # share by which the step size, and so the length in time, of a trajectory varies


@pytree
class PosteriorSampler:
    """``(key, x) -> (draws, info)``; see ``posterior_sampler``."""

    logdensity_fn: Callable
    init_fn: Callable
    constrain_fn: Callable | None
    target_acceptance: Any
    num_warmup: int = field(static=True)
    num_draws: int = field(static=True)
    num_leapfrogs: int = field(static=True)
    thin: int = field(static=True)

    def __call__(self, key: PRNGKey, x: ArrayTree) -> tuple[ArrayTree, SamplerInfo]:
        """Draw from the posterior of one data set."""
        key_init, key_warmup, key_draws = jax.random.split(key, 3)

        def logdensity_fn(position):
            return self.logdensity_fn(position, x)

        start = self.init_fn(key_init, x)
        state, step_size, metric = self._warm_up(key_warmup, logdensity_fn, start)
        kernel = hmc.build_kernel()

        def transition(state, key):
            key_jitter, key_move = jax.random.split(key)
            jittered = step_size * jax.random.uniform(
                key_jitter, (), step_size.dtype, 1 - _JITTER, 1 + _JITTER
            )
            moved, info = kernel(key_move, state, logdensity_fn, jittered, metric, self.num_leapfrogs)
            return _like(moved, state), (info.is_divergent, info.acceptance_rate)

        def draw(state, key):
            state, info = jax.lax.scan(transition, state, jax.random.split(key, self.thin))
            return state, (state.position, info)

        _, (positions, (diverging, acceptance)) = jax.lax.scan(
            draw, state, jax.random.split(key_draws, self.num_draws)
        )
        finite = jnp.isfinite(state.logdensity) & jnp.isfinite(step_size) & (step_size > 0)
        info = sampler_info(
            positions,
            finite,
            self.num_draws * self.thin,
            num_gradients=(self.num_warmup + self.num_draws * self.thin) * self.num_leapfrogs,
            num_divergences=jnp.sum(diverging),
            num_capped=0,
            acceptance_rate=jnp.mean(acceptance),
            step_size=step_size,
        )
        return positions if self.constrain_fn is None else jax.vmap(self.constrain_fn)(positions), info

    def _warm_up(self, key: PRNGKey, logdensity_fn: Callable, start: ArrayTree) -> tuple[Any, Array, Array]:
        adaptation = blackjax.window_adaptation(
            blackjax.hmc,
            logdensity_fn,
            target_acceptance_rate=self.target_acceptance,
            num_integration_steps=self.num_leapfrogs,
            adaptation_info_fn=_nothing,
        )
        (state, parameters), _ = adaptation.run(key, start, self.num_warmup)
        dtype = state.logdensity.dtype
        fresh = hmc.init(state.position, logdensity_fn)
        step_size, metric = parameters["step_size"], parameters["inverse_mass_matrix"]
        return _like(state, fresh), jnp.asarray(step_size, dtype), jnp.asarray(metric, dtype)


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
) -> PosteriorSampler | NutsPosteriorSampler:
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
        sampler". The warm-up is Stan's, by blackjax.
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
    sampler = PosteriorSampler if algorithm == "hmc" else NutsPosteriorSampler
    return sampler(
        as_partial(logdensity_fn),
        as_partial(init_fn),
        None if constrain_fn is None else as_partial(constrain_fn),
        jnp.asarray(target_acceptance, jnp.result_type(float)),
        **{name: int(count) for name, count in counts.items()},
    )


def _nothing(state: Any, info: Any, adaptation_state: Any) -> tuple:
    del state, info, adaptation_state
    return ()


def _like(moved: Any, state: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.asarray(new).astype(old.dtype), moved, state)
