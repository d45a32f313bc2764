"""NUTS as a function of a key and a data set that can be run one leapfrog at a time, made for ``run_many``.

The trajectories are those of ``nuts_steps``. At the end of each, warm-up adapts step size and diagonal metric as Stan
does, by blackjax's dual averaging, Welford estimate and schedule; then both are frozen. A step of the sampler is one
leapfrog together with whatever ends and begins there, so that in a queue no lane waits for another.
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
from probinfer.mcmc.hamiltonian import IntegratorState
from probinfer.mcmc.lanes.info import SamplerInfo, sampler_info
from probinfer.mcmc.nuts_steps import Trajectory, init_trajectory, is_complete, take_leapfrog_step
from probinfer.running.many.lanes import run_alone

__all__ = ["NUTSChain", "NUTSPosteriorSampler"]


class NUTSCounts(NamedTuple):
    """What a chain has counted.

    Attributes:
        gradients: of warm-up and draws together.
        divergences: after warm-up.
        capped: trajectories after warm-up that were cut off at ``max_depth``.
        acceptance_sum: of the acceptance rates after warm-up.
    """

    gradients: Int[Array, ""]
    divergences: Int[Array, ""]
    capped: Int[Array, ""]
    acceptance_sum: Float[Array, ""]


class NUTSChain(NamedTuple):
    """One chain between two leapfrogs.

    Attributes:
        key: of the chain; each step folds in the number of gradients.
        x: its data set.
        transitions: completed, those of the warm-up included.
        trajectory: under construction.
        tuning: step size, metric and their adaptation.
        draws: positions so far.
        counts: gradients, divergences and the like.
        finite: whether log density and step size have been usable so far.
    """

    key: PRNGKey
    x: ArrayTree
    transitions: Int[Array, ""]
    trajectory: Trajectory
    tuning: Tuning
    draws: Float[Array, "L d"]
    counts: NUTSCounts
    finite: Bool[Array, ""]


@pytree
class NUTSPosteriorSampler:
    """``(key, x) -> (draws, info)``, in steps or all at once; see ``posterior_sampler``."""

    logdensity_fn: Callable
    init_fn: Callable
    constrain_fn: Callable | None
    target_acceptance: Any
    num_warmup: int = field(static=True)
    num_draws: int = field(static=True)
    max_depth: int = field(static=True)
    thin: int = field(static=True)

    def __call__(self, key: PRNGKey, x: ArrayTree) -> tuple[ArrayTree, SamplerInfo]:
        """Draw from the posterior of one data set."""
        return run_alone(self, key, x)

    def init(self, key: PRNGKey, x: ArrayTree) -> NUTSChain:
        """Start at ``init_fn`` with the first trajectory."""
        key_init, key_first, key_chain = jax.random.split(key, 3)
        position, unravel = ravel_pytree(self.init_fn(key_init, x))
        start = IntegratorState(position, *self._value_and_grad(x, unravel)(position))
        tuning = first_tuning(self.target_acceptance, position)
        uniforms = jax.random.uniform(key_first, (1 + len(position),), position.dtype)
        zero = jnp.int32(0)
        return NUTSChain(
            key=key_chain,
            x=x,
            transitions=zero,
            trajectory=init_trajectory(uniforms, start, tuning.inverse_mass, self.max_depth),
            tuning=tuning,
            draws=jnp.zeros((self.num_draws, *position.shape), position.dtype),
            counts=NUTSCounts(zero, zero, zero, jnp.zeros((), position.dtype)),
            finite=jnp.isfinite(start.logdensity),
        )

    def step(self, state: NUTSChain) -> NUTSChain:
        """Take one leapfrog; if it completes the trajectory, adapt to it and start the next one."""
        tuning, position = state.tuning, state.trajectory.chosen.position
        # Draw all random numbers of a step in one call: on a CPU each call is a loop of its own.
        key = jax.random.fold_in(state.key, state.counts.gradients)
        uniforms = jax.random.uniform(key, (3 + len(position),), position.dtype)
        # Integrate
        value_and_grad_fn = self._value_and_grad(state.x, self._unravel_fn(state))
        trajectory = take_leapfrog_step(
            uniforms[:2], state.trajectory, value_and_grad_fn, tuning.step_size, tuning.inverse_mass
        )
        # Record and adapt at the end of a trajectory
        complete = is_complete(trajectory, self.max_depth)
        row = draw_index(state.transitions, self.num_warmup, self.num_draws, self.thin)
        row = jnp.where(complete, row, self.num_draws)
        following = state._replace(
            trajectory=trajectory,
            counts=state.counts._replace(gradients=state.counts.gradients + 1),
            draws=jnp.zeros(()),  # kept out of the cond below, which would copy them at each step
        )
        following = lax.cond(complete, lambda s: self._end(uniforms[2:], s), lambda s: s, following)
        return following._replace(draws=state.draws.at[row].set(trajectory.chosen.position, mode="drop"))

    def done(self, state: NUTSChain) -> Array:
        """Return whether all draws have been made."""
        return state.transitions >= self.num_warmup + self.num_draws * self.thin

    def finish(self, state: NUTSChain) -> tuple[ArrayTree, SamplerInfo]:
        """Return the draws and the report."""
        num_transitions = self.num_draws * self.thin
        info = sampler_info(
            state.draws,
            state.finite,
            num_transitions,
            num_gradients=state.counts.gradients,
            num_divergences=state.counts.divergences,
            num_capped=state.counts.capped,
            acceptance_rate=state.counts.acceptance_sum / num_transitions,
            step_size=state.tuning.step_size,
        )
        positions = jax.vmap(self._unravel_fn(state))(state.draws)
        return positions if self.constrain_fn is None else jax.vmap(self.constrain_fn)(positions), info

    def _value_and_grad(self, x: ArrayTree, unravel: Callable) -> Callable:
        return jax.value_and_grad(lambda flat: self.logdensity_fn(unravel(flat), x))

    def _unravel_fn(self, state: NUTSChain) -> Callable:
        """Return the function from flat to structured positions; ``init_fn`` is traced, not run."""
        template = jax.eval_shape(self.init_fn, state.key, state.x)
        return ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template))[1]

    def _end(self, uniforms: Array, state: NUTSChain) -> NUTSChain:
        """End a complete trajectory: count, adapt, and start the next one from the chosen state."""
        tree, counts = state.trajectory, state.counts
        acceptance = tree.acceptance_sum / tree.num_leapfrogs
        warmed_up = state.transitions >= self.num_warmup
        capped = ~tree.diverging & ~tree.turning
        counts = counts._replace(
            divergences=counts.divergences + (warmed_up & tree.diverging),
            capped=counts.capped + (warmed_up & capped),
            acceptance_sum=counts.acceptance_sum + jnp.where(warmed_up, acceptance, 0),
        )
        learned = learn(
            self.target_acceptance,
            self.num_warmup,
            state.tuning,
            state.transitions,
            tree.chosen.position,
            acceptance,
        )
        tuning = select(warmed_up, state.tuning, learned)
        return state._replace(
            transitions=state.transitions + 1,
            trajectory=init_trajectory(uniforms, tree.chosen, tuning.inverse_mass, self.max_depth),
            tuning=tuning,
            counts=counts,
            finite=state.finite & is_usable(tree.chosen.logdensity, tuning),
        )
