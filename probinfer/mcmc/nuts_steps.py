r"""The no-U-turn sampler one leapfrog at a time: a trajectory grows by a state with each call.

A trajectory doubles in a random direction until it turns back on itself, diverges, or has doubled ``max_depth``
times. Recursion is replaced by O(depth) checkpoints: leaf n of a new half closes as many subtrees as n + 1 has
trailing zero bits, and the first momentum of each lies in a checkpoint whose number is the count of ones of n // 2.
A draw is chosen from the trajectory with weights :math:`e^{-H}`, uniformly within a new half and with preference for
the new half when the two are joined.

With no loop inside, lanes that are vectorised never wait for the longest trajectory among them. Randomness comes in as
uniform numbers, so that a step can draw all it needs at once.

References:
    Hoffman and Gelman (2014), "The No-U-turn sampler". Betancourt (2017), "A conceptual introduction to Hamiltonian
    Monte Carlo", appendix A (multinomial choice, generalised criterion). Phan, Pradhan and Jankowiak (2019),
    "Composable effects for flexible and accelerated probabilistic programming in NumPyro", algorithm 2. Lao and
    Dillon (2020), "Unrolled implementation of no-U-turn sampler".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Bool, Float, PRNGKey
from probinfer.mcmc.hamiltonian import DIVERGENT, Place, energy, leapfrog, momentum

__all__ = ["DEEPEST", "Trajectory", "begin", "grow", "is_over", "whole"]

DEEPEST = 20  # doublings: a float32 uniform has 23 random bits for their directions


class Trajectory(NamedTuple):
    """A trajectory that grows.

    Attributes:
        first, last: (``Place``, momentum (d,)) at its two ends.
        momentum_sum: (d,) over its states, those of the new half left out.
        energy: of the start, nats.
        log_weight: log sum of ``exp(energy - H)`` over its states, those of the new half left out.
        chosen: the ``Place`` chosen so far.
        half: momentum_sum, log_weight and chosen place of the new half.
        checkpoints: (max_depth - 1, d) momenta at the starts of open subtrees, and the sums up to and including them.
        directions: bit k is the direction of doubling k.
        depth: doublings completed.
        leaf: states in the new half.
        acceptance_sum: of min(1, exp(energy - H)) over all states tried.
        num_leapfrogs: states tried.
        diverging: whether the energy error passed a thousand nats.
        turning: whether the trajectory, or a subtree of its new half, turned back on itself.
    """

    first: Any
    last: Any
    momentum_sum: Any
    energy: Any
    log_weight: Any
    chosen: Place
    half: Any
    checkpoints: Any
    directions: Any
    depth: Any
    leaf: Any
    acceptance_sum: Any
    num_leapfrogs: Any
    diverging: Any
    turning: Any


def begin(
    uniforms: Float[Array, " draws"], place: Place, inverse_mass: Float[Array, " d"], max_depth: int
) -> Trajectory:
    """Draw a momentum, and the directions of all doublings.

    Args:
        uniforms: independent, in [0, 1).
        place: where the chain is.
        inverse_mass: diagonal of the inverse mass matrix.
        max_depth: the most doublings, ``DEEPEST`` or fewer.
    """
    dtype, shape = place.position.dtype, place.position.shape
    start = momentum(uniforms[1:], inverse_mass)
    end = (place, start)
    zero, none = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
    rows = jnp.zeros((max(max_depth - 1, 1), *shape), dtype)
    return Trajectory(
        end,
        end,
        start,
        energy(place.logdensity, start, inverse_mass),
        zero,
        place,
        (jnp.zeros_like(start), jnp.full((), -jnp.inf, dtype), place),
        (rows, rows),
        (uniforms[0] * 2**DEEPEST).astype(jnp.int32),
        none,
        none,
        zero,
        none,
        jnp.asarray(False),
        jnp.asarray(False),
    )


def is_over(trajectory: Trajectory, max_depth: int) -> Array:
    """Whether the trajectory is complete."""
    return trajectory.diverging | trajectory.turning | (trajectory.depth >= max_depth)


def grow(
    uniforms: Float[Array, "2"],
    trajectory: Trajectory,
    value_and_grad_fn: Callable,
    step_size: Float[Array, ""],
    inverse_mass: Float[Array, " d"],
) -> Trajectory:
    """Take one leapfrog at the growing end, and join the halves where the new one is complete.

    Args:
        uniforms: independent, in [0, 1).
        trajectory: not over yet.
        value_and_grad_fn: position (d,) -> log density and its gradient.
        step_size: of the leapfrog.
        inverse_mass: diagonal of the inverse mass matrix.
    """
    forward = (trajectory.directions >> trajectory.depth) & 1 == 1
    end = _where(forward, trajectory.last, trajectory.first)
    step_size = jnp.where(forward, step_size, -step_size)
    place, last = end = leapfrog(value_and_grad_fn, end[0], end[1], step_size, inverse_mass)
    trajectory = trajectory._replace(
        first=_where(forward, trajectory.first, end), last=_where(forward, end, trajectory.last)
    )
    gain = trajectory.energy - energy(place.logdensity, last, inverse_mass)
    gain = jnp.where(jnp.isnan(gain), -jnp.inf, gain)
    trajectory = _add_leaf(uniforms[0], trajectory, last, place, gain)
    checkpoints = _checkpoint(trajectory, last)
    turning = _closes_turning_subtree(trajectory, checkpoints, last, inverse_mass)
    trajectory = trajectory._replace(
        checkpoints=checkpoints,
        diverging=-gain > DIVERGENT,
        turning=turning,
        leaf=trajectory.leaf + 1,
        acceptance_sum=trajectory.acceptance_sum + jnp.exp(jnp.minimum(gain, 0)),
        num_leapfrogs=trajectory.num_leapfrogs + 1,
    )
    return _join(uniforms[1], trajectory, inverse_mass)


def whole(
    key: PRNGKey,
    place: Place,
    value_and_grad_fn: Callable,
    step_size: Float[Array, ""],
    inverse_mass: Float[Array, " d"],
    max_depth: int,
    wanted: Bool[Array, ""] | bool = True,
) -> Trajectory:
    """Grow a trajectory to its end, in a loop: side by side, all wait for the longest.

    Args:
        key: random key.
        place: where it starts.
        value_and_grad_fn: position (d,) -> log density and its gradient.
        step_size: of the leapfrog.
        inverse_mass: diagonal of the inverse mass matrix.
        max_depth: the most doublings.
        wanted: False: no leapfrog is taken.
    """
    key_begin, key_grow = jax.random.split(key)
    dtype = place.position.dtype
    uniforms = jax.random.uniform(key_begin, (1 + place.position.shape[0],), dtype)

    def step(tree):
        pair = jax.random.uniform(jax.random.fold_in(key_grow, tree.num_leapfrogs), (2,), dtype)
        return grow(pair, tree, value_and_grad_fn, step_size, inverse_mass)

    return jax.lax.while_loop(
        lambda tree: ~is_over(tree, max_depth) & wanted, step, begin(uniforms, place, inverse_mass, max_depth)
    )


def _add_leaf(uniform: Array, tree: Trajectory, momentum: Array, place: Place, gain: Array) -> Trajectory:
    """The new half with one more state, which is chosen with its share of the weight."""
    first = tree.leaf == 0
    momentum_sum, log_weight, chosen = tree.half
    total = jnp.where(first, gain, jnp.logaddexp(log_weight, gain))
    taken = first | (jnp.log(uniform) < gain - total)
    momentum_sum = momentum + jnp.where(first, jnp.zeros_like(momentum), momentum_sum)
    return tree._replace(half=(momentum_sum, total, _where(taken, place, chosen)))


def _slots(leaf: Array) -> tuple[Array, Array]:
    """First and last checkpoint of the subtrees that a leaf closes; even leaves close none and open the last."""
    ones = jax.lax.population_count(leaf >> 1)
    closed = jax.lax.population_count((~leaf & (leaf + 1)) - 1)  # trailing ones of the leaf's number
    return ones - closed + 1, ones


def _checkpoint(tree: Trajectory, momentum: Array) -> tuple[Array, Array]:
    slot = jnp.where(tree.leaf % 2 == 0, _slots(tree.leaf)[1], -1)
    here = (jnp.arange(len(tree.checkpoints[0])) == slot)[:, None]
    momenta, sums = tree.checkpoints
    return jnp.where(here, momentum, momenta), jnp.where(here, tree.half[0], sums)


def _closes_turning_subtree(tree: Trajectory, checkpoints: tuple, momentum: Array, inverse_mass) -> Array:
    momenta, sums = checkpoints
    low, high = _slots(tree.leaf)
    slots = jnp.arange(len(momenta))
    closed = (low <= slots) & (slots <= high)
    return jnp.any(closed & _is_turning(momenta, momentum, tree.half[0] - sums + momenta, inverse_mass))


def _is_turning(first: Array, last: Array, momentum_sum: Array, inverse_mass: Array) -> Array:
    """Whether the sum of momenta, half of both ends left out, points against the velocity at an end (..., d)."""
    rho = momentum_sum - (first + last) / 2
    velocity = inverse_mass * rho
    return (jnp.sum(first * velocity, axis=-1) <= 0) | (jnp.sum(last * velocity, axis=-1) <= 0)


def _join(uniform: Array, tree: Trajectory, inverse_mass: Array) -> Trajectory:
    """Where the new half is complete and sound: one trajectory of twice the length."""
    complete = tree.leaf == 1 << tree.depth
    joined = complete & ~tree.turning & ~tree.diverging
    momentum_sum, log_weight, chosen = tree.half
    taken = joined & (jnp.log(uniform) < log_weight - tree.log_weight)
    whole = tree.momentum_sum + momentum_sum
    turning = _is_turning(tree.first[1], tree.last[1], whole, inverse_mass)
    return tree._replace(
        momentum_sum=jnp.where(joined, whole, tree.momentum_sum),
        log_weight=jnp.where(joined, jnp.logaddexp(tree.log_weight, log_weight), tree.log_weight),
        chosen=_where(taken, chosen, tree.chosen),
        depth=tree.depth + joined,
        leaf=jnp.where(joined, 0, tree.leaf),
        turning=tree.turning | (joined & turning),
    )


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
