"""Joint sampling of latent values and hyperparameters: the gold standard, without approximation of the latent process.

With f = μ + Lν, L Lᵀ = K(θ), the whitened ν are independent standard normal under the prior for every θ, which removes
most of the coupling of f and θ. The cost is one Cholesky factorization and its derivative for each gradient, and N more
dimensions.

References:
    Murray and Adams (2010), "Slice sampling covariance hyperparameters of latent Gaussian models".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from probinfer.core.identity import refresh_classes
from probinfer.core.types import Array, Float
from probinfer.gp.hyperparameters.posterior import FreeHyperparameters, free_hyperparameters, rebuild
from probinfer.gp.model.model import Model, cast
from probinfer.gp.model.validation import check_data, check_inputs, check_outputs
from probinfer.numerics.linalg import safe_cholesky, triangular_solve
from probinfer.targets import LogDensity, Target, from_prior

__all__ = ["LATENT", "joint_posterior", "joint_predictive", "latent_values"]

LATENT = "latent"
"""The name of the whitened latent values among the parameters of the target."""


def joint_posterior(model: Model, prior: Any, X: Any, y: Any) -> tuple[FreeHyperparameters, Target]:
    """The target p(ν, θ | y) ∝ p(y | f = μ + Lν) N(ν; 0, I) p(θ), for any engine.

    Args:
        model: the model; fixed leaves keep its values, the others start at them.
        prior: a tree shaped like the model, from ``gp.default_prior``.
        X: inputs ``(N, D)``, floating point.
        y: outputs ``(N,)`` of the same dtype.

    Returns:
        The learned leaves, and the target over a dictionary of their values and of ``"latent"`` ``(N,)``.

    Raises:
        TypeError: the data are not floating point, differ in dtype, or a leaf of the prior is of the wrong kind.
        ValueError: shapes, values or priors do not fit.
    """
    refresh_classes(model)
    X, y = check_data(X, y, model.likelihood)
    y, model = check_outputs(model.likelihood, y), cast(model, X.dtype)
    free, priors = free_hyperparameters(model, prior)
    whitened = dist.Normal(np.zeros(len(y), X.dtype), np.ones((), X.dtype))
    target = from_prior({**priors, LATENT: whitened}, LogDensity(_log_likelihood, free, model, X, y))
    start = {**free.values(model), LATENT: jnp.zeros(len(y), X.dtype)}
    return free, dataclasses.replace(target, start=target.unconstrain(start))


def latent_values(
    free: FreeHyperparameters, model: Model, draws: dict[str, Array], X: Float[Array, "N D"]
) -> Float[Array, "S N"]:
    """The latent function at the training inputs, f = μ + Lν, one row for each draw.

    Args:
        free: from ``joint_posterior``.
        model: the model that was passed there.
        draws: values by name with one leading axis, from ``posterior.flat()``; weighted ones from
            ``posterior.resample(key, num)``.
        X: the training inputs.
    """
    return jax.lax.map(lambda values: _latent(free, model, X, values), draws)


def joint_predictive(
    free: FreeHyperparameters, model: Model, draws: dict[str, Array], X: Any, X_new: Any
) -> Any:
    """The distribution of outputs at new inputs: a mixture over draws of ∫ p(y* | f*) p(f* | f, θ) df*.

    Args:
        free: from ``joint_posterior``.
        model: the model that was passed there.
        draws: values by name with one leading axis, from ``posterior.resample(key, num)``; a few hundred are enough.
        X: training inputs ``(N, D)``.
        X_new: new inputs ``(M, D)``.

    Returns:
        The predictive distribution of the likelihood.

    Raises:
        TypeError: ``X_new`` is not floating point or has another dtype.
        ValueError: ``X_new`` has another number of columns, or is not finite.
    """
    X = jnp.asarray(X)
    X_new = check_inputs(X_new, columns=X.shape[1], dtype=X.dtype)
    mean, variance = _conditionals(free, model, draws, X, X_new)
    num = mean.shape[0]
    likelihoods = jax.vmap(lambda values: rebuild(free, model, values).likelihood, axis_size=num)(
        {name: draws[name] for name in free.names}
    )
    return likelihoods.predictive(mean, variance)


def _log_likelihood(free, model, X, y, values):
    f = _latent(free, model, X, values)
    return jnp.sum(rebuild(free, model, values).likelihood.log_density(y, f))


def _latent(free, model, X, values):
    model = rebuild(free, model, values)
    chol, _, _ = safe_cholesky(model.kernel.gram(X))
    return model.mean(X) + chol @ values[LATENT]


@jax.jit
def _predict_one(model, X, X_new, whitened):
    chol, _, _ = safe_cholesky(model.kernel.gram(X))
    half = triangular_solve(chol, model.kernel.gram(X, X_new))
    # K* K⁻¹ (f − μ) = (L⁻¹ K*ᵀ)ᵀ ν
    variance = model.kernel.diag(X_new) - jnp.sum(half * half, 0)
    # Conditional on f there is no noise, and so no better lower bound than the rounding of the prior variance.
    rounding = float(jnp.finfo(variance.dtype).eps) * model.kernel.diag(X_new)
    return model.mean(X_new) + half.T @ whitened, jnp.maximum(variance, rounding)


def _conditionals(free, model, draws, X, X_new):
    return jax.lax.map(
        lambda values: _predict_one(rebuild(free, model, values), X, X_new, values[LATENT]), draws
    )
