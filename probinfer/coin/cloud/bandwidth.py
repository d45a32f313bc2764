r"""How far the particles of a cloud should feel one another: the median of their squared distances.

The median is that of a fixed random sample of at most 4096 pairs, found by bisection on the bits of the distances
(floating-point numbers of one sign are ordered like integers), so it costs O(d), whatever N, and no sort.

* ``"median"``: :math:`h = \mathrm{med}\, r^2`. In the first 32 steps of a run a lower quantile, which rises from 2 % to
  50 %: near particles feel one another first, so that modes divide the particles before the cloud drifts as a whole,
  and no particle is ever alone, whatever the dimension.
* ``"published"``: :math:`h = \mathrm{med}\, r^2 / \log(N + 1)` over all N² pairs, the N of a particle with itself
  included. With it the cloud is far too narrow in high dimension (``coin.predicted_sd``).
* ``"fixed"``: the lengthscale of the kernel as it is, in the coordinates of the geometry.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.identity import notice
from probinfer.core.types import Array, Bool, Float, Int, Scalar
from probinfer.kernels import RBF, InverseMultiquadric
from probinfer.kernels.stationary import Stationary

__all__ = ["RULES", "check_rule", "masked_quantile", "pair_sample", "scaled_kernel", "squared_bandwidth"]

RULES = ("median", "published", "fixed")
_PAIRS = 4096
_START, _WARM = 0.02, 32  # first quantile, and steps until the median


def squared_bandwidth(
    rule: str, table: Float[Array, "N d"], keep: Bool[Array, " N"], step: Int[Array, ""]
) -> Scalar:
    """Return h for the particles that are kept.

    Args:
        rule: "median" or "published".
        table: the cloud, in the coordinates of its geometry.
        keep: which particles count.
        step: number of the step in the run, from 0.

    References:
        Liu and Wang (2016), section 5, for the published rule.
    """
    size = table.shape[0]
    first, second = pair_sample(size)
    squares = jnp.sum((table[first] - table[second]) ** 2, axis=1)
    both = keep[first] & keep[second]
    done = jnp.minimum(step.astype(table.dtype) / _WARM, 1)
    rising = 0.5 * jnp.exp(math.log(2 * _START) * (1 - done))
    share = rising if rule == "median" else jnp.asarray(max((size - 2) / (2 * (size - 1)), 0.0), table.dtype)
    middle = masked_quantile(squares, both, share)
    # With so many duplicates that the median is zero, the mean is a scale still.
    mean = jnp.sum(jnp.where(both, squares, 0)) / jnp.maximum(jnp.sum(both), 1)
    middle = jnp.where(middle > 0, middle, mean)
    return middle / math.log(size + 1) if rule == "published" else middle


@functools.lru_cache
def pair_sample(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the members of a fixed sample of pairs: all of them where they are 4096 or fewer."""
    if size * (size - 1) // 2 <= _PAIRS:
        first, second = np.triu_indices(size, 1)
    else:
        draws = np.random.default_rng(0)
        first = draws.integers(0, size, _PAIRS)
        second = (first + draws.integers(1, size, _PAIRS)) % size
    return first.astype(np.int32), second.astype(np.int32)


def masked_quantile(values: Float[Array, " M"], keep: Bool[Array, " M"], share: Scalar) -> Scalar:
    """Return the least of the kept values that at least this share of them does not exceed.

    Args:
        values: not negative.
        keep: which values count.
        share: in [0, 1].

    Returns:
        One of the values; plus infinity if none is kept.
    """
    kind, width = (jnp.int64, 63) if values.dtype == jnp.float64 else (jnp.int32, 31)
    bits = jax.lax.bitcast_convert_type(values, kind)
    count = jnp.sum(keep)
    wanted = jnp.maximum(jnp.ceil(share * count.astype(values.dtype)).astype(count.dtype), 1)
    top = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, values.dtype), kind)

    def halve(_, ends):
        low, high = ends
        middle = low + (high - low) // 2
        enough = jnp.sum((bits <= middle) & keep) >= wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    _, found = jax.lax.fori_loop(0, width, halve, (jnp.zeros((), kind), top))
    return jax.lax.bitcast_convert_type(found, values.dtype)


def scaled_kernel(kernel: Any, square: Scalar) -> Any:
    r"""Return the kernel with its lengthscale in units of the bandwidth :math:`\sqrt h`."""
    return dataclasses.replace(kernel, lengthscale=kernel.lengthscale * jnp.sqrt(square))


def check_rule(kernel: Any, rule: str) -> None:
    """Refuse unknown rules, and kernels without a lengthscale for the rule to set.

    Raises:
        ValueError: the rule is unknown.
        TypeError: the kernel is not a function of a scaled distance.
    """
    notice(kernel)
    if rule not in RULES:
        raise ValueError(f"bandwidth must be one of {', '.join(RULES)}; got {rule!r}")
    if rule != "fixed" and not isinstance(kernel, Stationary):
        raise TypeError(
            f"bandwidth={rule!r} sets the lengthscale of the kernel, and a {type(kernel).__name__} has none; use "
            f"kernels.{RBF.__name__}() or kernels.{InverseMultiquadric.__name__}(), or bandwidth='fixed'"
        )
