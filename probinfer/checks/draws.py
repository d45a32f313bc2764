"""The form in which every check takes draws, and the draws that it refuses.

An array of shape ``(n, d)`` says that the draws are independent; ``(chain, draw, d)`` says that each chain may be
correlated along its second axis. A tree has leaves ``(chain, draw, ...)``, as in ``Posterior.unconstrained``. Draws
that are not finite, never change or are too few are refused here, with advice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from probinfer.core.algorithms import as_partial
from probinfer.core.arguments import check_finite, check_floating
from probinfer.core.errors import shortened
from probinfer.core.types import Array, ArrayTree, Float
from probinfer.inference import diagnostics
from probinfer.inference.posterior import Posterior

__all__ = ["FlatDraws", "collect", "collect_pair", "correlation_time", "gradients"]

_MAX_AUTOCORRELATION = 0.35  # at lag one; 200 independent draws exceed it in a coordinate at rate 1e-6
_MIN_DRAWS_FOR_AUTOCORRELATION = 200  # with fewer draws, autocorrelation cannot be told from noise


class FlatDraws(NamedTuple):
    """Draws flattened into rows, and the function that turns a row into a position.

    Attributes:
        values: ``(chain, draw, d)``; independent draws form one chain.
        independent: whether the draws were given without a chain axis.
        unravel: ``(d,) -> position``, in the form that the log density takes.
    """

    values: Float[Array, "chain draw d"]
    independent: bool
    unravel: Callable[[Array], ArrayTree]

    @property
    def rows(self) -> Float[Array, "n d"]:
        """Return the draws of all chains, concatenated."""
        return self.values.reshape(-1, self.values.shape[-1])


def collect(name: str, draws: Any, *, min_draws: int = 20) -> FlatDraws:
    """Check draws and flatten them.

    Args:
        name: name of the argument in error messages.
        draws: ``(n, d)`` independent, ``(chain, draw, d)``, or a tree with leaves ``(chain, draw, ...)``.
        min_draws: smallest total number of draws that supports a verdict.

    Returns:
        The flattened draws.

    Raises:
        TypeError: ``draws`` is a ``Posterior``, holds no arrays, or is not floating point.
        ValueError: the number of axes is wrong, the leaves disagree, a draw is NaN or infinite, there are too few
            draws, a coordinate never changes, or draws given as independent are autocorrelated.
    """
    if isinstance(draws, Posterior):
        advice = "posterior.draws or posterior.unconstrained"
        if draws.log_weights is not None:
            advice = "posterior.resample(key, num), as its draws are weighted"
        raise TypeError(f"{name} must be draws, got a Posterior; pass {advice}")
    leaves = jax.tree.leaves(draws)
    if not leaves:
        raise TypeError(f"{name} must hold arrays of draws, got {shortened(draws)}")
    for leaf in leaves:
        check_floating(name, leaf)
    flat = _from_array(name, draws) if leaves[0] is draws else _from_tree(name, draws, leaves)
    _check_values(name, flat, min_draws)
    return flat


def collect_pair(a: Any, b: Any, *, min_draws: int = 20) -> tuple[FlatDraws, FlatDraws]:
    """Check and flatten two sets of draws that are to be compared.

    Raises:
        TypeError: as ``collect``.
        ValueError: as ``collect``, or the numbers of coordinates differ.
    """
    first, second = collect("a", a, min_draws=min_draws), collect("b", b, min_draws=min_draws)
    if first.values.shape[-1] != second.values.shape[-1]:
        raise ValueError(
            f"a and b must have the same coordinates, got {first.values.shape[-1]} and {second.values.shape[-1]}"
        )
    return first, second


def correlation_time(draws: FlatDraws) -> float:
    """Return the number of draws per effective draw in the slowest coordinate, at least 1; 1 for independent draws."""
    return 1.0 if draws.independent else max(1.0, _correlation_time(draws.values))


def gradients(logdensity_fn: Any, draws: FlatDraws) -> Float[Array, "n d"]:
    """Return the gradient of the log density at every draw.

    Raises:
        TypeError: ``logdensity_fn`` is not a function, or JAX cannot differentiate it.
        ValueError: its value is not a floating-point scalar, or its gradient is not finite at a draw or zero at all of
            them.
    """
    if not callable(logdensity_fn):
        raise TypeError(f"logdensity_fn must be a function of a position, got {shortened(logdensity_fn)}")
    unravel = draws.unravel
    try:
        value = jax.eval_shape(lambda row: logdensity_fn(unravel(row)), draws.rows[0])
    except jax.errors.JAXTypeError as error:
        raise TypeError(
            "logdensity_fn must be written in JAX to have gradients; this one reads the values of its argument"
        ) from error
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"logdensity_fn must return one floating-point number per position, got {shortened(value)}"
        )
    try:
        scores = _gradients(as_partial(logdensity_fn), jax.tree_util.Partial(unravel), draws.rows)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise TypeError(f"logdensity_fn cannot be differentiated by JAX: {error}") from error
    _check_gradients(np.asarray(scores))
    return scores


@jax.jit
def _gradients(logdensity_fn: Any, unravel: Any, rows: Array) -> Array:
    score_fn = jax.grad(lambda row: logdensity_fn(unravel(row)))
    return jax.lax.map(score_fn, rows, batch_size=min(256, rows.shape[0]))


def _check_gradients(scores: np.ndarray) -> None:
    invalid = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(invalid):
        raise ValueError(
            f"the gradient of the log density is NaN or infinite at {len(invalid)} of {len(scores)} draws, first at "
            f"draw {invalid[0]}: the draws lie outside the support or on a constrained scale; pass unconstrained draws"
        )
    if not scores.any():
        raise ValueError(
            "the gradient of the log density is zero at every draw: it does not depend on the position, or its "
            "derivative was stopped; this check needs gradients"
        )


def _from_array(name: str, draws: Any) -> FlatDraws:
    values = jnp.asarray(draws)
    if values.ndim not in (2, 3):
        raise ValueError(
            f"{name} must have shape (n, d) for independent draws or (chain, draw, d), got {values.shape}; "
            "add [:, None] or [..., None] for one coordinate"
        )
    return FlatDraws(values.reshape((-1, *values.shape[-2:])), values.ndim == 2, _identity)


def _identity(row: Array) -> Array:
    return row


def _from_tree(name: str, draws: Any, leaves: list) -> FlatDraws:
    leading_shapes = {np.shape(leaf)[:2] for leaf in leaves}
    if len(leading_shapes) > 1 or any(np.ndim(leaf) < 2 for leaf in leaves):
        raise ValueError(
            f"the leaves of {name} must all begin with the axes (chain, draw), got {[np.shape(a) for a in leaves]}"
        )
    leading_shape = leading_shapes.pop()
    values = jnp.concatenate([jnp.asarray(leaf).reshape(*leading_shape, -1) for leaf in leaves], axis=-1)
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf)[0, 0], draws))
    return FlatDraws(values, False, unravel)


def _check_values(name: str, draws: FlatDraws, min_draws: int) -> None:
    values, rows = draws.values, np.asarray(draws.rows)
    check_finite(name, values)
    if values.size == 0 or len(rows) < min_draws:
        raise ValueError(f"{name} has {len(rows)} draws; a verdict needs at least {min_draws}")
    constant = np.flatnonzero(np.ptp(rows, axis=0) == 0)
    if len(constant):
        raise ValueError(
            f"coordinates {constant[:10].tolist()} of {name} never change: either the sampler is stuck or they are "
            "constants; leave constants out"
        )
    if not draws.independent or len(rows) < _MIN_DRAWS_FOR_AUTOCORRELATION:
        return
    correlation = _lag_one_autocorrelation(rows)
    if correlation > _MAX_AUTOCORRELATION:
        raise ValueError(
            f"{name} has shape (n, d), which says independent draws, but they are autocorrelated ({correlation:.2f} at "
            "lag one): pass (chain, draw, d), or thin them"
        )


def _lag_one_autocorrelation(rows: np.ndarray) -> float:
    """Return the largest lag-one autocorrelation over the coordinates."""
    centered = rows - rows.mean(axis=0)
    return float(np.max(np.mean(centered[1:] * centered[:-1], axis=0) / np.mean(centered**2, axis=0)))


def _correlation_time(values: Array) -> float:
    if values.shape[1] < 4:
        return 1.0
    sizes = np.asarray(_effective_sizes(values))
    return math.prod(values.shape[:2]) / float(np.min(sizes, initial=np.inf, where=np.isfinite(sizes)))


_effective_sizes = jax.jit(diagnostics.ess)
