r"""The likelihood of parameters, estimated by a particle filter, and how many particles the estimate needs.

Markov chains that use :math:`\hat Z(\theta)` in place of the likelihood cost N a step and slow down as the variance
of :math:`\log\hat Z` grows, which falls as 1 / N. The best compromise is near a variance of 1 to 1.5 at a central
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
from probinfer.core.types import Array, ArrayTree, Bool, Float, PRNGKey, Scalar
from probinfer.smc.conditional.gibbs import choose_path
from probinfer.smc.filtering.forward_pass import first_step, forward, next_step
from probinfer.smc.filtering.traces import log_evidence_of
from probinfer.smc.models.feynman_kac import as_batched
from probinfer.smc.parameters.model import Parameters, model_at

__all__ = [
    "MAX_PARTICLES",
    "MIN_PARTICLES",
    "LikelihoodEstimate",
    "ParticleNumber",
    "choose_num_particles",
    "estimate_likelihood",
    "extend_filter",
    "filter_log_evidence",
    "run_filter",
]

MAX_VARIANCE = 1.5
MIN_PARTICLES, MAX_PARTICLES = 8, 2**15
_NUM_FILTERS = 64  # the relative error of their variance is sqrt(2 / 63) = 0.18
_MAX_ROUNDS = 4


class LikelihoodEstimate(NamedTuple):
    r"""Estimate by one particle filter.

    Attributes:
        log_evidence: :math:`\log\hat Z(\theta)`; minus infinity if the filter died or is undefined.
        undefined: whether a log weight was NaN or plus infinity.
        path: one path, leaves (T, ...), or None.
    """

    log_evidence: Float[Array, ""]
    undefined: Bool[Array, ""]
    path: ArrayTree


class ParticleNumber(NamedTuple):
    """A number of particles.

    Attributes:
        num_particles: N.
        variance: of the log evidence with N particles, as measured.
        num_filters: filters run to find N.
    """

    num_particles: int
    variance: Float[Array, ""]
    num_filters: int


def estimate_likelihood(
    key: PRNGKey,
    target: Parameters,
    position: Float[Array, " d"],
    num_particles: int,
    keep_path: bool = False,
) -> LikelihoodEstimate:
    """Run a particle filter at a position.

    Args:
        key: random key.
        target: parameters and models.
        position: unconstrained.
        num_particles: N.
        keep_path: draw one path by the final weights; the filter then stores T N records.
    """
    key_filter, key_path = jax.random.split(key)
    model = as_batched(model_at(target, position))
    keep = "paths" if keep_path else "none"
    sweep = forward(key_filter, model, resampling.adaptive(), None, target.num_steps, num_particles, keep)
    path = choose_path(key_path, sweep) if keep_path else None
    log_evidence, undefined = _replace_failed(sweep.log_evidence.astype(position.dtype), sweep.status)
    return LikelihoodEstimate(log_evidence, undefined, path)


def _replace_failed(log_evidence: Array, status: Array) -> tuple[Array, Array]:
    """Return minus infinity for a filter that failed, and whether it is undefined."""
    undefined = status == int(Status.NON_FINITE)
    return jnp.where(status == int(Status.OK), log_evidence, -jnp.inf), undefined


def run_filter(
    key: PRNGKey, target: Parameters, position: Float[Array, " d"], num_observed: Array, num_particles: int
) -> Any:
    """Run a filter over the first observations and return its state.

    Args:
        key: random key.
        target: parameters and models.
        position: unconstrained.
        num_observed: number of observations, 1 or more.
        num_particles: N.
    """
    model = as_batched(model_at(target, position))
    state = first_step(jax.random.fold_in(key, 0), model, num_particles, None)
    state = lax.fori_loop(
        1, num_observed, lambda t, state: _advance(model, state, t, jax.random.fold_in(key, t)), state
    )
    return _without_nan(state)


def extend_filter(
    key: PRNGKey, target: Parameters, position: Float[Array, " d"], state: Any, t: Array
) -> Any:
    """Advance a filter by one observation.

    Args:
        key: random key.
        target: parameters and models.
        position: unconstrained.
        state: of the filter.
        t: index of the observation, from 0.
    """
    return _without_nan(_advance(as_batched(model_at(target, position)), state, t, key))


def filter_log_evidence(state: Any) -> tuple[Scalar, Array]:
    """Return the log evidence of a filter's state, minus infinity if it failed, and whether it is undefined."""
    return _replace_failed(log_evidence_of(state), state.status)


def _advance(model: Any, state: Any, t: Array, key: Array) -> Any:
    return next_step(model, resampling.adaptive(), None, False, "none", state, t, key)[0]


def _without_nan(state: Any) -> Any:
    """Set an undefined filter to zeros: NaN would stop the loop, and the status prevents the use of the zeros."""
    undefined = state.status == int(Status.NON_FINITE)
    zeroed = jax.tree.map(lambda leaf: jnp.where(undefined, jnp.zeros_like(leaf), leaf), state)
    return zeroed._replace(status=state.status, stopped_at=state.stopped_at)


def choose_num_particles(
    key: PRNGKey, target: Parameters, position: Float[Array, " d"], num_particles: int
) -> ParticleNumber:
    """Return the power of two for which the log evidence has a variance of at most 1.5 at a position.

    Args:
        key: random key.
        target: parameters and models.
        position: a central one.
        num_particles: first number to try; a power of two.
    """
    num_filters, variance = 0, jnp.inf
    for round_key in jax.random.split(key, _MAX_ROUNDS):
        variance = _variance(round_key, target, position, num_particles)
        num_filters += _NUM_FILTERS
        # The variance is proportional to 1 / N. It is infinite if a filter died: try four times as many particles.
        required = num_particles * float(variance) / MAX_VARIANCE
        required = (
            min(max(required, MIN_PARTICLES), MAX_PARTICLES) if math.isfinite(required) else 4 * num_particles
        )
        power_of_two = min(2 ** math.ceil(math.log2(required)), MAX_PARTICLES)
        if power_of_two == num_particles:
            break
        num_particles = power_of_two
    else:
        variance = _variance(jax.random.fold_in(key, _MAX_ROUNDS), target, position, num_particles)
    return ParticleNumber(num_particles, variance, num_filters)


@partial(jax.jit, static_argnames="num_particles")
def _variance(key: PRNGKey, target: Parameters, position: Array, num_particles: int) -> Array:
    """Return the variance of the log evidence; infinity if a filter died."""
    keys = jax.random.split(key, _NUM_FILTERS)
    estimates = jax.vmap(lambda key: estimate_likelihood(key, target, position, num_particles))(keys)
    log_evidences = estimates.log_evidence
    finite = jnp.all(jnp.isfinite(log_evidences))
    variance = jnp.var(jnp.where(finite, log_evidences, 0), ddof=1)
    return jnp.where(finite, variance, jnp.inf).astype(position.dtype)
