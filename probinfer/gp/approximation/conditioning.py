"""Conditioning a Gaussian process on data, by any inference method."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.identity import notice
from probinfer.core.types import Array, Float
from probinfer.gp.approximation.conditioned import Conditioned, failed
from probinfer.gp.approximation.conjugate import Exact
from probinfer.gp.approximation.iterative import EP, VI
from probinfer.gp.approximation.sites import Sites
from probinfer.gp.approximation.updates import first_sites
from probinfer.gp.model.model import Model, cast
from probinfer.gp.model.validation import check_data, check_outputs

__all__ = ["Settled", "condition", "default_inference", "log_evidence", "reference_sites", "settle"]

_FEW = 16  # up to so many hyperparameter values share the program of one, and no other has to be compiled


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
        sites: where an iterative method starts; by default at the sites of each output alone, under the prior.

    Returns:
        The conditioned process; ``.status`` says whether the numbers can be trusted.

    Raises:
        TypeError: ``X`` or ``y`` is not floating point, or their dtypes differ.
        ValueError: shapes do not fit, an entry is NaN or infinite, or the likelihood cannot give an output.
    """
    notice(model, inference)
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
        A scalar; NaN where there is none: the method failed, did not come near its fixed point, or gave a number that
        is larger than any evidence (see ``condition(...).status``).

    Raises:
        TypeError: ``X`` or ``y`` is not floating point, or their dtypes differ.
        ValueError: shapes do not fit, or an entry is NaN or infinite.
    """
    return condition(model, X, y, inference).log_evidence


def default_inference(model: Model) -> Any:
    """Exact inference where the likelihood is Gaussian, EP where it is log-concave, else VI.

    EP's evidence is the closest to the truth where its fixed point is unique and stable, which log-concavity all but
    ensures; without it the evidence lower bound is the safer objective.
    """
    if hasattr(model.likelihood, "noise_variance"):
        return Exact()
    return EP() if model.likelihood.log_concave else VI()


class Settled(NamedTuple):
    """What inference found at S hyperparameter values."""

    sites: Any
    """Sites, leaves ``(S, N)``."""
    log_evidence: Array
    """``(S,)``; NaN where there is none (see ``Conditioned``)."""
    status: Array
    """``(S,)`` of ``Status``."""


def settle(
    inference: Any,
    models: Any,
    X: Float[Array, "N D"],
    y: Float[Array, " N"],
    start: Sites | None = None,
    fresh: Any = False,
) -> Settled:
    """Find the sites at several hyperparameter values, one after another.

    Args:
        inference: an approximation.
        models: the model with leaves ``(S, ...)``.
        X: checked inputs.
        y: checked outputs.
        start: where the searches start; None: at the sites of each output alone.
        fresh: searches that start at the sites of each output alone all the same, ``(S,)``.
    """
    num = jax.tree.leaves(models)[0].shape[0]
    none = jnp.zeros_like(y)
    fresh = jnp.full(num, True) if start is None else jnp.broadcast_to(jnp.asarray(fresh), (num,))
    start = Sites(none, none) if start is None else start
    if num > _FEW:
        return _settle(inference, models, X, y, start, fresh)
    rows = [jax.tree.map(lambda leaf, s=s: leaf[s : s + 1], (models, fresh)) for s in range(num)]
    found = [_settle(inference, model, X, y, start, is_fresh) for model, is_fresh in rows]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)


def reference_sites(model: Model, X: Array, y: Array, inference: Any) -> Sites | None:
    """The sites at a model's own hyperparameters, where searches at other values start; None for exact inference.

    A fixed start makes the evidence a function of the hyperparameters, whatever path led to them, as reversible
    samplers need.
    """
    if isinstance(inference, Exact):
        return None
    found = settle(inference, jax.tree.map(lambda leaf: leaf[None], model), X, y)
    if failed(int(found.status[0])):
        return None
    return jax.tree.map(lambda leaf: leaf[0], found.sites)


@jax.jit
def _settle(inference, models, X, y, start, fresh):
    def one(arguments):
        model, fresh = arguments
        sites = start
        if not isinstance(inference, Exact):
            alone = first_sites(model.likelihood, y, model.mean(X), model.kernel.diag(X), inference.num_nodes)
            sites = Sites(
                *(jnp.where(fresh, a, b) for a, b in zip(alone, (start.lam1, start.lam2), strict=True))
            )
        found = inference.condition(model, X, y, sites)
        return Settled(found.sites, found.log_evidence, found.status)

    return jax.lax.map(one, (models, fresh))
