"""Conditioning a Gaussian process on data, by any inference method."""

from __future__ import annotations

from typing import Any

import jax

from probinfer.gp.conditioned import Conditioned
from probinfer.gp.conjugate import Exact
from probinfer.gp.model import Model, cast
from probinfer.gp.sites import Sites
from probinfer.gp.validate import check_data
from probinfer.types import Array, Float

__all__ = ["condition", "default_inference", "log_evidence"]


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
        y: outputs ``(N,)`` of the same dtype.
        inference: ``gp.Exact()`` (the default for a likelihood that has a ``noise_variance``).
        sites: where an iterative method starts.

    Returns:
        The conditioned process; ``.status`` says whether the numbers can be trusted.

    Raises:
        TypeError: ``X`` or ``y`` is not floating point, or their dtypes differ.
        ValueError: shapes do not fit, or an entry is NaN or infinite.
    """
    X, y = check_data(X, y)
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
        A scalar; NaN when the status is bad (see ``condition(...).status``).

    Raises:
        TypeError: ``X`` or ``y`` is not floating point, or their dtypes differ.
        ValueError: shapes do not fit, or an entry is NaN or infinite.
    """
    return condition(model, X, y, inference).log_evidence


def default_inference(model: Model) -> Any:
    """Exact inference where the likelihood is Gaussian.

    Raises:
        ValueError: the likelihood is not Gaussian.
    """
    if hasattr(model.likelihood, "noise_variance"):
        return Exact()
    raise ValueError(
        f"no inference method was given, and {type(model.likelihood).__name__} is not Gaussian: name one"
    )
