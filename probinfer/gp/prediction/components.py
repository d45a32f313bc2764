"""What the components of a fit say: each a model, and the sites that inference found for it.

Components are taken one after another, so that memory does not grow with their number. Known sites make a component
cheap, one factorisation instead of a search; a conditioned component, whose factor was kept, cheaper still.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, Int, pytree
from probinfer.gp.approximation.assembly import at_sites
from probinfer.gp.approximation.conditioning import condition
from probinfer.gp.prediction import LatentMoments
from probinfer.numerics.semidefinite import semidefinite_factor

__all__ = ["Given", "conditioned", "functions", "joint", "leave_one_out", "marginals"]


@pytree
class Given:
    """Components that are conditioned where they are needed; a stack of conditioned ones may stand in its place.

    Attributes:
        inference: the inference method.
        components: a model and its sites (None for exact inference), leaves ``(S, ...)``.
        X: training inputs ``(N, D)``.
        y: training outputs ``(N,)``.
    """

    inference: Any
    components: Any
    X: Any
    y: Any


@jax.jit
def conditioned(inference: Any, components: Any, X: Float[Array, "N D"], y: Float[Array, " N"]) -> Any:
    """Every component conditioned on the data, with what prediction needs: leaves ``(S, ...)``."""
    return jax.lax.map(lambda component: _for_prediction(_condition(inference, component, X, y)), components)


@jax.jit
def marginals(given: Any, chunks: Float[Array, "C B D"]) -> LatentMoments:
    """Moments ``(S, M)`` of the latent function at M = C B new inputs.

    Args:
        given: ``Given``, or a stack of conditioned components.
        chunks: the new inputs.
    """

    def one(component):
        found = jax.lax.map(_ready(given, component).predict, chunks)
        return jax.tree.map(jnp.ravel, found)

    return jax.lax.map(one, _stack(given))


@jax.jit
def joint(
    given: Any, X_new: Float[Array, "M D"]
) -> tuple[Float[Array, " M"], Float[Array, "M M"], Float[Array, " M"]]:
    """Mean and covariance of the latent function at new inputs over the mixture, and the floor of its variances."""

    def add(total, counted):
        count, component = counted
        ready = _ready(given, component)
        mean, covariance = ready.predict_joint(X_new)
        # Welford's update: no difference of large second moments.
        delta = mean - total[0]
        center = total[0] + delta / count
        covariance = total[1] + covariance + jnp.outer(delta, mean - center)
        return (center, covariance, total[2] + ready.predict(X_new).floor), None

    components = _stack(given)
    num = jax.tree.leaves(components)[0].shape[0]
    zeros = jnp.zeros(X_new.shape[0], X_new.dtype)
    counts = jnp.arange(1, num + 1).astype(X_new.dtype)
    (mean, total, floor), _ = jax.lax.scan(add, (zeros, jnp.outer(zeros, zeros), zeros), (counts, components))
    return mean, total / num, floor / num


@jax.jit
def functions(
    given: Any, chosen: Int[Array, " K"], X_new: Float[Array, "M D"], noise: Float[Array, "K M"]
) -> Float[Array, "K M"]:
    """Latent functions at new inputs, each of the chosen component; one factorisation a component."""
    components = _stack(given)
    if jax.tree.leaves(components)[0].shape[0] > len(chosen):  # only those that were chosen
        components = jax.tree.map(lambda leaf: leaf[chosen], components)
        chosen = jnp.arange(len(chosen))

    def draw(drawn, counted):
        index, component = counted
        mean, covariance = _ready(given, component).predict_joint(X_new)
        of_this = mean + noise @ semidefinite_factor(covariance).T
        return jnp.where(chosen[:, None] == index, of_this, drawn), None

    num = jax.tree.leaves(components)[0].shape[0]
    return jax.lax.scan(draw, jnp.zeros_like(noise), (jnp.arange(num), components))[0]


@jax.jit
def leave_one_out(
    inference: Any, components: Any, X: Float[Array, "N D"], y: Float[Array, " N"]
) -> Float[Array, "S N"]:
    """Log densities of each training output given all others, of each component."""
    return jax.lax.map(lambda component: _condition(inference, component, X, y).log_loo, components)


def _stack(given):
    return given.components if isinstance(given, Given) else given


def _ready(given, component):
    return _condition(given.inference, component, given.X, given.y) if isinstance(given, Given) else component


def _for_prediction(found):
    unused = ("mean", "variance", "precision_diagonal", "log_evidence", "log_loo")
    return dataclasses.replace(found, **dict.fromkeys(unused))


def _condition(inference, component, X, y):
    model, sites = component
    if sites is None:
        return condition(model, X, y, inference)
    return at_sites(model, X, y, sites, inference.num_nodes)
