"""Faults of coin samplers: the library's SVGD with one error in its direction, metric, density or length."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from probinfer import coin
from probinfer.coin.cloud_descent import descent
from probinfer.coin.stein_descent import svgd_direction
from probinfer.core.binding import LogDensity
from probinfer.core.types import pytree
from probinfer.kernels import RBF

from .faults import Procedure
from .models import COUNTS, GAUSSIAN, JointModel

__all__ = ["COIN_FAULTS", "COIN_NULLS"]

NUM_STEPS, EARLY = 150, 12
NEAR = 0.5**0.5  # the lengthscale of exp(-r²/h)


# Directions


def no_repulsion(kernel, z, scores, keep, score_fn):
    """Attraction without the gradient of the kernel."""
    repulsion = svgd_direction(kernel, z, jnp.zeros_like(scores), keep, score_fn)
    return svgd_direction(kernel, z, scores, keep, score_fn) - repulsion


def attraction_twice(kernel, z, scores, keep, score_fn):
    """The sign of the gradient of the kernel is wrong."""
    repulsion = svgd_direction(kernel, z, jnp.zeros_like(scores), keep, score_fn)
    return svgd_direction(kernel, z, scores, keep, score_fn) - 2 * repulsion


def strong_repulsion(kernel, z, scores, keep, score_fn):
    """The factor 2 of 2 / h is applied twice."""
    repulsion = svgd_direction(kernel, z, jnp.zeros_like(scores), keep, score_fn)
    return svgd_direction(kernel, z, scores, keep, score_fn) + repulsion


@pytree
class Unpulled:
    """A metric that does not transform the scores to its coordinates."""

    restarts = True

    def start(self, table, keep):
        return coin.Full().start(table, keep)

    def refresh(self, metric, z, keep):
        return coin.Full().refresh(metric, z, keep)

    def from_z(self, metric, z):
        return coin.Full().from_z(metric, z)

    def pullback(self, metric, scores):
        del metric
        return scores


# Densities


def log_joint(model: JointModel, power: float, x, theta):
    return model.log_prior(theta) + power * model.log_likelihood(theta, x)


def without_prior(model: JointModel, x, theta):
    return model.log_likelihood(theta, x)


def without_jacobian(x, u):
    return COUNTS.log_joint(x, u) - jnp.sum(u)


# Procedures


def particles(
    model: JointModel,
    density: Any,
    direction: Any,
    num_steps: int,
    geometry: Any,
    bandwidth: str,
    key,
    x,
    num: int,
):
    """Run a number of particles from the prior for a number of steps; return them in random order."""
    key_start, key_steps, key_order = jax.random.split(key, 3)
    start = jax.vmap(model.prior_sample)(jax.random.split(key_start, num))
    carried = descent(LogDensity(density, x), direction, RBF(lengthscale=NEAR), geometry, bandwidth=bandwidth)

    def step(state, key):
        return carried.step(key, state)[0], None

    state, _ = jax.lax.scan(step, carried.init(start), jax.random.split(key_steps, num_steps))
    return jax.random.permutation(key_order, state.positions)


def _coin(
    name: str,
    description: str,
    model: JointModel = GAUSSIAN,
    *,
    density: Any = None,
    direction: Any = svgd_direction,
    num_steps: int = NUM_STEPS,
    geometry: Any = None,
    bandwidth: str = "median",
) -> Procedure:
    density = partial(log_joint, model, 1.0) if density is None else density
    sample = partial(particles, model, density, direction, num_steps, geometry, bandwidth)

    def transition(key, theta, x):
        return sample(key, x, 2)[0]

    return Procedure(
        name=name, model=model, sample=sample, transition=transition, init=None, description=description
    )


COIN_NULLS = (
    _coin("coin, gaussian", "as it should be"),
    _coin("coin, counts", "as it should be", COUNTS),
)

COIN_FAULTS = (
    _coin("no repulsion", "the gradient of the kernel is left out", direction=no_repulsion),
    _coin("repulsion attracts", "the gradient of the kernel has the wrong sign", direction=attraction_twice),
    _coin("repulsion doubled", "the gradient of the kernel counts twice", direction=strong_repulsion),
    _coin("scores not pulled", "scores in x with distances in z", geometry=Unpulled()),
    _coin("published bandwidth", "the median over log(N + 1)", bandwidth="published"),
    _coin("stopped early", f"{EARLY} steps from the prior", num_steps=EARLY),
    _coin("no prior", "the score of the likelihood alone", density=partial(without_prior, GAUSSIAN)),
    _coin("half a batch", "half of the likelihood, not rescaled", density=partial(log_joint, GAUSSIAN, 0.5)),
    _coin("missing Jacobian", "log rates without the Jacobian of the log", COUNTS, density=without_jacobian),
)
