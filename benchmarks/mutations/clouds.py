"""Particle methods of the library on simulated data, each with at most one fault.

A fault is a wrapper around the library's own code: a resampling scheme around a scheme, a model around a model, a path
around a path. Each method gives draws, a transition, or both, and log estimates of the evidence from below (forward)
and, beginning at an exact draw of the posterior, from above (reverse), all minus the exact value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer import resampling, smc
from probinfer.smc.conditional.gibbs import gibbs_step
from probinfer.smc.tempered import levels
from probinfer.smc.tempered.bridge import PriorBridge

from . import state_space
from .models import DIMS, GAUSSIAN, NOISE, A, JointModel

__all__ = ["REVERSIBLE", "Cloud", "by_filter", "by_gibbs", "by_tempering"]

FILTER, DRAWS, GIBBS = 32, 512, 4  # particles: of an evidence, of a posterior, of a Gibbs step
CROWD = 128  # of an evidence where some are dead: all of them hardly ever
ISLAND, KEPT = 64, 31 * levels.CHAIN_LENGTH  # of a tempered evidence, of a tempered posterior of 31 draws
RISING = np.array([0.02, 0.06, 0.15, 0.35, 0.65, 1.0])
REFINE = 8
REVERSIBLE = ("genealogy", "backward")


class Cloud(NamedTuple):
    """One method, with at most one fault; read by the checks as a ``faults.Procedure``."""

    name: str
    model: JointModel
    description: str
    """Description of the fault."""
    estimates: Callable
    """(key, theta, x) -> (log forward, log reverse) estimate of the evidence, minus the exact one."""
    sample: Callable | None = None
    """(key, x, num) -> draws (num, d)."""
    transition: Callable | None = None
    """(key, theta, x) -> theta."""
    reversible: bool = True
    scheme: Callable | None = None
    """The resampling scheme, where it is what may be wrong."""
    init: None = None


def cut_of(model: JointModel) -> float | None:
    return state_space.CUT if model is state_space.WINDOW else None


def always(scheme: Any) -> resampling.Adaptive:
    """Resample by a scheme at each step."""
    return resampling.Adaptive(scheme=scheme, trigger=resampling.always())


# The particle filter


def by_filter(name: str, description: str, scheme: Any, model: JointModel = state_space.WALK) -> Cloud:
    """The particle filter with a resampling scheme; in reverse the library's conditional filter."""
    cut = cut_of(model)
    estimates, sample = partial(_filter_estimates, cut, scheme), partial(_filter_draws, cut, scheme)
    return Cloud(
        name=name, model=model, description=description, estimates=estimates, sample=sample, scheme=scheme
    )


def _filter_draws(cut, scheme, key, x, num):
    key_filter, key_choose = jax.random.split(key)
    fk = state_space.feynman_kac(cut, x)
    filtered = smc.particle_filter(key_filter, fk, state_space.STEPS, DRAWS, resampling=always(scheme))
    chosen = jax.random.categorical(key_choose, filtered.log_weights, shape=(num,))
    assert filtered.paths is not None
    return filtered.paths[chosen]


def _filter_estimates(cut, scheme, key, theta, x):
    key_forward, key_reverse = jax.random.split(key)
    fk = state_space.feynman_kac(cut, x)
    num = FILTER if cut is None else CROWD
    forward = smc.particle_filter(
        key_forward, fk, state_space.STEPS, num, resampling=always(scheme), store="none"
    )
    reverse = smc.conditional_filter(
        key_reverse, fk, theta, num, resampling=always("systematic"), store="none"
    )
    exact = state_space.log_evidence(cut, x)
    return forward.log_evidence - exact, reverse.log_evidence - exact


# Particle Gibbs


def by_gibbs(
    name: str,
    description: str,
    scheme: Any,
    path_update: str,
    wrap: Callable = lambda model: model,
    model=state_space.WALK,
) -> Cloud:
    """Particle Gibbs with a conditional scheme and a wrapped model; forward the library's particle filter."""
    cut = cut_of(model)
    step = partial(_gibbs_transition, cut, scheme, path_update, wrap)
    estimates = partial(_gibbs_estimates, cut, scheme, path_update, wrap)
    return Cloud(
        name=name,
        model=model,
        description=description,
        estimates=estimates,
        transition=step,
        reversible=path_update in REVERSIBLE,
    )


