"""Adaptive tempered SMC of blackjax with HMC, tuned in two ways, for ``smc_tempered.py``."""

from __future__ import annotations

import math
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.smc import adaptive_tempered, resampling
from blackjax.smc.base import extend_params

from probinfer import weights

__all__ = ["affordable", "peer", "tuned_step"]

_SIZES = (0.4, 0.7, 1.0, 1.3)  # times d^-1/4, in units of the cloud
_ROOM = 400  # levels


def _kernel(path, ess: float):
    return adaptive_tempered.build_kernel(
        lambda u: path.terms(u)[0],
        lambda u: path.terms(u)[1],
        blackjax.hmc.build_kernel(),
        blackjax.hmc.init,
        resampling.systematic,
        ess,
    )


def _own(state, size):
    """Metric: the covariance of the weighted particles; trajectories of a quarter period."""
    covariance = weights.covariance(jnp.log(state.weights), state.particles)
    least = 1e-6 * jnp.diag(jnp.diag(covariance))
    return covariance + least, size


def _pilots(schedule, state):
    """Metric and step size of our pilot at the level whose temperature is nearest."""
    far = jnp.abs(schedule.temperatures - state.tempering_param)
    far = jnp.where(jnp.arange(len(far)) < schedule.num_levels, far, jnp.inf)
    # nothing was learned at temperature zero: the first level stands for it
    level = jnp.argmin(far)
    root = schedule.roots[level]
    return root @ root.T, schedule.step_sizes[level]


def _run(path, schedule, tuning, ess, num_moves, num, size, key):
    """Log evidence, mean, levels, leapfrogs of all moves, acceptance."""
    kernel = _kernel(path, ess)
    key_draw, key_steps = jax.random.split(key)
    particles = jax.vmap(path.sample)(jax.random.split(key_draw, num))

    def unfinished(carry):
        return (carry[0].tempering_param < 1) & (carry[2] < _ROOM)

    def step(carry):
        state, log_evidence, level, leapfrogs, rates = carry
        metric, step_size = _own(state, size) if tuning == "own" else _pilots(schedule, state)
        count = jnp.clip(jnp.ceil(0.5 * math.pi / step_size), 1, 100).astype(jnp.int32)
        parameters = extend_params(
            {"step_size": step_size, "inverse_mass_matrix": metric, "num_integration_steps": count}
        )
        state, info = kernel(jax.random.fold_in(key_steps, level), state, num_moves, parameters)
        rate = jnp.mean(info.update_info.acceptance_rate)
        return state, log_evidence + info.log_likelihood_increment, level + 1, leapfrogs + count, rates + rate

    zero = jnp.zeros(())
    first = adaptive_tempered.init(particles)
    first = first._replace(tempering_param=zero)
    state, log_evidence, levels, leapfrogs, rates = jax.lax.while_loop(
        unfinished, step, (first, zero, jnp.int32(0), jnp.int32(0), zero)
    )
    return (
        log_evidence,
        state.weights @ state.particles,
        levels,
        leapfrogs,
        rates / levels,
        state.tempering_param,
    )


def peer(path: Any, schedule: Any, tuning: str, ess: float, num_moves: int, num: int, size: float):
    """Seed -> (log evidence, mean, gradients, densities, None).

    Args:
        path: from prior to posterior.
        schedule: of our pilot.
        tuning: "own" or "pilot".
        ess: target, as a fraction.
        num_moves: a level.
        num: particles.
        size: its own step size.
    """
    compiled = jax.jit(lambda key: _run(path, schedule, tuning, ess, num_moves, num, size, key))

    def run(seed):
        log_evidence, mean, levels, leapfrogs, _, reached = compiled(jax.random.key(2000 + seed))
        if reached < 1:
            raise RuntimeError(f"not at the target after {_ROOM} levels")
        gradients = num * (num_moves * int(leapfrogs) + int(levels))
        return float(log_evidence), np.asarray(mean), gradients, 2 * num * int(levels), None

    return run


def affordable(budget: float, schedule: Any, tuning: str, ess: float, num_moves: int, size: float) -> int:
    """How many particles cost about a budget of evaluations: three times the levels of our pilot at ESS 0.9.

    A relative variance v of the factors leaves ESS 1 / (1 + v): 1 at ESS 0.5, a ninth at 0.9, so a third of the rise.
    """
    levels = int(schedule.num_levels)
    sizes = np.full(levels, size) if tuning == "own" else np.asarray(schedule.step_sizes[:levels])
    leapfrogs = float(np.mean(np.clip(np.ceil(0.5 * math.pi / sizes), 1, 100)))
    steps = levels * (1 if ess == 0.5 else 3) * (num_moves * leapfrogs + 3)
    return int(np.clip(budget / steps, 64, 20_000))


def tuned_step(case: Any, path: Any, num: int) -> float:
    """The step size of four whose acceptance is nearest to 0.8, by one run of each."""
    compiled = jax.jit(lambda size, key: _run(path, None, "own", 0.5, 3, num, size, key)[4])
    sizes = np.array(_SIZES) * len(case.mean) ** -0.25
    rates = [float(compiled(size, jax.random.key(7))) for size in sizes]
    return float(sizes[int(np.argmin(np.abs(np.array(rates) - 0.8)))])
