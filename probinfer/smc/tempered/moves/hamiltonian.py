r"""Hamiltonian moves of many particles that share metric, step size and number of leapfrogs.

The momentum is normal with the metric :math:`(R R^\top)^{-1}`, R the root of the particles' covariance, so that a
normal target has period :math:`2\pi` in every direction. The length of a trajectory is a quarter period times a
uniform number between 1/2 and 3/2, drawn once a move for all particles: none waits for another. Given the lengths,
which do not depend on the particles, every move is reversible for its target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.types import Array, Float, PRNGKey
from probinfer.inference.engine import over
from probinfer.mcmc.hamiltonian import momentum_from_uniforms
from probinfer.numerics.covariance_factor import pull, push

__all__ = ["LONGEST", "Moved", "Place", "adapted", "hmc_moves", "trajectory"]

LONGEST = 0.75 * float(jnp.pi)  # quarter period times 3/2
_MAX_LEAPFROGS = 100
_TARGET_ACCEPTANCE = 0.8
# Acceptance falls by about 0.4 for a step e times longer, at 0.8 and for normal targets; a bit less than the inverse.
_NEWTON = 1.5


class Place(NamedTuple):
    """A position (d,), its log density, the gradient (d,) and the log ratio that comes with the density."""

    position: Any
    logdensity: Any
    gradient: Any
    log_ratio: Any


class Moved(NamedTuple):
    """Where moves led: all states, and what they cost.

    ``positions`` (P, N, d) and ``log_ratios`` (P, N), row 0 the start; ``acceptance`` (P,), row 0 empty;
    ``step_size`` after the last move; of all particles together ``num_gradients``, evaluations of the density with its
    gradient, and ``num_densities``, of the density alone.
    """

    positions: Any
    log_ratios: Any
    acceptance: Any
    step_size: Any
    num_gradients: Any
    num_densities: Any


def hmc_moves(
    key: PRNGKey,
    evaluate: Callable,
    positions: Float[Array, "n d"],
    root: Float[Array, "..."],
    step_size: Float[Array, ""],
    learning: Float[Array, ""],
    *,
    num_moves: int,
    mode: str,
) -> Moved:
    """Move every particle ``num_moves`` times and keep all states.

    Args:
        key: random key.
        evaluate: position (d,) -> ((log density, log ratio), gradient (d,)).
        positions: of the particles.
        root: of their covariance, see ``spread``.
        step_size: in coordinates of unit covariance.
        learning: 1: the step size goes towards the acceptance rate 0.8 after every move; 0: it stays.
        num_moves: how many.
        mode: particles one after another ("map"), side by side ("vmap"), or as the device asks ("auto").

    Returns:
        The states and their accounts.
    """
    num, dimension = positions.shape
    empty = Place(positions, *(jnp.zeros(shape, positions.dtype) for shape in (num, (num, dimension), num)))

    def move(carry, pack):
        places, step_size = carry
        uniforms, index = pack
        # The first move has no length and is accepted: so starts are evaluated in the one place that evaluates.
        first = index == 0
        length = LONGEST * (1 + 2 * uniforms[0, -1]) / 3
        count = jnp.clip(jnp.ceil(length / step_size), 1, _MAX_LEAPFROGS)
        count = jnp.where(first, 1, count).astype(jnp.int32)
        size = jnp.where(first, 0, jnp.minimum(length / count, step_size)).astype(positions.dtype)

        def one(place, uniforms):
            start = momentum_from_uniforms(uniforms[:dimension], jnp.ones(dimension, uniforms.dtype))
            return trajectory(evaluate, place, start, uniforms[dimension], size, root, count, first)

        places, acceptance = over(one, mode, places, uniforms)
        rate = jnp.mean(acceptance)
        step_size = adapted(step_size, rate, jnp.where(first, 0, learning))
        return (places, step_size), (places.position, places.log_ratio, rate, count)

    # All randomness in one call: each call is compiled by itself. The length is that of the first particle's row.
    uniforms = jax.random.uniform(key, (num_moves + 1, num, dimension + 2), positions.dtype)
    (_, step_size), (states, log_ratios, rates, counts) = lax.scan(
        move, (empty, step_size), (uniforms, jnp.arange(num_moves + 1))
    )
    spent = num * jnp.sum(counts, dtype=jnp.int32)
    return Moved(states, log_ratios, rates, step_size, spent, jnp.zeros_like(spent))


def adapted(
    step_size: Float[Array, ""], rate: Float[Array, ""], learning: Float[Array, ""]
) -> Float[Array, ""]:
    """Return a step size nearer to the one whose acceptance rate is 0.8.

    Args:
        step_size: in coordinates of unit covariance.
        rate: the acceptance that it had.
        learning: 1, or 0: it stays.
    """
    gain = learning * _NEWTON * (rate - _TARGET_ACCEPTANCE)
    return jnp.minimum(step_size * jnp.exp(gain), LONGEST).astype(step_size.dtype)


def trajectory(
    evaluate: Callable,
    place: Place,
    start: Float[Array, " d"],
    uniform: Float[Array, ""],
    step_size: Float[Array, ""],
    root: Float[Array, "..."],
    num_leapfrogs: Array,
    forced: Array,
) -> tuple[Place, Float[Array, ""]]:
    """Return where one trajectory leads and the probability that it was accepted with.

    A NaN on the way is rejected. A log ratio of plus infinity is taken, to be seen by the loop around.

    Args:
        evaluate: as in ``hmc_moves``.
        place: the start.
        start: the momentum there, standard normal, in coordinates of unit covariance.
        uniform: decides on acceptance.
        step_size: in coordinates of unit covariance.
        root: of the covariance.
        num_leapfrogs: one or more.
        forced: accept in any case.
    """

    def leap(_, carry):
        place, impulse = carry
        impulse = impulse + 0.5 * step_size * pull(root, place.gradient)
        position = place.position + step_size * push(root, impulse)
        (logdensity, log_ratio), gradient = evaluate(position)
        impulse = impulse + 0.5 * step_size * pull(root, gradient)
        return Place(position, logdensity, gradient, log_ratio), impulse

    end, last = lax.fori_loop(0, num_leapfrogs, leap, (place, start))
    gain = end.logdensity - place.logdensity + 0.5 * (jnp.sum(start**2) - jnp.sum(last**2))
    gain = jnp.where(jnp.isnan(gain), -jnp.inf, gain)
    accepted = forced | (jnp.log(uniform) < gain) | (end.log_ratio == jnp.inf)
    chosen = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), end, place)
    return chosen, jnp.exp(jnp.minimum(gain, 0))
