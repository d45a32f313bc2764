"""Hamiltonian Monte Carlo on the Gaussian model, correct and with one fault each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .models import GAUSSIAN

__all__ = ["State", "chain", "init", "no_accept", "no_momentum", "right", "stale_gradient"]

_STEP, _LEAPFROGS = (
    0.47,
    8,
)  # the longest step, with which 0.8 of the proposals are accepted, as samplers are tuned
_BURN_IN, _THIN = 20, 4

_gradient = jax.grad(GAUSSIAN.log_joint, 1)


class State(NamedTuple):
    """A position, and the gradient that the transition uses."""

    position: jax.Array
    gradient: jax.Array


def init(theta, x) -> State:
    """Return the initial state of a chain at theta."""
    return State(theta, _gradient(x, theta))


def _step(
    key, state: State, x, *, accept: bool = True, kinetic: bool = True, fresh: bool = True
) -> tuple[State, dict]:
    """One transition with a jittered step size.

    Args:
        key: random key.
        state: where it starts.
        x: data.
        accept: False accepts whatever comes.
        kinetic: False leaves the momenta out of the ratio.
        fresh: False keeps the gradient of the position before when a proposal is accepted.
    """
    key_momentum, key_jitter, key_accept = jax.random.split(key, 3)
    start = jax.random.normal(key_momentum, state.position.shape)
    size = _STEP * jax.random.uniform(key_jitter, (), minval=0.5)

    def leapfrog(carry, _):
        q, p, g = carry
        p = p + 0.5 * size * g
        q = q + size * p
        g = _gradient(x, q)
        return (q, p + 0.5 * size * g, g), None

    (q, p, g), _ = jax.lax.scan(leapfrog, (state.position, start, state.gradient), None, _LEAPFROGS)
    log_ratio = GAUSSIAN.log_joint(x, q) - GAUSSIAN.log_joint(x, state.position)
    if kinetic:
        log_ratio = log_ratio - 0.5 * p @ p + 0.5 * start @ start
    accepted = jnp.log(jax.random.uniform(key_accept)) < log_ratio
    if not accept:
        accepted = jnp.ones_like(accepted)
    gradient = jnp.where(accepted, g, state.gradient) if fresh else state.gradient
    if not fresh:  # the gradient of the position that was left
        gradient = jnp.where(accepted, _gradient(x, state.position), state.gradient)
    return State(jnp.where(accepted, q, state.position), gradient), {"accepted": accepted}


def right(key, state, x):
    """The transition without a fault."""
    return _step(key, state, x)


def no_accept(key, state, x):
    """Accept each proposal."""
    return _step(key, state, x, accept=False)


def no_momentum(key, state, x):
    """Use the ratio of the densities of the positions alone."""
    return _step(key, state, x, kinetic=False)


def stale_gradient(key, state, x):
    """After an acceptance, use the gradient at the previous position."""
    return _step(key, state, x, fresh=False)


def chain(transition: Callable, key, x, num: int):
    """Positions of one chain from a prior draw, far enough apart to count as independent (num, d)."""
    key_start, key_burn, key_run = jax.random.split(key, 3)
    state = init(GAUSSIAN.prior_sample(key_start), x)

    def advance(state, key):
        return transition(key, state, x)[0], None

    def spaced(state, key):
        state, _ = jax.lax.scan(advance, state, jax.random.split(key, _THIN))
        return state, state.position

    state, _ = jax.lax.scan(advance, state, jax.random.split(key_burn, _BURN_IN))
    return jax.lax.scan(spaced, state, jax.random.split(key_run, num))[1]
