"""Predictions of the components of a fit: each is a model, and its sites.

Components are processed one after another, so that memory does not grow with their number. With known sites a component
costs one factorization instead of a search; a conditioned component, which has its factor, costs even less.
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

__all__ = ["UnconditionedComponents", "conditioned", "functions", "joint", "leave_one_out", "marginals"]


@pytree
class UnconditionedComponents:
    """Components that are conditioned when needed; functions take a stack of conditioned ones as well.

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
def marginals(components: Any, chunks: Float[Array, "C B D"]) -> LatentMoments:
    """Moments ``(S, M)`` of the latent function at M = C B new inputs.

    Args:
        components: ``UnconditionedComponents``, or a stack of conditioned components.
        chunks: the new inputs.
    """

    def predict_one(component):
        moments = jax.lax.map(_ensure_conditioned(components, component).predict, chunks)
        return jax.tree.map(jnp.ravel, moments)

    return jax.lax.map(predict_one, _stack(components))


@jax.jit
def joint(
    components: Any, X_new: Float[Array, "M D"]
) -> tuple[Float[Array, " M"], Float[Array, "M M"], Float[Array, " M"]]:
    """Mean and covariance of the latent function at new inputs under the mixture, and the floor of its variances."""

    def accumulate(totals, numbered):
        count, component = numbered
        conditioned = _ensure_conditioned(components, component)
        mean, covariance = conditioned.predict_joint(X_new)
        # Welford's update avoids a difference of large second moments.
        delta = mean - totals[0]
        center = totals[0] + delta / count
        covariance = totals[1] + covariance + jnp.outer(delta, mean - center)
        return (center, covariance, totals[2] + conditioned.predict(X_new).floor), None

    stack = _stack(components)
    num = jax.tree.leaves(stack)[0].shape[0]
    zeros = jnp.zeros(X_new.shape[0], X_new.dtype)
    counts = jnp.arange(1, num + 1).astype(X_new.dtype)
    totals = zeros, jnp.outer(zeros, zeros), zeros
    (mean, covariance, floor), _ = jax.lax.scan(accumulate, totals, (counts, stack))
    return mean, covariance / num, floor / num


@jax.jit
def functions(
    components: Any, chosen: Int[Array, " K"], X_new: Float[Array, "M D"], noise: Float[Array, "K M"]
) -> Float[Array, "K M"]:
    """Latent functions at new inputs, each from its chosen component, with one factorization per component."""
    stack = _stack(components)
    if jax.tree.leaves(stack)[0].shape[0] > len(chosen):  # skip components that were not chosen
        stack = jax.tree.map(lambda leaf: leaf[chosen], stack)
        chosen = jnp.arange(len(chosen))

    def draw(functions, numbered):
        index, component = numbered
        mean, covariance = _ensure_conditioned(components, component).predict_joint(X_new)
        from_component = mean + noise @ semidefinite_factor(covariance).T
        return jnp.where(chosen[:, None] == index, from_component, functions), None

    num = jax.tree.leaves(stack)[0].shape[0]
    return jax.lax.scan(draw, jnp.zeros_like(noise), (jnp.arange(num), stack))[0]


@jax.jit
def leave_one_out(
    inference: Any, components: Any, X: Float[Array, "N D"], y: Float[Array, " N"]
) -> Float[Array, "S N"]:
    """Log densities of each training output given all others, under each component."""
    return jax.lax.map(lambda component: _condition(inference, component, X, y).log_loo, components)


def _stack(components):
    return components.components if isinstance(components, UnconditionedComponents) else components


def _ensure_conditioned(components, component):
    if not isinstance(components, UnconditionedComponents):
        return component
    return _condition(components.inference, component, components.X, components.y)


def _for_prediction(conditioned):
    unused = ("mean", "variance", "precision_diagonal", "log_evidence", "log_loo")
    return dataclasses.replace(conditioned, **dict.fromkeys(unused))


def _condition(inference, component, X, y):
    model, sites = component
    if sites is None:
        return condition(model, X, y, inference)
    return at_sites(model, X, y, sites, inference.num_nodes)
