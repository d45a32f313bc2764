r"""The likelihood of parameters, estimated by a particle filter, and how many particles the estimate needs.

Markov chains that use :math:`\hat Z(\theta)` in place of the likelihood cost N a step and slow down as the variance
of :math:`\log\hat Z` grows, which falls as 1 / N. The best trade is near a variance of 1 to 1.5 at a central
:math:`\theta`, whatever the model.

References:
    Doucet, Pitt, Deligiannidis and Kohn (2015), table 1; Sherlock, Thiery, Roberts and Rosenthal (2015), section 4;
    Schmon, Deligiannidis, Doucet and Pitt (2021), a random walk with noise.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer import resampling
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey, Scalar
from probinfer.smc.conditional.gibbs import choose_path
from probinfer.smc.filtering.forward_pass import first_step, forward, next_step
from probinfer.smc.filtering.traces import log_evidence_of
from probinfer.smc.models.feynman_kac import as_batched
from probinfer.smc.parameters.model import Parameters, model_at

__all__ = [
    "MOST_PARTICLES",
    "Chosen",
    "Estimate",
    "choose_particles",
    "estimate",
    "extend",
    "run_to",
    "value",
]

LARGEST_VARIANCE = 1.5
LEAST_PARTICLES, MOST_PARTICLES = 8, 2**15
_REPEATS = 64  # the relative error of a variance from so many is sqrt(2 / 63) = 0.18
_ROUNDS = 4


class Estimate(NamedTuple):
    """Of one particle filter: the log evidence, minus infinity where undefined, and a path or None."""

    log_evidence: Array
    undefined: Array  # a log weight was NaN or plus infinity
    path: ArrayTree


class Chosen(NamedTuple):
    """A number of particles, and the variance of the log evidence that was measured with it."""

    num_particles: int
    variance: Array
    num_filters: int


def estimate(
    key: PRNGKey,
    target: Parameters,
    position: Float[Array, " d"],
    num_particles: int,
    keep_path: bool = False,
) -> Estimate:
    """Run a particle filter at a position.

    Args:
        key: random key.
        target: parameters and models.
        position: unconstrained.
        num_particles: N.
        keep_path: draw one path by the final weights; T N records are then kept for the length of the filter.
    """
    key_filter, key_path = jax.random.split(key)
    model = as_batched(model_at(target, position))
    keep = "paths" if keep_path else "none"
    sweep = forward(key_filter, model, resampling.adaptive(), None, target.num_steps, num_particles, keep)
    path = choose_path(key_path, sweep) if keep_path else None
    return Estimate(*_defined(sweep.log_evidence.astype(position.dtype), sweep.status), path)


def _defined(log_evidence: Array, status: Array) -> tuple[Array, Array]:
    undefined = status == int(Status.NON_FINITE)
    return jnp.where(status == int(Status.OK), log_evidence, -jnp.inf), undefined


def run_to(
    key: PRNGKey, target: Parameters, position: Float[Array, " d"], num_seen: Array, num_particles: int
) -> Any:
    """Run a filter over the first observations and return its state.

    Args:
        key: random key.
        target: parameters and models.
        position: unconstrained.
        num_seen: how many observations, 1 at least.
        num_particles: N.
    """
    model = as_batched(model_at(target, position))
    state = first_step(jax.random.fold_in(key, 0), model, num_particles, None)
    state = lax.fori_loop(
        1, num_seen, lambda t, state: _advance(model, state, t, jax.random.fold_in(key, t)), state
    )
    return _without_nan(state)


def extend(key: PRNGKey, target: Parameters, position: Float[Array, " d"], state: Any, t: Array) -> Any:
    """Take a filter one observation further.

    Args:
        key: random key.
        target: parameters and models.
        position: unconstrained.
        state: of the filter.
        t: number of the observation, from 0.
    """
    return _without_nan(_advance(as_batched(model_at(target, position)), state, t, key))


def value(state: Any) -> tuple[Scalar, Array]:
    """Return the log evidence of a filter's state, minus infinity where it failed, and whether it is undefined."""
    return _defined(log_evidence_of(state), state.status)


def _advance(model: Any, state: Any, t: Array, key: Array) -> Any:
    return next_step(model, resampling.adaptive(), None, False, "none", state, t, key)[0]


def _without_nan(state: Any) -> Any:
    """A filter that is undefined from the start has nothing to keep: zeros, which its status keeps from use."""
    lost = state.status == int(Status.NON_FINITE)
    blank = jax.tree.map(lambda leaf: jnp.where(lost, jnp.zeros_like(leaf), leaf), state)
    return blank._replace(status=state.status, stopped_at=state.stopped_at)


def choose_particles(
    key: PRNGKey, target: Parameters, position: Float[Array, " d"], num_particles: int
) -> Chosen:
    """Return the power of two with which the log evidence has a variance of at most 1.5 at a position.

    Args:
        key: random key.
        target: parameters and models.
        position: a central one.
        num_particles: where to start; a power of two.
    """
    filters, variance = 0, jnp.inf
    for one in jax.random.split(key, _ROUNDS):
        variance = _variance(one, target, position, num_particles)
        filters += _REPEATS
        wanted = num_particles * float(variance) / LARGEST_VARIANCE
        wanted = (
            min(max(wanted, LEAST_PARTICLES), MOST_PARTICLES) if math.isfinite(wanted) else 4 * num_particles
        )
        nearest = min(2 ** math.ceil(math.log2(wanted)), MOST_PARTICLES)
        if nearest == num_particles:
            break
        num_particles = nearest
    else:
        variance = _variance(jax.random.fold_in(key, _ROUNDS), target, position, num_particles)
    return Chosen(num_particles, variance, filters)


@partial(jax.jit, static_argnames="num_particles")
def _variance(key: PRNGKey, target: Parameters, position: Array, num_particles: int) -> Array:
    """Infinite where a filter died."""
    keys = jax.random.split(key, _REPEATS)
    found = jax.vmap(lambda key: estimate(key, target, position, num_particles))(keys).log_evidence
    finite = jnp.all(jnp.isfinite(found))
    return jnp.where(finite, jnp.var(jnp.where(finite, found, 0), ddof=1), jnp.inf).astype(position.dtype)
