"""Conditioning a Gaussian process on data, by any inference method."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.identity import refresh_classes
from probinfer.core.types import Array, Float, Int
from probinfer.gp.approximation.conditioned import Conditioned, failed
from probinfer.gp.approximation.conjugate import Exact
from probinfer.gp.approximation.iterative import EP, VI
from probinfer.gp.approximation.sites import Sites
from probinfer.gp.approximation.updates import first_sites
from probinfer.gp.model.model import Model, cast
from probinfer.gp.model.validation import check_data, check_outputs

__all__ = [
    "SiteSolutions",
    "condition",
    "condition_many",
    "default_inference",
    "log_evidence",
    "reference_sites",
]

_MAX_SINGLE = 16  # up to this many hyperparameter values reuse the program compiled for one


def condition(
    model: Model,
    X: Any,
    y: Any,
    inference: Any = None,
    *,
    sites: Sites | None = None,
) -> Conditioned:
    """Condition a Gaussian process on data: p(f | X, y, hyperparameters).

    Args:
        model: kernel, likelihood and mean; its hyperparameters take the dtype of ``X``.
        X: inputs ``(N, D)``, floating point.
        y: outputs ``(N,)`` of the same dtype; classes and counts may be integers or truth values.
        inference: ``gp.Exact()``, ``gp.Laplace()``, ``gp.EP()``, ``gp.VI()`` or ``gp.Hybrid()``. The default is exact
            for a Gaussian likelihood, EP for another log-concave one, and VI for the rest.
        sites: start of an iterative method; by default the sites of each output alone, under the prior.

    Returns:
        The conditioned process; its ``status`` says whether the numbers can be trusted.

    Raises:
        TypeError: ``X`` or ``y`` is not floating point, or their dtypes differ.
        ValueError: shapes do not fit, an entry is NaN or infinite, or an output is impossible under the likelihood.
    """
    refresh_classes(model, inference)
    X, y = check_data(X, y, model.likelihood)
    y = check_outputs(model.likelihood, y)
    inference = default_inference(model) if inference is None else inference
    return _condition(inference, cast(model, X.dtype), X, y, sites)


@jax.jit
def _condition(inference, model, X, y, sites):
    return inference.condition(model, X, y, sites)


def log_evidence(model: Model, X: Any, y: Any, inference: Any = None) -> Float[Array, ""]:
    """Log p(y | X, hyperparameters), the integral of the likelihood over the Gaussian process.

    Differentiable in the model, ``X`` and ``y``, to any order.

    Args:
        model: kernel, likelihood and mean.
        X: inputs ``(N, D)``, floating point.
        y: outputs ``(N,)`` of the same dtype.
        inference: as in ``condition``.

    Returns:
        A scalar; NaN if the method failed, did not come near its fixed point, or gave a number that is larger than any
        evidence (see ``condition(...).status``).

    Raises:
        TypeError: ``X`` or ``y`` is not floating point, or their dtypes differ.
        ValueError: shapes do not fit, or an entry is NaN or infinite.
    """
    return condition(model, X, y, inference).log_evidence


def default_inference(model: Model) -> Any:
    """Exact inference if the likelihood is Gaussian, EP if it is log-concave, else VI.

    EP's evidence is the closest to the truth if its fixed point is unique and stable, which log-concavity all but
    ensures; without log-concavity the evidence lower bound is the safer objective.
    """
    if hasattr(model.likelihood, "noise_variance"):
        return Exact()
    return EP() if model.likelihood.log_concave else VI()


class SiteSolutions(NamedTuple):
    """Sites and evidences at S hyperparameter values."""

    sites: Sites
    """Sites, leaves ``(S, N)``."""
    log_evidence: Float[Array, " S"]
    """Log evidences; NaN as in ``Conditioned``."""
    status: Int[Array, " S"]
    """``Status`` of each."""


def condition_many(
    inference: Any,
    models: Any,
    X: Float[Array, "N D"],
    y: Float[Array, " N"],
    start: Sites | None = None,
    fresh: Any = False,
) -> SiteSolutions:
    """Find the sites at several hyperparameter values, one after another.

    Args:
        inference: an approximation.
        models: the model with leaves ``(S, ...)``.
        X: checked inputs.
        y: checked outputs.
        start: sites at which the searches start; None: the sites of each output alone.
        fresh: whether a search starts at the sites of each output alone in spite of ``start``, ``(S,)``.
    """
    num = jax.tree.leaves(models)[0].shape[0]
    fresh = jnp.full(num, True) if start is None else jnp.broadcast_to(jnp.asarray(fresh), (num,))
    start = Sites(jnp.zeros_like(y), jnp.zeros_like(y)) if start is None else start
    if num > _MAX_SINGLE:
        return _condition_many(inference, models, X, y, start, fresh)
    rows = [jax.tree.map(lambda leaf, s=s: leaf[s : s + 1], (models, fresh)) for s in range(num)]
    solutions = [_condition_many(inference, model, X, y, start, is_fresh) for model, is_fresh in rows]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *solutions)


def reference_sites(model: Model, X: Array, y: Array, inference: Any) -> Sites | None:
    """The sites at the hyperparameters of a model, from which searches at other values start; None for exact inference.

    A fixed start makes the evidence a function of the hyperparameters, whatever path led to them, as reversible
    samplers need. None, too, if the search fails at the hyperparameters of the model.
    """
    if isinstance(inference, Exact):
        return None
    solutions = condition_many(inference, jax.tree.map(lambda leaf: leaf[None], model), X, y)
    if failed(int(solutions.status[0])):
        return None
    return jax.tree.map(lambda leaf: leaf[0], solutions.sites)


@jax.jit
def _condition_many(inference, models, X, y, start, fresh):
    def condition_one(arguments):
        model, is_fresh = arguments
        sites = start
        if not isinstance(inference, Exact):
            alone = first_sites(model.likelihood, y, model.mean(X), model.kernel.diag(X), inference.num_nodes)
            sites = Sites(
                *(jnp.where(is_fresh, a, b) for a, b in zip(alone, (start.lam1, start.lam2), strict=True))
            )
        conditioned = inference.condition(model, X, y, sites)
        return SiteSolutions(conditioned.sites, conditioned.log_evidence, conditioned.status)

    return jax.lax.map(condition_one, (models, fresh))
