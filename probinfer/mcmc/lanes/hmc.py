"""Hamiltonian Monte Carlo with trajectories of a fixed number of leapfrogs, made for ``run_many``.

Every data set costs the same: a warm-up of fixed length learns step size and diagonal metric, then both are frozen.
The step size, and with it the integration time of a trajectory, is jittered to avoid resonances. There is no loop of
unknown length, so that data sets run side by side without waiting for one another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from probinfer.core.trees import select
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, PRNGKey, field, pytree
from probinfer.mcmc.adaptation.tuning import Tuning, draw_index, first_tuning, is_usable, learn
from probinfer.mcmc.hamiltonian import (
    DIVERGENCE_THRESHOLD,
    IntegratorState,
    energy,
    leapfrog,
    momentum_from_uniforms,
)
from probinfer.mcmc.lanes.info import SamplerInfo, sampler_info

__all__ = ["HMCPosteriorSampler", "hmc_transition"]

_JITTER = 0.2  # relative, of the step size and so of the integration time of a trajectory


class _HMCChain(NamedTuple):
    """One chain between two transitions.

    Attributes:
        state: position, log density and gradient.
        tuning: step size, metric and their adaptation.
        draws: positions so far.
        num_divergences: after warm-up.
        acceptance_sum: of the acceptance rates after warm-up.
        finite: whether log density and step size have been usable so far.
    """

    state: IntegratorState
    tuning: Tuning
    draws: Float[Array, "L d"]
    num_divergences: Int[Array, ""]
    acceptance_sum: Float[Array, ""]
    finite: Bool[Array, ""]


@pytree
class HMCPosteriorSampler:
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
        key_init, key_chain = jax.random.split(key)
        position, unravel = ravel_pytree(self.init_fn(key_init, x))
        value_and_grad_fn = jax.value_and_grad(lambda flat: self.logdensity_fn(unravel(flat), x))
        state = IntegratorState(position, *value_and_grad_fn(position))
        chain = _HMCChain(
            state=state,
            tuning=first_tuning(self.target_acceptance, position),
            draws=jnp.zeros((self.num_draws, *position.shape), position.dtype),
            num_divergences=jnp.int32(0),
            acceptance_sum=jnp.zeros((), position.dtype),
            finite=jnp.isfinite(state.logdensity),
        )
        num_transitions = self.num_draws * self.thin
        chain = lax.fori_loop(
            0,
            self.num_warmup + num_transitions,
            lambda i, c: self._transition(key_chain, value_and_grad_fn, i, c),
            chain,
        )
        info = sampler_info(
            chain.draws,
            chain.finite,
            num_transitions,
            num_gradients=(self.num_warmup + num_transitions) * self.num_leapfrogs,
            num_divergences=chain.num_divergences,
            num_capped=0,
            acceptance_rate=chain.acceptance_sum / num_transitions,
            step_size=chain.tuning.step_size,
        )
        positions = jax.vmap(unravel)(chain.draws)
        return positions if self.constrain_fn is None else jax.vmap(self.constrain_fn)(positions), info

    def _transition(
        self, key: PRNGKey, value_and_grad_fn: Callable, index: Array, chain: _HMCChain
    ) -> _HMCChain:
        """Make one transition; during warm-up, adapt step size and metric to it."""
        tuning = chain.tuning
        # Draw all random numbers of a transition in one call: on a CPU each call is a loop of its own.
        uniforms = jax.random.uniform(
            jax.random.fold_in(key, index), (2 + len(chain.state.position),), chain.state.position.dtype
        )
        state, log_acceptance_ratio = hmc_transition(
            uniforms,
            chain.state,
            value_and_grad_fn,
            tuning.step_size,
            tuning.inverse_mass,
            self.num_leapfrogs,
        )
        # Adapt
        acceptance = jnp.exp(jnp.minimum(log_acceptance_ratio, 0))
        warming_up = index < self.num_warmup
        tuning = lax.cond(
            warming_up,
            lambda t: learn(self.target_acceptance, self.num_warmup, t, index, state.position, acceptance),
            lambda t: t,
            tuning,
        )
        # Record
        row = draw_index(index, self.num_warmup, self.num_draws, self.thin)
        diverging = -log_acceptance_ratio > DIVERGENCE_THRESHOLD
        return _HMCChain(
            state=state,
            tuning=tuning,
            draws=chain.draws.at[row].set(state.position, mode="drop"),
            num_divergences=chain.num_divergences + (~warming_up & diverging),
            acceptance_sum=chain.acceptance_sum + jnp.where(warming_up, 0, acceptance),
            finite=chain.finite & is_usable(state.logdensity, tuning),
        )


def hmc_transition(
    uniforms: Float[Array, " draws"],
    state: IntegratorState,
    value_and_grad_fn: Callable,
    step_size: Float[Array, ""],
    inverse_mass: Float[Array, " d"],
    num_leapfrogs: int,
) -> tuple[IntegratorState, Float[Array, ""]]:
    """Make one transition of Hamiltonian Monte Carlo.

    Args:
        uniforms: 2 + d, independent, in [0, 1): jitter of the step size, acceptance, momentum.
        state: current state of the chain.
        value_and_grad_fn: position (d,) -> log density and its gradient.
        step_size: before jitter.
        inverse_mass: diagonal of the inverse mass matrix.
        num_leapfrogs: of the trajectory.

    Returns:
        The next state and the log acceptance ratio: the energy at the start minus that at the end of the trajectory.
    """
    # Integrate
    step_size = step_size * (1 + _JITTER * (2 * uniforms[0] - 1))
    momentum = momentum_from_uniforms(uniforms[2:], inverse_mass)
    end, end_momentum = lax.fori_loop(
        0,
        num_leapfrogs,
        lambda _, end: leapfrog(value_and_grad_fn, end[0], end[1], step_size, inverse_mass),
        (state, momentum),
    )
    # Accept or reject
    start_energy = energy(state.logdensity, momentum, inverse_mass)
    log_acceptance_ratio = start_energy - energy(end.logdensity, end_momentum, inverse_mass)
    log_acceptance_ratio = jnp.where(jnp.isnan(log_acceptance_ratio), -jnp.inf, log_acceptance_ratio)
    accepted = jnp.log(uniforms[1]) < log_acceptance_ratio
    state = select(accepted, end, state)
    return state, log_acceptance_ratio
