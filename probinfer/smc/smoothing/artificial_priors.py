r"""Artificial priors of a backward filter, given or fitted to the particles of a pilot.

The fit: :math:`\gamma_t` is a Student-t with the mean and covariance of the filter at t, and :math:`q_t` one with
those of the linear regression of :math:`x_t` on :math:`x_{t+1}` among the pairs of parents and children. Five degrees
of freedom make the tails heavier than those of a Gaussian model, whose weights are then bounded.
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
from probinfer.smc.filtering.forward_pass import Sweep
from probinfer.smc.models.feynman_kac import FeynmanKac
from probinfer.smc.smoothing.backward import all_records

__all__ = ["ArtificialPrior", "check_real", "fit_artificial"]

_FREEDOM = 5


@pytree
class ArtificialPrior:
    r"""What turns the likelihood of the future into a law, and moves its particles backwards.

    Functions are compared by what they depend on; arrays that they capture, or that
    ``jax.tree_util.Partial`` binds to them, are data.

    Attributes:
        log_prior: ``log_prior(x, t) -> ()``, :math:`\log\gamma_t(x)`, t = 0 ... T-1; positive where the smoothing law
            is, normalised at t = T-1.
        sample_last: ``sample_last(key) -> x_{T-1}`` drawn from :math:`\gamma_{T-1}`.
        propagate: ``propagate(key, x_next, t) -> x_t`` given :math:`x_{t+1}`, t = T-2 ... 0.
        log_propagate: ``log_propagate(x_next, x, t) -> ()``, its log density.

    Raises:
        TypeError: one of them is no function.
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
class _Fit:
    means: Any  # (T, d), and a lower root (T, d, d): of gamma
    roots: Any
    gains: Any  # (T-1, d, d), intercepts (T-1, d), lower roots (T-1, d, d): of q
    intercepts: Any
    residual_roots: Any
    like: Any  # a state, for its structure


def check_real(fk: FeynmanKac) -> None:
    """Refuse to fit a law on R^d to states that are not real.

    Args:
        fk: the model.

    Raises:
        ValueError: a leaf of its states is no floating-point array.
    """
    state = jax.eval_shape(fk.init_sample, jax.random.key(0))
    dtypes = [str(leaf.dtype) for leaf in jax.tree.leaves(state)]
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(state)):
        raise ValueError(
            f"an artificial prior can be fitted to real states only, got dtypes {dtypes}: give "
            f"artificial=smc.ArtificialPrior(log_prior, sample_last, propagate, log_propagate)"
        )


def fit_artificial(sweep: Sweep) -> ArtificialPrior:
    """Return Student-t laws fitted to a pilot.

    Args:
        sweep: a pass that kept its history, T >= 2, of real states.
    """
    records = all_records(sweep)
    states = jax.vmap(jax.vmap(lambda state: ravel_pytree(state)[0]))(records)
    log_weights, ancestors, resampled = sweep.past_weights, sweep.ancestors, sweep.resampled
    means = jax.vmap(weights.mean)(log_weights, states)
    roots = jnp.linalg.cholesky(jax.vmap(weights.covariance)(log_weights, states))
    parents = jax.vmap(lambda rows, index: rows[index])(states[:-1], ancestors[1:])
    # children of a resampling weigh the same, until their potential is added
    pair_weights = jnp.where(resampled[1:, None], jnp.zeros_like(log_weights[:-1]), log_weights[:-1])
    gains, intercepts, residuals = jax.vmap(_regress)(pair_weights, parents, states[1:])
    like = jax.tree.map(lambda leaf: leaf[0, 0], records)
    fit = _Fit(means, roots, gains, intercepts, jnp.linalg.cholesky(residuals), like)
    return ArtificialPrior(
        Partial(_log_prior, fit),
        Partial(_sample_last, fit),
        Partial(_propagate, fit),
        Partial(_log_propagate, fit),
    )


def _regress(log_weights: Array, response: Array, given: Array) -> tuple[Array, Array, Array]:
    """Gain (d, d), intercept (d,) and residual covariance (d, d) of a linear regression of (N, d) on (N, d)."""
    both, dimension = jnp.concatenate([response, given], axis=1), response.shape[1]
    mean, covariance = weights.mean(log_weights, both), weights.covariance(log_weights, both)
    cross = covariance[:dimension, dimension:]
    gain = jnp.linalg.solve(covariance[dimension:, dimension:], cross.T).T
    residual = covariance[:dimension, :dimension] - gain @ cross.T
    return gain, mean[:dimension] - gain @ mean[dimension:], (residual + residual.T) / 2


def _draw(key: Array, mean: Array, root: Array) -> Array:
    """A Student-t: a Gaussian over the root of the mean of five squared ones."""
    noise = jax.random.normal(key, (mean.shape[0] + _FREEDOM,), mean.dtype)
    return mean + root @ noise[_FREEDOM:] / jnp.sqrt(jnp.mean(noise[:_FREEDOM] ** 2))


def _log_student(x: Array, mean: Array, root: Array) -> Array:
    size = x.shape[0]
    squared = jnp.sum(solve_triangular(root, x - mean, lower=True) ** 2)
    both = (_FREEDOM + size) / 2
    constant = gammaln(both) - gammaln(_FREEDOM / 2) - 0.5 * size * jnp.log(jnp.asarray(_FREEDOM * jnp.pi))
    log_det = jnp.sum(jnp.log(jnp.diagonal(root)))
    return constant.astype(x.dtype) - log_det - both * jnp.log1p(squared / _FREEDOM)


def _flat(x: ArrayTree) -> Array:
    return ravel_pytree(x)[0]


def _back(fit: _Fit, following: ArrayTree, t: Array) -> tuple[Array, Array]:
    return fit.gains[t] @ _flat(following) + fit.intercepts[t], fit.residual_roots[t]


def _like(fit: _Fit, flat: Array) -> ArrayTree:
    return ravel_pytree(fit.like)[1](flat)


def _log_prior(fit: _Fit, x: ArrayTree, t: Array) -> Array:
    return _log_student(_flat(x), fit.means[t], fit.roots[t])


def _sample_last(fit: _Fit, key: Array) -> ArrayTree:
    return _like(fit, _draw(key, fit.means[-1], fit.roots[-1]))


def _propagate(fit: _Fit, key: Array, following: ArrayTree, t: Array) -> ArrayTree:
    return _like(fit, _draw(key, *_back(fit, following, t)))


def _log_propagate(fit: _Fit, following: ArrayTree, x: ArrayTree, t: Array) -> Array:
    return _log_student(_flat(x), *_back(fit, following, t))
