"""Adaptive tempered SMC of blackjax with HMC, tuned in two ways, for ``smc_tempered.py``."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.smc import adaptive_tempered, resampling
from blackjax.smc.base import extend_params

from probinfer.numerics import weights

__all__ = ["Peer"]

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
    """Tune HMC: covariance of the weighted particles as metric, trajectories of a quarter period."""
    covariance = weights.covariance(jnp.log(state.weights), state.particles)
    jitter = 1e-6 * jnp.diag(jnp.diag(covariance))
    return covariance + jitter, size


def _pilots(schedule, state):
    """Return metric and step size of our pilot at the level with the nearest temperature."""
    far = jnp.abs(schedule.temperatures - state.tempering_param)
    far = jnp.where(jnp.arange(len(far)) < schedule.num_levels, far, jnp.inf)
    # nothing was learned at temperature zero: the first level stands for it
    level = jnp.argmin(far)
    factor = schedule.factors[level]
    return factor @ factor.T, schedule.step_sizes[level]


@partial(jax.jit, static_argnames=("num_moves", "num"))
def _run(path, schedule, own, ess, size, key, *, num_moves, num):
    """Return log evidence, mean, number of levels, leapfrog steps of all moves, and acceptance rate."""
    kernel = _kernel(path, ess)
    key_draw, key_steps = jax.random.split(key)
    particles = jax.vmap(path.sample)(jax.random.split(key_draw, num))

    def unfinished(carry):
        return (carry[0].tempering_param < 1) & (carry[2] < _ROOM)

    def step(carry):
        state, log_evidence, level, leapfrogs, rates = carry
        metric, step_size = jax.lax.cond(own, lambda: _own(state, size), lambda: _pilots(schedule, state))
        count = jnp.clip(jnp.ceil(0.5 * math.pi / step_size), 1, 100).astype(jnp.int32)
        parameters = extend_params(
            {"step_size": step_size, "inverse_mass_matrix": metric, "num_integration_steps": count}
        )
        state, info = kernel(jax.random.fold_in(key_steps, level), state, num_moves, parameters)
        rate = jnp.mean(info.update_info.acceptance_rate)
        return state, log_evidence + info.log_likelihood_increment, level + 1, leapfrogs + count, rates + rate

    zero_evidence = jnp.zeros(())
    first = adaptive_tempered.init(particles)
    first = first._replace(tempering_param=zero_evidence)
    state, log_evidence, levels, leapfrogs, rates = jax.lax.while_loop(
        unfinished, step, (first, zero_evidence, jnp.int32(0), jnp.int32(0), zero_evidence)
    )
    return (
        log_evidence,
        state.weights @ state.particles,
        levels,
        leapfrogs,
        rates / levels,
        state.tempering_param,
    )


class Peer:
    """One target. A compiled program for each number of moves; tuning and target ESS are data."""

    def __init__(self, path: Any, schedule: Any, num: int):
        self.path, self.schedule, self.num = path, schedule, num
        sizes = np.array(_SIZES) * schedule.locs.shape[1] ** -0.25
        rates = [float(self._call(True, 0.5, 3, size, 7)[4]) for size in sizes]
        self.step_size = float(sizes[int(np.argmin(np.abs(np.array(rates) - 0.8)))])

    def _call(self, own: bool, ess: float, num_moves: int, size: float, seed: int):
        key = jax.random.key(seed)
        return _run(self.path, self.schedule, own, ess, float(size), key, num_moves=num_moves, num=self.num)

    def way(self, tuning: str, ess: float, num_moves: int):
        """Seed -> (log evidence, mean, gradients, densities, None).

        Args:
            tuning: "own" or "pilot".
            ess: target, as a fraction.
            num_moves: a level.
        """

        def run(seed):
            log_evidence, mean, levels, leapfrogs, _, reached = self._call(
                tuning == "own", ess, num_moves, self.step_size, 2000 + seed
            )
            if reached < 1:
                raise RuntimeError(f"not at the target after {_ROOM} levels")
            gradients = self.num * (num_moves * int(leapfrogs) + int(levels))
            return float(log_evidence), np.asarray(mean), gradients, 2 * self.num * int(levels), None

        return run
