"""Triggers of resampling: predicates ``(log_weights (n,), t) -> bool``, pytrees whose numbers are leaves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from probinfer.core.types import Array, strong_array
from probinfer.numerics import weights

__all__ = ["always", "entropic_below", "ess_below", "every"]


def ess_below(fraction: Any = 0.5) -> Partial:
    r"""Resample when the effective sample size :math:`1/\sum W_i^2` is below ``fraction`` times n.

    Args:
        fraction: above 0 and at most 1; a number, or an array to be traced.

    Raises:
        ValueError: ``fraction`` is a number outside (0, 1].

    References:
        Liu and Chen (1995).
    """
    return Partial(_ess_below, _fraction("ess_below", fraction))


def entropic_below(fraction: Any = 0.5) -> Partial:
    r"""Resample when the perplexity :math:`\exp(-\sum W_i\log W_i)` is below ``fraction`` times n.

    The perplexity is never smaller than the effective sample size.

    Args:
        fraction: above 0 and at most 1; a number, or an array to be traced.

    Raises:
        ValueError: ``fraction`` is a number outside (0, 1].

    References:
        Cornebise, Moulines and Olsson (2008).
    """
    return Partial(_entropic_below, _fraction("entropic_below", fraction))


def always() -> Partial:
    """Resample at every step."""
    return Partial(_always)


def every(k: Any) -> Partial:
    """Resample at the steps t = 0, k, 2 k, ... among those at which the trigger is evaluated.

    Args:
        k: a positive integer, or an integer array to be traced.

    Raises:
        ValueError: k is not a positive integer.
    """
    if not isinstance(k, jax.Array) and (int(k) != k or k < 1):
        raise ValueError(f"every(k) resamples at each k-th step: k must be a positive integer, got {k!r}")
    return Partial(_every, jnp.asarray(k, jnp.int32))


def _fraction(name: str, fraction: Any) -> Array:
    if not isinstance(fraction, jax.Array) and not 0 < fraction <= 1:
        raise ValueError(
            f"{name}(fraction) compares with fraction * n: expected 0 < fraction <= 1, got {fraction!r}"
        )
    return strong_array(fraction)


def _ess_below(fraction: Array, log_weights: Array, t: Any) -> Array:
    return weights.ess(log_weights) < fraction.astype(log_weights.dtype) * log_weights.shape[0]


def _entropic_below(fraction: Array, log_weights: Array, t: Any) -> Array:
    return weights.entropic_ess(log_weights) < fraction.astype(log_weights.dtype) * log_weights.shape[0]


def _always(log_weights: Array, t: Any) -> Array:
    return jnp.asarray(True)


def _every(k: Array, log_weights: Array, t: Any) -> Array:
    return jnp.asarray(t, jnp.int32) % k == 0
