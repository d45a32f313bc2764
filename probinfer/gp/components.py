"""What the components of a fit say: each a model, and the sites that inference found for it.

Components are taken one after another, so that memory does not grow with their number. Known sites make a component
cheap: one factorisation instead of a search.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer.gp.assemble import at_sites
from probinfer.gp.condition import condition
from probinfer.linalg import safe_cholesky
from probinfer.types import Array, Float, Int

__all__ = ["functions", "joint", "leave_one_out", "marginals"]


@jax.jit
def marginals(
    inference: Any,
    components: Any,
    X: Float[Array, "N D"],
    y: Float[Array, " N"],
    chunks: Float[Array, "C B D"],
) -> tuple[Float[Array, "S M"], Float[Array, "S M"]]:
    """Means and variances of the latent function at M = C B new inputs, given in C chunks.

    Args:
        inference: the inference method.
        components: a model and its sites (None for exact inference), leaves ``(S, ...)``.
        X: training inputs.
        y: training outputs.
        chunks: the new inputs.
    """

    def one(component):
        mean, variance = jax.lax.map(_condition(inference, component, X, y).predict, chunks)
        return mean.ravel(), variance.ravel()

    return jax.lax.map(one, components)


@jax.jit
def joint(
    inference: Any, components: Any, X: Float[Array, "N D"], y: Float[Array, " N"], X_new: Float[Array, "M D"]
) -> tuple[Float[Array, " M"], Float[Array, "M M"]]:
    """Mean and covariance of the latent function at new inputs, over the mixture."""

    def add(total, counted):
        count, component = counted
        mean, covariance = _condition(inference, component, X, y).predict_joint(X_new)
        # Welford's update: no difference of large second moments.
        delta = mean - total[0]
        center = total[0] + delta / count
        return (center, total[1] + covariance + jnp.outer(delta, mean - center)), None

    num = jax.tree.leaves(components)[0].shape[0]
    zeros = jnp.zeros(X_new.shape[0], X.dtype)
    counts = jnp.arange(1, num + 1).astype(X.dtype)
    (mean, total), _ = jax.lax.scan(add, (zeros, jnp.outer(zeros, zeros)), (counts, components))
    return mean, total / num


@jax.jit
def functions(
    inference: Any,
    components: Any,
    X: Float[Array, "N D"],
    y: Float[Array, " N"],
    chosen: Int[Array, " K"],
    X_new: Float[Array, "M D"],
    noise: Float[Array, "K M"],
) -> Float[Array, "K M"]:
    """Latent functions at new inputs, each of the chosen component; NaN where a covariance could not be factored."""

    def one(arguments):
        index, normal = arguments
        component = jax.tree.map(lambda leaf: leaf[index], components)
        mean, covariance = _condition(inference, component, X, y).predict_joint(X_new)
        return mean + safe_cholesky(covariance)[0] @ normal

    return jax.lax.map(one, (chosen, noise))


@jax.jit
def leave_one_out(
    inference: Any, components: Any, X: Float[Array, "N D"], y: Float[Array, " N"]
) -> Float[Array, "S N"]:
    """Log densities of each training output given all others, of each component."""
    return jax.lax.map(lambda component: _condition(inference, component, X, y).log_loo, components)


def _condition(inference, component, X, y):
    model, sites = component
    if sites is None:
        return condition(model, X, y, inference)
    return at_sites(model, X, y, sites, inference.num_nodes)
