r"""Artificial priors of a backward filter, given by the user or fitted to the particles of a pilot filter.

The fit: :math:`\gamma_t` is a Student-t distribution with the mean and covariance of the filter at t, and :math:`q_t`
one with those of the linear regression of :math:`x_t` on :math:`x_{t+1}` over the pairs of parents and children. With
five degrees of freedom the tails are heavier than those of a Gaussian model, so that its weights are bounded.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import gammaln
from jax.tree_util import Partial

from probinfer.core.algorithms import as_partial
from probinfer.core.types import Array, ArrayTree, pytree
from probinfer.numerics import weights
from probinfer.smc.filtering.genealogy import all_records
from probinfer.smc.filtering.traces import FilterTrace
from probinfer.smc.models.feynman_kac import FeynmanKac

__all__ = ["ArtificialPrior", "check_real", "fit_artificial"]

_DEGREES_OF_FREEDOM = 5


@pytree
class ArtificialPrior:
    r"""A prior that turns the likelihood of the future into a distribution, and backward transitions.

    Functions are compared by what they depend on; arrays that they capture, or that
    ``jax.tree_util.Partial`` binds to them, are data.

    Attributes:
        log_prior: ``log_prior(x, t) -> ()``, :math:`\log\gamma_t(x)`, t = 0 ... T-1; positive where the smoothing
            distribution is, normalized at t = T-1.
        sample_last: ``sample_last(key) -> x_{T-1}`` drawn from :math:`\gamma_{T-1}`.
        propagate: ``propagate(key, x_next, t) -> x_t`` given :math:`x_{t+1}`, t = T-2 ... 0.
        log_propagate: ``log_propagate(x_next, x, t) -> ()``, its log density.

    Raises:
        TypeError: one of them is not a function.
    """

    log_prior: Any
    sample_last: Any
    propagate: Any
    log_propagate: Any

    def __init__(self, log_prior: Any, sample_last: Any, propagate: Any, log_propagate: Any):
        functions = {
            "log_prior": log_prior,
            "sample_last": sample_last,
            "propagate": propagate,
            "log_propagate": log_propagate,
        }
        for name, fn in functions.items():
            if not callable(fn):
                raise TypeError(f"{name} of an ArtificialPrior must be a function, got {type(fn).__name__}")
            object.__setattr__(self, name, as_partial(fn))


@pytree
class _StudentFit:
    """Student-t marginals and regressions of one state on the next.

    Attributes:
        means: of the prior, (T, d).
        chols: Cholesky factors of its scale matrices, (T, d, d).
        gains: coefficients of the regression on the next state, (T-1, d, d).
        intercepts: of the regression, (T-1, d).
        residual_chols: Cholesky factors of its residual scale matrices, (T-1, d, d).
        template: a state, for its structure.
    """

    means: Any
    chols: Any
    gains: Any
    intercepts: Any
    residual_chols: Any
    template: Any


def check_real(fk: FeynmanKac) -> None:
    """Check that states are real, so that a distribution on R^d can be fitted to them.

    Args:
        fk: the model.

    Raises:
        ValueError: a leaf of its states is not a floating-point array.
    """
    state = jax.eval_shape(fk.init_sample, jax.random.key(0))
    dtypes = [str(leaf.dtype) for leaf in jax.tree.leaves(state)]
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(state)):
        raise ValueError(
            f"an artificial prior can be fitted to real states only, got dtypes {dtypes}: give "
            f"artificial=smc.ArtificialPrior(log_prior, sample_last, propagate, log_propagate)"
        )


def fit_artificial(filter_trace: FilterTrace) -> ArtificialPrior:
    """Return Student-t distributions fitted to a pilot filter.

    Args:
        filter_trace: a pass that stored its history, T >= 2, of real states.
    """
    records = all_records(filter_trace)
    states = jax.vmap(jax.vmap(_ravel))(records)
    log_weights: Any = filter_trace.past_log_weights
    ancestors: Any = filter_trace.ancestors
    resampled = filter_trace.resampled
    means = jax.vmap(weights.mean)(log_weights, states)
    chols = jnp.linalg.cholesky(jax.vmap(weights.covariance)(log_weights, states))
    parents = jax.vmap(lambda rows, index: rows[index])(states[:-1], ancestors[1:])
    # after resampling, children have equal weights until their potential is added
    pair_log_weights = jnp.where(resampled[1:, None], jnp.zeros_like(log_weights[:-1]), log_weights[:-1])
    gains, intercepts, residuals = jax.vmap(_regress)(pair_log_weights, parents, states[1:])
    fit = _StudentFit(
        means=means,
        chols=chols,
        gains=gains,
        intercepts=intercepts,
        residual_chols=jnp.linalg.cholesky(residuals),
        template=jax.tree.map(lambda leaf: leaf[0, 0], records),
    )
    return ArtificialPrior(
        Partial(_log_prior, fit),
        Partial(_sample_last, fit),
        Partial(_propagate, fit),
        Partial(_log_propagate, fit),
    )


def _regress(log_weights: Array, responses: Array, regressors: Array) -> tuple[Array, Array, Array]:
    """Gain (d, d), intercept (d,) and residual covariance (d, d) of a linear regression of (N, d) on (N, d)."""
    joint, dimension = jnp.concatenate([responses, regressors], axis=1), responses.shape[1]
    mean, covariance = weights.mean(log_weights, joint), weights.covariance(log_weights, joint)
    cross = covariance[:dimension, dimension:]
    gain = jnp.linalg.solve(covariance[dimension:, dimension:], cross.T).T
    residual = covariance[:dimension, :dimension] - gain @ cross.T
    return gain, mean[:dimension] - gain @ mean[dimension:], (residual + residual.T) / 2


def _sample_student(key: Array, mean: Array, chol: Array) -> Array:
    """Draw from a Student-t: a Gaussian over the root of the mean of as many squared ones as degrees of freedom."""
    noise = jax.random.normal(key, (mean.shape[0] + _DEGREES_OF_FREEDOM,), mean.dtype)
    return mean + chol @ noise[_DEGREES_OF_FREEDOM:] / jnp.sqrt(jnp.mean(noise[:_DEGREES_OF_FREEDOM] ** 2))


def _log_student(x: Array, mean: Array, chol: Array) -> Array:
    dimension, df = x.shape[0], _DEGREES_OF_FREEDOM
    quad = jnp.sum(solve_triangular(chol, x - mean, lower=True) ** 2)
    half_sum = (df + dimension) / 2
    constant = gammaln(half_sum) - gammaln(df / 2) - 0.5 * dimension * jnp.log(jnp.asarray(df * jnp.pi))
    half_log_det = jnp.sum(jnp.log(jnp.diagonal(chol)))
    return constant.astype(x.dtype) - half_log_det - half_sum * jnp.log1p(quad / df)


def _ravel(state: ArrayTree) -> Array:
    return ravel_pytree(state)[0]


def _unravel(fit: _StudentFit, vector: Array) -> ArrayTree:
    return ravel_pytree(fit.template)[1](vector)


def _backward_moments(fit: _StudentFit, x_next: ArrayTree, t: Array) -> tuple[Array, Array]:
    """Return mean and Cholesky factor of x_t given x_{t+1}."""
    return fit.gains[t] @ _ravel(x_next) + fit.intercepts[t], fit.residual_chols[t]


def _log_prior(fit: _StudentFit, x: ArrayTree, t: Array) -> Array:
    return _log_student(_ravel(x), fit.means[t], fit.chols[t])


def _sample_last(fit: _StudentFit, key: Array) -> ArrayTree:
    return _unravel(fit, _sample_student(key, fit.means[-1], fit.chols[-1]))


def _propagate(fit: _StudentFit, key: Array, x_next: ArrayTree, t: Array) -> ArrayTree:
    return _unravel(fit, _sample_student(key, *_backward_moments(fit, x_next, t)))


def _log_propagate(fit: _StudentFit, x_next: ArrayTree, x: ArrayTree, t: Array) -> Array:
    return _log_student(_ravel(x), *_backward_moments(fit, x_next, t))
