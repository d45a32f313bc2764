r"""The no-U-turn sampler, one leapfrog at a time: each call adds a state to the trajectory.

A trajectory doubles in a random direction until it turns back on itself, diverges, or has doubled ``max_depth``
times. Recursion is replaced by O(depth) checkpoints: leaf n of a new half completes as many subtrees as n + 1 has
trailing zero bits, and the first momentum of each is stored in the checkpoint whose number is the count of ones of
n // 2. A draw is chosen from the trajectory with weights :math:`e^{-H}`: by multinomial sampling within a new half,
and with a bias towards the new half when the two are joined.

There is no loop inside, so that vectorized lanes never wait for the longest trajectory among them. Randomness is passed
in as uniform numbers, so that a step can draw all of them at once.

References:
    Hoffman and Gelman (2014), "The No-U-turn sampler". Betancourt (2017), "A conceptual introduction to Hamiltonian
    Monte Carlo", appendix A (multinomial sampling, generalized criterion). Phan, Pradhan and Jankowiak (2019),
    "Composable effects for flexible and accelerated probabilistic programming in NumPyro", algorithm 2. Lao and
    Dillon (2020), "Unrolled implementation of no-U-turn sampler".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.trees import select
from probinfer.core.types import Array, Bool, Float, Int, PRNGKey
from probinfer.mcmc.hamiltonian import (
    DIVERGENCE_THRESHOLD,
    IntegratorState,
    energy,
    leapfrog,
    momentum_from_uniforms,
)

__all__ = [
    "DEPTH_LIMIT",
    "Half",
    "Trajectory",
    "init_trajectory",
    "is_complete",
    "sample_trajectory",
    "take_leapfrog_step",
]

DEPTH_LIMIT = 20  # doublings: a float32 uniform has 23 random bits for their directions


class Half(NamedTuple):
    """The new half of a trajectory: the states that the current doubling has added.

    Attributes:
        momentum_sum: over its states.
        log_weight: log sum of ``exp(energy - H)`` over its states.
        chosen: the state chosen among them.
    """

    momentum_sum: Float[Array, " d"]
    log_weight: Float[Array, ""]
    chosen: IntegratorState


class Trajectory(NamedTuple):
    """A trajectory under construction.

    Attributes:
        first, last: state and momentum at its two ends.
        momentum_sum: over its states, without those of the new half.
        energy: Hamiltonian H at the start, nats.
        log_weight: log sum of ``exp(energy - H)`` over its states, without those of the new half.
        chosen: the state chosen so far, without those of the new half.
        half: the new half.
        checkpoints: momenta at the starts of open subtrees, and the sums of momenta up to and including them;
            c = max_depth - 1, at least 1.
        directions: bit k is the direction of doubling k.
        depth: completed doublings.
        leaf: number of states in the new half.
        acceptance_sum: of min(1, exp(energy - H)) over all states tried.
        num_leapfrogs: number of states tried.
        diverging: whether the energy error exceeded ``DIVERGENCE_THRESHOLD``.
        turning: whether the trajectory, or a subtree of its new half, turned back on itself.
    """

    first: tuple[IntegratorState, Float[Array, " d"]]
    last: tuple[IntegratorState, Float[Array, " d"]]
    momentum_sum: Float[Array, " d"]
    energy: Float[Array, ""]
    log_weight: Float[Array, ""]
    chosen: IntegratorState
    half: Half
    checkpoints: tuple[Float[Array, "c d"], Float[Array, "c d"]]
    directions: Int[Array, ""]
    depth: Int[Array, ""]
    leaf: Int[Array, ""]
    acceptance_sum: Float[Array, ""]
    num_leapfrogs: Int[Array, ""]
    diverging: Bool[Array, ""]
    turning: Bool[Array, ""]


def init_trajectory(
    uniforms: Float[Array, " draws"], start: IntegratorState, inverse_mass: Float[Array, " d"], max_depth: int
) -> Trajectory:
    """Draw a momentum and the directions of all doublings; the trajectory has one state.

    Args:
        uniforms: 1 + d, independent, in [0, 1).
        start: current state of the chain.
        inverse_mass: diagonal of the inverse mass matrix.
        max_depth: maximum number of doublings, at most ``DEPTH_LIMIT``.
    """
    dtype, shape = start.position.dtype, start.position.shape
    momentum = momentum_from_uniforms(uniforms[1:], inverse_mass)
    end = (start, momentum)
    zero, zero_count = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
    rows = jnp.zeros((max(max_depth - 1, 1), *shape), dtype)
    return Trajectory(
        first=end,
        last=end,
        momentum_sum=momentum,
        energy=energy(start.logdensity, momentum, inverse_mass),
        log_weight=zero,
        chosen=start,
        half=Half(jnp.zeros_like(momentum), jnp.full((), -jnp.inf, dtype), start),
        checkpoints=(rows, rows),
        directions=(uniforms[0] * 2**DEPTH_LIMIT).astype(jnp.int32),
        depth=zero_count,
        leaf=zero_count,
        acceptance_sum=zero,
        num_leapfrogs=zero_count,
        diverging=jnp.asarray(False),
        turning=jnp.asarray(False),
    )


def is_complete(trajectory: Trajectory, max_depth: int) -> Bool[Array, ""]:
    """Return whether the trajectory turned back, diverged, or has doubled ``max_depth`` times."""
    return trajectory.diverging | trajectory.turning | (trajectory.depth >= max_depth)


def take_leapfrog_step(
    uniforms: Float[Array, "2"],
    trajectory: Trajectory,
    value_and_grad_fn: Callable,
    step_size: Float[Array, ""],
    inverse_mass: Float[Array, " d"],
) -> Trajectory:
    """Take one leapfrog step at the active end, and join the two halves once the new one is complete.

    Args:
        uniforms: independent, in [0, 1).
        trajectory: not complete yet.
        value_and_grad_fn: position (d,) -> log density and its gradient.
        step_size: of the leapfrog.
        inverse_mass: diagonal of the inverse mass matrix.
    """
    # Integrate
    forward = (trajectory.directions >> trajectory.depth) & 1 == 1
    end = select(forward, trajectory.last, trajectory.first)
    step_size = jnp.where(forward, step_size, -step_size)
    state, momentum = end = leapfrog(value_and_grad_fn, end[0], end[1], step_size, inverse_mass)
    trajectory = trajectory._replace(
        first=select(forward, trajectory.first, end), last=select(forward, end, trajectory.last)
    )
    # Weigh
    log_acceptance_ratio = trajectory.energy - energy(state.logdensity, momentum, inverse_mass)
    # NaN (infinity minus infinity) counts as a divergence.
    log_acceptance_ratio = jnp.where(jnp.isnan(log_acceptance_ratio), -jnp.inf, log_acceptance_ratio)
    trajectory = _add_leaf(uniforms[0], trajectory, momentum, state, log_acceptance_ratio)
    # Check for U-turns
    checkpoints = _checkpoint(trajectory, momentum)
    turning = _completes_turning_subtree(trajectory, checkpoints, momentum, inverse_mass)
    trajectory = trajectory._replace(
        checkpoints=checkpoints,
        diverging=-log_acceptance_ratio > DIVERGENCE_THRESHOLD,
        turning=turning,
        leaf=trajectory.leaf + 1,
        acceptance_sum=trajectory.acceptance_sum + jnp.exp(jnp.minimum(log_acceptance_ratio, 0)),
        num_leapfrogs=trajectory.num_leapfrogs + 1,
    )
    # Double
    return _join(uniforms[1], trajectory, inverse_mass)


def sample_trajectory(
    key: PRNGKey,
    start: IntegratorState,
    value_and_grad_fn: Callable,
    step_size: Float[Array, ""],
    inverse_mass: Float[Array, " d"],
    max_depth: int,
    active: Bool[Array, ""] | bool = True,
) -> Trajectory:
    """Sample a complete trajectory, in a loop; if vectorized, all lanes wait for the longest.

    Args:
        key: random key.
        start: current state of the chain.
        value_and_grad_fn: position (d,) -> log density and its gradient.
        step_size: of the leapfrog.
        inverse_mass: diagonal of the inverse mass matrix.
        max_depth: maximum number of doublings.
        active: if False, no leapfrog step is taken.
    """
    key_init, key_steps = jax.random.split(key)
    dtype = start.position.dtype
    uniforms = jax.random.uniform(key_init, (1 + start.position.shape[0],), dtype)

    def step(tree):
        pair = jax.random.uniform(jax.random.fold_in(key_steps, tree.num_leapfrogs), (2,), dtype)
        return take_leapfrog_step(pair, tree, value_and_grad_fn, step_size, inverse_mass)

    return jax.lax.while_loop(
        lambda tree: ~is_complete(tree, max_depth) & active,
        step,
        init_trajectory(uniforms, start, inverse_mass, max_depth),
    )


def _add_leaf(
    uniform: Array, tree: Trajectory, momentum: Array, state: IntegratorState, log_weight: Array
) -> Trajectory:
    """Add a state to the new half and choose it with its share of the weight."""
    first = tree.leaf == 0
    half = tree.half
    total = jnp.where(first, log_weight, jnp.logaddexp(half.log_weight, log_weight))
    chosen = first | (jnp.log(uniform) < log_weight - total)
    momentum_sum = momentum + jnp.where(first, jnp.zeros_like(momentum), half.momentum_sum)
    return tree._replace(half=Half(momentum_sum, total, select(chosen, state, half.chosen)))


def _slots(leaf: Array) -> tuple[Array, Array]:
    """Return first and last checkpoint of the subtrees that a leaf completes.

    An even leaf completes none (the range is empty) and opens the last.
    """
    ones = jax.lax.population_count(leaf >> 1)
    completed = jax.lax.population_count((~leaf & (leaf + 1)) - 1)  # trailing ones of the leaf's number
    return ones - completed + 1, ones


def _checkpoint(tree: Trajectory, momentum: Array) -> tuple[Array, Array]:
    slot = jnp.where(tree.leaf % 2 == 0, _slots(tree.leaf)[1], -1)
    # A mask instead of an indexed update: -1 (odd leaf) must match no row.
    selected = (jnp.arange(len(tree.checkpoints[0])) == slot)[:, None]
    momenta, sums = tree.checkpoints
    return jnp.where(selected, momentum, momenta), jnp.where(selected, tree.half.momentum_sum, sums)


def _completes_turning_subtree(tree: Trajectory, checkpoints: tuple, momentum: Array, inverse_mass) -> Array:
    momenta, sums = checkpoints
    low, high = _slots(tree.leaf)
    slots = jnp.arange(len(momenta))
    completed = (low <= slots) & (slots <= high)
    subtree_sums = tree.half.momentum_sum - sums + momenta
    return jnp.any(completed & _is_turning(momenta, momentum, subtree_sums, inverse_mass))


def _is_turning(first: Array, last: Array, momentum_sum: Array, inverse_mass: Array) -> Array:
    """Return whether the sum of momenta, less half of both ends, points against the velocity at an end (..., d)."""
    rho = momentum_sum - (first + last) / 2
    velocity = inverse_mass * rho
    return (jnp.sum(first * velocity, axis=-1) <= 0) | (jnp.sum(last * velocity, axis=-1) <= 0)


def _join(uniform: Array, tree: Trajectory, inverse_mass: Array) -> Trajectory:
    """Join a complete new half, unless it turns or diverges, to the trajectory."""
    complete = tree.leaf == 1 << tree.depth
    joined = complete & ~tree.turning & ~tree.diverging
    half = tree.half
    # Biased progressive sampling: the new half is accepted with probability min(1, its weight / the old weight).
    accepted = joined & (jnp.log(uniform) < half.log_weight - tree.log_weight)
    momentum_sum = tree.momentum_sum + half.momentum_sum
    turning = _is_turning(tree.first[1], tree.last[1], momentum_sum, inverse_mass)
    return tree._replace(
        momentum_sum=jnp.where(joined, momentum_sum, tree.momentum_sum),
        log_weight=jnp.where(joined, jnp.logaddexp(tree.log_weight, half.log_weight), tree.log_weight),
        chosen=select(accepted, half.chosen, tree.chosen),
        depth=tree.depth + joined,
        leaf=jnp.where(joined, 0, tree.leaf),
        turning=tree.turning | (joined & turning),
    )
