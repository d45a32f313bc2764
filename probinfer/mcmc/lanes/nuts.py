"""NUTS as a function of a key and a data set that can be run a leapfrog at a time, made for ``run_many``.

The trajectories are those of ``nuts_steps``; at the end of each, warm-up learns step size and diagonal metric as Stan
does, by blackjax's dual averaging, Welford estimate and schedule, and then both are frozen. A step of the sampler is
one leapfrog with whatever ends and begins there, so that in a queue no lane waits for another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from probinfer.core.types import Array, ArrayTree, PRNGKey, field, pytree
from probinfer.mcmc.adaptation.tuning import Tuning, first_tuning, learn, row_of, sound
from probinfer.mcmc.hamiltonian import Place
from probinfer.mcmc.lanes.info import SamplerInfo, sampler_info
from probinfer.mcmc.nuts_steps import Trajectory, begin, grow, is_over
from probinfer.running.many.lanes import run_alone

__all__ = ["NutsChain", "NutsPosteriorSampler"]


class Counts(NamedTuple):
    """Gradients in all; divergences, capped trajectories and the sum of acceptance rates after warm-up."""

    gradients: Any
    divergences: Any
    capped: Any
    acceptance: Any


class NutsChain(NamedTuple):
    """One chain between two leapfrogs.

    Attributes:
        key: of the chain, folded with the number of gradients at each step.
        x: its data set.
        transitions: completed, those of the warm-up included.
        trajectory: the one that grows.
        tuning: step size, metric and their adaptation.
        draws: (L, d) positions so far.
        counts: what has happened.
        finite: whether log density and step size were at the start and after warm-up.
    """

    key: Any
    x: Any
    transitions: Any
    trajectory: Trajectory
    tuning: Tuning
    draws: Any
    counts: Counts
    finite: Any


@pytree
class NutsPosteriorSampler:
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

    def init(self, key: PRNGKey, x: ArrayTree) -> NutsChain:
        """Start at ``init_fn`` with the first trajectory."""
        key_start, key_first, key_chain = jax.random.split(key, 3)
        position, unravel = ravel_pytree(self.init_fn(key_start, x))
        place = Place(position, *self._value_and_grad(x, unravel)(position))
        tuning = first_tuning(self.target_acceptance, position)
        uniforms = jax.random.uniform(key_first, (1 + len(position),), position.dtype)
        none = jnp.int32(0)
        return NutsChain(
            key_chain,
            x,
            none,
            begin(uniforms, place, tuning.inverse_mass, self.max_depth),
            tuning,
            jnp.zeros((self.num_draws, *position.shape), position.dtype),
            Counts(none, none, none, jnp.zeros((), position.dtype)),
            jnp.isfinite(place.logdensity),
        )

    def step(self, state: NutsChain) -> NutsChain:
        """One leapfrog; a trajectory that it completes is judged and learned from, and the next begins."""
        tuning, position = state.tuning, state.trajectory.chosen.position
        # All randomness of a step in one call: on a CPU each call is a loop of its own.
        key = jax.random.fold_in(state.key, state.counts.gradients)
        uniforms = jax.random.uniform(key, (3 + len(position),), position.dtype)
        example = jax.eval_shape(self.init_fn, state.key, state.x)
        _, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example))
        value_and_grad_fn = self._value_and_grad(state.x, unravel)
        trajectory = grow(
            uniforms[:2], state.trajectory, value_and_grad_fn, tuning.step_size, tuning.inverse_mass
        )
        over = is_over(trajectory, self.max_depth)
        row = row_of(state.transitions, self.num_warmup, self.num_draws, self.thin)
        row = jnp.where(over, row, self.num_draws)
        following = state._replace(
            trajectory=trajectory,
            counts=state.counts._replace(gradients=state.counts.gradients + 1),
            draws=jnp.zeros(()),  # kept out of the choice below: it would be copied at each step
        )
        following = lax.cond(over, lambda s: self._end(uniforms[2:], s), lambda s: s, following)
        return following._replace(draws=state.draws.at[row].set(trajectory.chosen.position, mode="drop"))

    def done(self, state: NutsChain) -> Array:
        """Whether all draws are there."""
        return state.transitions >= self.num_warmup + self.num_draws * self.thin

    def finish(self, state: NutsChain) -> tuple[ArrayTree, SamplerInfo]:
        """The draws and what is known about them."""
        num = self.num_draws * self.thin
        info = sampler_info(
            state.draws,
            state.finite,
            num,
            num_gradients=state.counts.gradients,
            num_divergences=state.counts.divergences,
            num_capped=state.counts.capped,
            acceptance_rate=state.counts.acceptance / num,
            step_size=state.tuning.step_size,
        )
        example = jax.eval_shape(self.init_fn, state.key, state.x)
        _, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example))
        positions = jax.vmap(unravel)(state.draws)
        return positions if self.constrain_fn is None else jax.vmap(self.constrain_fn)(positions), info

    def _value_and_grad(self, x: ArrayTree, unravel: Callable) -> Callable:
        return jax.value_and_grad(lambda flat: self.logdensity_fn(unravel(flat), x))

    def _end(self, uniforms: Array, state: NutsChain) -> NutsChain:
        """Judge the completed trajectory, learn from it, and begin the next."""
        tree, counts = state.trajectory, state.counts
        acceptance = tree.acceptance_sum / tree.num_leapfrogs
        warm = state.transitions >= self.num_warmup
        capped = ~tree.diverging & ~tree.turning
        counts = counts._replace(
            divergences=counts.divergences + (warm & tree.diverging),
            capped=counts.capped + (warm & capped),
            acceptance=counts.acceptance + jnp.where(warm, acceptance, 0),
        )
        learned = learn(
            self.target_acceptance,
            self.num_warmup,
            state.tuning,
            state.transitions,
            tree.chosen.position,
            acceptance,
        )
        tuning = jax.tree.map(lambda old, new: jnp.where(warm, old, new), state.tuning, learned)
        return state._replace(
            transitions=state.transitions + 1,
            trajectory=begin(uniforms, tree.chosen, tuning.inverse_mass, self.max_depth),
            tuning=tuning,
            counts=counts,
            finite=state.finite & sound(tree.chosen.logdensity, tuning),
        )