def _gibbs(cut, scheme, path_update, wrap, key, theta, x, num):
    model = wrap(smc.lift(state_space.feynman_kac(cut, x)))
    return gibbs_step(key, model, always(scheme), theta, num, path_update)


def _gibbs_transition(cut, scheme, path_update, wrap, key, theta, x):
    return _gibbs(cut, scheme, path_update, wrap, key, theta, x, GIBBS)[0]


def _gibbs_estimates(cut, scheme, path_update, wrap, key, theta, x):
    key_forward, key_reverse = jax.random.split(key)
    fk = state_space.feynman_kac(cut, x)
    forward = smc.particle_filter(
        key_forward, fk, state_space.STEPS, FILTER, resampling=always("systematic"), store="none"
    )
    reverse = _gibbs(cut, scheme, path_update, wrap, key_reverse, theta, x, FILTER)[1]
    exact = state_space.log_evidence(cut, x)
    return forward.log_evidence - exact, reverse.log_evidence - exact


# Tempered SMC, on the Gaussian model


def by_tempering(
    name: str, description: str, wrap: Callable = lambda path: path, temperatures: np.ndarray = RISING
) -> Cloud:
    """Tempered SMC along a frozen schedule; in reverse annealing along the same."""
    return Cloud(
        name=name,
        model=GAUSSIAN,
        description=description,
        estimates=partial(_tempered_estimates, wrap, tuple(temperatures)),
        sample=partial(_tempered_draws, wrap, tuple(temperatures)),
    )


def schedule_of(temperatures) -> levels.Schedule:
    """Covariances of the Gaussian model's posterior at each temperature, and a step size of 0.9."""
    roots = [np.linalg.cholesky(np.linalg.inv(np.eye(DIMS) + t * A.T @ A / NOISE**2)) for t in temperatures]
    count = len(temperatures)
    return levels.Schedule(
        jnp.asarray(temperatures), jnp.asarray(roots), jnp.full(count, 0.9), jnp.int32(count)
    )


def prior_path(x) -> PriorBridge:
    ratio = jax.tree_util.Partial(_likelihood, x)
    as_partial = jax.tree_util.Partial
    return PriorBridge(
        as_partial(GAUSSIAN.prior_sample), as_partial(GAUSSIAN.log_prior), ratio, jnp.zeros(DIMS), False
    )


def _likelihood(x, theta):
    return GAUSSIAN.log_likelihood(theta, x)


def _tempered(wrap, temperatures, key, x, num):
    settings = levels.TemperingSettings(jnp.asarray(0.5), True, "vmap")
    algorithm = levels.tempering(wrap(prior_path(x)), settings)
    keys = jax.random.split(key, len(temperatures) + 1)
    schedule, keep = schedule_of(temperatures), jnp.asarray(False)
    state = levels.init_population(algorithm, keys[0], schedule, keep, num_particles=num)
    return jax.lax.scan(lambda state, key: (algorithm.step(key, state)[0], None), state, keys[1:])[0]


def _tempered_draws(wrap, temperatures, key, x, num):
    """Return the last state of each chain of moves."""
    state = _tempered(wrap, temperatures, key, x, KEPT)
    last = state.positions[levels.CHAIN_LENGTH - 1 :: levels.CHAIN_LENGTH]
    assert len(last) == num
    return last


def _tempered_estimates(wrap, temperatures, key, theta, x):
    key_forward, key_reverse = jax.random.split(key)
    forward = _tempered(wrap, temperatures, key_forward, x, ISLAND).log_evidence
    schedule = schedule_of(temperatures)
    zero_index = jnp.int32(0)
    frozen = smc.Annealing(wrap(prior_path(x)), schedule, zero_index, zero_index, refine=REFINE, mode="vmap")
    covariance = A @ A.T + NOISE**2 * np.eye(DIMS)
    # the likelihood of the model leaves out the constant of the noise
    exact = -0.5 * x @ np.linalg.solve(covariance, np.eye(DIMS)) @ x
    exact += -0.5 * np.linalg.slogdet(covariance)[1] + DIMS * np.log(NOISE)
    return forward - exact, frozen.reverse(theta[None])(key_reverse) - exact
