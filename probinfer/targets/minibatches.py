"""A log density estimated from a batch of the rows of the data."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.binding import Bound, StochasticLogDensity
from probinfer.core.types import Array, ArrayTree, Int, LogDensityFn, PRNGKey, Scalar
from probinfer.targets import transforms
from probinfer.targets.assembly import assemble, at_example, check_scalar, checked_example, named_terms
from probinfer.targets.base import Target
from probinfer.targets.transforms import Bijectors

__all__ = ["minibatch", "stratified_rows"]


def minibatch(
    log_prior_fn: LogDensityFn,
    log_likelihood_fn: Callable[[ArrayTree, ArrayTree], Any],
    data: ArrayTree,
    batch_size: int,
    *,
    example: ArrayTree,
    constraints: Any = None,
) -> Target:
    """A posterior whose log density is estimated without bias from a batch of the rows of the data.

    The estimate is ``log p(theta) + n / b sum_j log p(y_{i_j} | theta)`` with ``i_j = floor((j n + r_j) / b)`` and
    ``r_j`` uniform on ``0 ... n - 1``: one row from each of ``b`` consecutive strata, every row in the batch ``b / n``
    times on average, and all rows exactly once when ``b = n``.

    Args:
        log_prior_fn: log prior density of the constrained values.
        log_likelihood_fn: ``log_likelihood_fn(values, batch)``: log likelihoods of the rows ``(b,)``, or their sum.
        data: a tree of arrays with one leading axis of length ``n``.
        batch_size: rows in a batch, ``b``.
        example: constrained values inside their supports (see ``from_logdensity``).
        constraints: a tree of NumPyro constraints (``None``: unconstrained).

    Returns:
        A stochastic target: ``logdensity_fn(key, position)``. Exact engines refuse it. ``prior`` and
        ``log_likelihood_fn`` are ``None``.

    Raises:
        TypeError: ``example`` is not floating point, or ``batch_size`` not an integer.
        ValueError: the leading axes differ, ``batch_size`` is not in ``1 ... n``, ``example`` does not fit, or a
            function returns another shape.
    """
    num_rows, batch_size = _num_rows(data), operator.index(batch_size)
    if not 1 <= batch_size <= num_rows:
        raise ValueError(f"batch_size must be between 1 and the number of rows {num_rows}, got {batch_size}")
    data = jax.tree.map(jnp.asarray, data)
    example = checked_example(example)
    bijectors, start = at_example(constraints, example)
    check_scalar("log_prior_fn", log_prior_fn, example)
    _check_rows(log_likelihood_fn, example, data, batch_size)
    return assemble(
        StochasticLogDensity(
            _minibatch_estimate, bijectors, log_prior_fn, log_likelihood_fn, data, batch_size
        ),
        bijectors,
        start,
        names=transforms.leaf_names(example),
        terms_fn=Bound(_minibatch_terms, bijectors, log_prior_fn, log_likelihood_fn, data),
    )


def _num_rows(data: ArrayTree) -> int:
    shapes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if len(shapes) != 1 or shapes == {()}:
        raise ValueError(
            f"the arrays of data must share one leading axis, got leading shapes {sorted(shapes)}"
        )
    return next(iter(shapes))[0]


def _check_rows(log_likelihood_fn: Callable, example: ArrayTree, data: ArrayTree, batch_size: int) -> None:
    batch = jax.tree.map(lambda leaf: leaf[:batch_size], data)
    result = jax.eval_shape(lambda values, rows: log_likelihood_fn(values, rows), example, batch)
    if getattr(result, "shape", None) not in ((), (batch_size,)) or not jnp.issubdtype(
        result.dtype, jnp.floating
    ):
        raise ValueError(
            f"log_likelihood_fn(values, batch) must return the log likelihoods of the rows, shape ({batch_size},), or "
            f"their sum, shape (); got {result}"
        )


def _minibatch_estimate(
    bijectors: Bijectors,
    log_prior_fn: LogDensityFn,
    log_likelihood_fn: Callable,
    data: ArrayTree,
    batch_size: int,
    key: PRNGKey,
    position: ArrayTree,
) -> Scalar:
    values, log_det = transforms.forward_and_log_det(bijectors, position)
    num_rows = _num_rows(data)
    rows = stratified_rows(jax.random.randint(key, (batch_size,), 0, num_rows, jnp.int32), num_rows)
    batch = jax.tree.map(lambda leaf: leaf[rows], data)
    return log_prior_fn(values) + log_det + num_rows / batch_size * jnp.sum(log_likelihood_fn(values, batch))


def stratified_rows(r: Int[Array, " b"], num_rows: int) -> Int[Array, " b"]:
    """One row from each of ``b`` strata, ``floor((j n + r_j) / b)``, without overflow: ``j n`` is split beforehand.

    Args:
        r: uniform integers in ``0 ... n - 1``.
        num_rows: ``n``; ``n + b`` must be below 2^31.

    Returns:
        Row numbers; over uniform ``r`` every row occurs ``b / n`` times on average.
    """
    batch_size = r.shape[0]
    quotient, remainder = np.divmod(np.arange(batch_size, dtype=np.int64) * num_rows, batch_size)
    return jnp.asarray(quotient, jnp.int32) + (jnp.asarray(remainder, jnp.int32) + r) // batch_size


def _minibatch_terms(
    bijectors: Bijectors,
    log_prior_fn: LogDensityFn,
    log_likelihood_fn: Callable,
    data: ArrayTree,
    position: ArrayTree,
) -> dict:
    fns = {
        "log_prior_fn": log_prior_fn,
        "log_likelihood_fn": lambda values: jnp.sum(log_likelihood_fn(values, data)),
    }
    return named_terms(bijectors, fns, position)
