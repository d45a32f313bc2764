"""Draws as every check takes them: an array or a tree, with chains or independent, finite, moving, enough of them.

``(n, d)`` says that the draws are independent; ``(chain, draw, d)`` that each chain is correlated along its second
axis. A tree has leaves ``(chain, draw, ...)``, as in ``Posterior.unconstrained``. What cannot be judged is refused
here, once, with what to do about it.
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
from probinfer.core.errors import check_finite, check_floating, shortened
from probinfer.core.types import Array, Float
from probinfer.inference import diagnostics
from probinfer.inference.posterior import Posterior

__all__ = ["FlatDraws", "collect", "collect_pair", "correlation_time", "gradients"]

_CORRELATED = 0.35  # of neighbours; 200 independent draws exceed it in a coordinate at rate 1e-6
_ENOUGH = 200  # draws from which autocorrelation of supposedly independent draws is told from noise


class FlatDraws(NamedTuple):
    """Flattened draws, and how to make a position of one.

    Attributes:
        values: ``(chain, draw, d)``; independent draws are one chain.
        independent: they came without a chain axis.
        unravel: ``(d,) -> position`` as the log density takes it.
    """

    values: Float[Array, "chain draw d"]
    independent: bool
    unravel: Callable[[Array], Any]

    @property
    def rows(self) -> Float[Array, "n d"]:
        """All draws below one another."""
        return self.values.reshape(-1, self.values.shape[-1])


def collect(name: str, draws: Any, *, least: int = 20) -> FlatDraws:
    """Check draws and flatten them.

    Args:
        name: of the argument, for messages.
        draws: ``(n, d)`` independent, ``(chain, draw, d)``, or a tree with leaves ``(chain, draw, ...)``.
        least: the smallest total number of draws that a verdict can rest on.

    Returns:
        The draws.

    Raises:
        TypeError: a ``Posterior``, nothing, or not floating point.
        ValueError: wrong number of axes, leaves that disagree, NaN or infinite draws, too few draws, a coordinate that
            never changes, draws called independent that are autocorrelated.
    """
    if isinstance(draws, Posterior):
        equal = "posterior.draws or posterior.unconstrained"
        weighted = "posterior.resample(key, num), as its draws are weighted"
        raise TypeError(
            f"{name} must be draws, got a Posterior; pass {equal if draws.log_weights is None else weighted}"
        )
    leaves = jax.tree.leaves(draws)
    if not leaves:
        raise TypeError(f"{name} must hold arrays of draws, got {shortened(draws)}")
    for leaf in leaves:
        check_floating(name, leaf)
    found = _from_array(name, draws) if leaves[0] is draws else _from_tree(name, draws, leaves)
    _check_values(name, found, least)
    return found


def collect_pair(a: Any, b: Any, *, least: int = 20) -> tuple[FlatDraws, FlatDraws]:
    """Check two sets of draws that are to be compared.

    Raises:
        TypeError: as ``collect``.
        ValueError: as ``collect``, or different numbers of coordinates.
    """
    first, second = collect("a", a, least=least), collect("b", b, least=least)
    if first.values.shape[-1] != second.values.shape[-1]:
        raise ValueError(
            f"a and b must have the same coordinates, got {first.values.shape[-1]} and {second.values.shape[-1]}"
        )
    return first, second


def correlation_time(draws: FlatDraws) -> float:
    """Return the draws that one independent draw costs in the slowest coordinate, at least 1; 1 if independent."""
    return 1.0 if draws.independent else max(1.0, _correlation_time(draws.values))


def gradients(logdensity_fn: Any, draws: FlatDraws) -> Float[Array, "n d"]:
    """Return the gradient of the log density at every draw.

    Raises:
        TypeError: not a function, or one that JAX cannot differentiate, or whose value is not floating point.
        ValueError: the value is not a scalar, the gradient is not finite at a draw, or zero at all of them.
    """
    if not callable(logdensity_fn):
        raise TypeError(f"logdensity_fn must be a function of a position, got {shortened(logdensity_fn)}")
    unravel = draws.unravel
    try:
        value = jax.eval_shape(lambda row: logdensity_fn(unravel(row)), draws.rows[0])
    except jax.errors.JAXTypeError as error:
        raise TypeError(
            "logdensity_fn must be written in JAX to have gradients; this one reads the numbers of its argument"
        ) from error
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"logdensity_fn must return one floating-point number a position, got {shortened(value)}"
        )
    try:
        scores = _gradients(as_partial(logdensity_fn), jax.tree_util.Partial(unravel), draws.rows)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise TypeError(f"logdensity_fn cannot be differentiated by JAX: {error}") from error
    _check_gradients(np.asarray(scores))
    return scores


@jax.jit
def _gradients(logdensity_fn: Any, unravel: Any, rows: Array) -> Array:
    slope = jax.grad(lambda row: logdensity_fn(unravel(row)))
    return jax.lax.map(slope, rows, batch_size=min(256, rows.shape[0]))


def _check_gradients(scores: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the gradient of the log density is NaN or infinite at {len(bad)} of {len(scores)} draws, first at draw "
            f"{bad[0]}: draws outside the support, or on a scale that is constrained; pass unconstrained draws"
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
    heads = {np.shape(leaf)[:2] for leaf in leaves}
    if len(heads) > 1 or any(np.ndim(leaf) < 2 for leaf in leaves):
        raise ValueError(
            f"the leaves of {name} must all begin with the axes (chain, draw), got {[np.shape(a) for a in leaves]}"
        )
    head = heads.pop()
    values = jnp.concatenate([jnp.asarray(leaf).reshape(*head, -1) for leaf in leaves], axis=-1)
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf)[0, 0], draws))
    return FlatDraws(values, False, unravel)


def _check_values(name: str, draws: FlatDraws, least: int) -> None:
    values, rows = draws.values, np.asarray(draws.rows)
    check_finite(name, values)
    if values.size == 0 or len(rows) < least:
        raise ValueError(
            f"{name} has {len(rows)} draws; a verdict needs at least {least}: it cannot tell with fewer"
        )
    still = np.flatnonzero(np.ptp(rows, axis=0) == 0)
    if len(still):
        raise ValueError(
            f"coordinates {still[:10].tolist()} of {name} never change: either the sampler is stuck or they are "
            "constants; leave constants out"
        )
    if draws.independent and len(rows) >= _ENOUGH and (correlation := _neighbours(rows)) > _CORRELATED:
        raise ValueError(
            f"{name} has shape (n, d), which says independent draws, but they are autocorrelated (neighbours by "
            f"{correlation:.2f}): pass (chain, draw, d), or thin them"
        )


def _neighbours(rows: np.ndarray) -> float:
    """Largest lag-one autocorrelation over the coordinates."""
    centred = rows - rows.mean(axis=0)
    return float(np.max(np.mean(centred[1:] * centred[:-1], axis=0) / np.mean(centred**2, axis=0)))


def _correlation_time(values: Array) -> float:
    if values.shape[1] < 4:
        return 1.0
    sizes = np.asarray(_sizes(values))
    return math.prod(values.shape[:2]) / float(np.min(sizes, initial=np.inf, where=np.isfinite(sizes)))


_sizes = jax.jit(diagnostics.ess)
