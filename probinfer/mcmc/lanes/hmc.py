"""Hamiltonian Monte Carlo with trajectories of a fixed number of leapfrogs, made for ``run_many``.

Every data set costs the same: a warm-up of fixed length learns step size and diagonal metric, then both are frozen.
The length of a trajectory in time is jittered through its step size, so that none resonates. With no loop of unknown
length data sets run side by side without waiting for one another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from probinfer.core.types import Array, ArrayTree, Float, PRNGKey, field, pytree
from probinfer.mcmc.adaptation.tuning import Tuning, first_tuning, learn, row_of, sound
from probinfer.mcmc.hamiltonian import DIVERGENT, Place, energy, leapfrog, momentum
from probinfer.mcmc.lanes.info import SamplerInfo, sampler_info

__all__ = ["HmcPosteriorSampler", "hmc_transition"]

_JITTER = 0.2  # share by which the step size, and so the length in time, of a trajectory varies


class _Chain(NamedTuple):
    """One chain between two transitions; ``draws`` (L, d), counts of divergences, sum of acceptance rates."""

    place: Place
    tuning: Tuning
    draws: Any
    divergences: Any
    acceptance: Any
    finite: Any


@pytree
class HmcPosteriorSampler:
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
        key_start, key_chain = jax.random.split(key)
        position, unravel = ravel_pytree(self.init_fn(key_start, x))
        value_and_grad_fn = jax.value_and_grad(lambda flat: self.logdensity_fn(unravel(flat), x))
        place = Place(position, *value_and_grad_fn(position))
        zero = jnp.zeros((), position.dtype)
        chain = _Chain(
            place,
            first_tuning(self.target_acceptance, position),
            jnp.zeros((self.num_draws, *position.shape), position.dtype),
            jnp.int32(0),
            zero,
            jnp.isfinite(place.logdensity),
        )
        num = self.num_draws * self.thin
        chain = lax.fori_loop(
            0, self.num_warmup + num, lambda i, c: self._transition(key_chain, value_and_grad_fn, i, c), chain
        )
        info = sampler_info(
            chain.draws,
            chain.finite,
            num,
            num_gradients=(self.num_warmup + num) * self.num_leapfrogs,
            num_divergences=chain.divergences,
            num_capped=0,
            acceptance_rate=chain.acceptance / num,
            step_size=chain.tuning.step_size,
        )
        positions = jax.vmap(unravel)(chain.draws)
        return positions if self.constrain_fn is None else jax.vmap(self.constrain_fn)(positions), info

    def _transition(self, key: PRNGKey, value_and_grad_fn: Callable, number: Array, chain: _Chain) -> _Chain:
        """One trajectory, judged and, in the warm-up, learned from."""
        tuning = chain.tuning
        # All randomness of a transition in one call: on a CPU each call is a loop of its own.
        uniforms = jax.random.uniform(
            jax.random.fold_in(key, number), (2 + len(chain.place.position),), chain.place.position.dtype
        )
        place, gain = hmc_transition(
            uniforms,
            chain.place,
            value_and_grad_fn,
            tuning.step_size,
            tuning.inverse_mass,
            self.num_leapfrogs,
        )
        acceptance = jnp.exp(jnp.minimum(gain, 0))
        warming = number < self.num_warmup
        tuning = lax.cond(
            warming,
            lambda t: learn(self.target_acceptance, self.num_warmup, t, number, place.position, acceptance),
            lambda t: t,
            tuning,
        )
        row = row_of(number, self.num_warmup, self.num_draws, self.thin)
        return _Chain(
            place,
            tuning,
            chain.draws.at[row].set(place.position, mode="drop"),
            chain.divergences + (~warming & (-gain > DIVERGENT)),
            chain.acceptance + jnp.where(warming, 0, acceptance),
            chain.finite & sound(place.logdensity, tuning),
        )


def hmc_transition(
    uniforms: Float[Array, " draws"],
    place: Place,
    value_and_grad_fn: Callable,
    step_size: Float[Array, ""],
    inverse_mass: Float[Array, " d"],
    num_leapfrogs: int,
) -> tuple[Place, Float[Array, ""]]:
    """Return where one trajectory leads, and the energy it lost: the logarithm of the odds to accept its end.

    Args:
        uniforms: 2 + d, independent, in [0, 1): jitter of the step size, acceptance, momentum.
        place: where the chain is.
        value_and_grad_fn: position (d,) -> log density and its gradient.
        step_size: before jitter.
        inverse_mass: diagonal of the inverse mass matrix.
        num_leapfrogs: of the trajectory.
    """
    step_size = step_size * (1 + _JITTER * (2 * uniforms[0] - 1))
    start = momentum(uniforms[2:], inverse_mass)
    end, last = lax.fori_loop(
        0,
        num_leapfrogs,
        lambda _, end: leapfrog(value_and_grad_fn, end[0], end[1], step_size, inverse_mass),
        (place, start),
    )
    gain = energy(place.logdensity, start, inverse_mass) - energy(end.logdensity, last, inverse_mass)
    gain = jnp.where(jnp.isnan(gain), -jnp.inf, gain)
    accepted = jnp.log(uniforms[1]) < gain
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), end, place), gain
