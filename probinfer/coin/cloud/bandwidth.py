r"""Kernel bandwidths for a cloud: the median of the squared distances of its particles.

The median is that of a fixed random sample of at most 4096 pairs, found by bisection on the bits of the distances
(floating-point numbers of one sign are ordered like integers), so it costs O(d) for any N, without a sort.

* ``"median"``: :math:`h = \mathrm{med}\, r^2`. In the first 32 steps of a run a lower quantile, which rises from 2 % to
  50 %: near particles interact first, so that the particles divide between modes before the cloud drifts as a whole,
  and no particle is ever isolated, in any dimension.
* ``"published"``: :math:`h = \mathrm{med}\, r^2 / \log(N + 1)` over all N² pairs, including the N pairs of a particle
  with itself. With it the cloud is far too narrow in high dimension (``coin.predicted_sd``).
* ``"fixed"``: the lengthscale of the kernel is not changed; it is in the coordinates of the geometry.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.identity import refresh_classes
from probinfer.core.types import Array, Bool, Float, Int, Scalar
from probinfer.kernels import RBF, InverseMultiquadric
from probinfer.kernels.stationary import Stationary

__all__ = ["RULES", "check_rule", "masked_quantile", "pair_sample", "scaled_kernel", "squared_bandwidth"]

RULES = ("median", "published", "fixed")
_MAX_PAIRS = 4096
_FIRST_QUANTILE, _NUM_WARMUP = 0.02, 32  # steps until the quantile is the median


def squared_bandwidth(
    rule: str, table: Float[Array, "N d"], mask: Bool[Array, " N"], step: Int[Array, ""]
) -> Scalar:
    """Return the squared bandwidth h of the particles in the mask.

    Args:
        rule: "median" or "published".
        table: the cloud, in the coordinates of its geometry.
        mask: which particles count.
        step: number of the step in the run, from 0.

    References:
        Liu and Wang (2016), section 5, for the published rule.
    """
    num_particles = table.shape[0]
    first, second = pair_sample(num_particles)
    squares = jnp.sum((table[first] - table[second]) ** 2, axis=1)
    pair_mask = mask[first] & mask[second]
    if rule == "median":
        progress = jnp.minimum(step.astype(table.dtype) / _NUM_WARMUP, 1)
        quantile = 0.5 * jnp.exp(math.log(2 * _FIRST_QUANTILE) * (1 - progress))
    else:  # the median over N² pairs, of which N are zero, is this quantile over the pairs of different particles
        quantile = jnp.asarray(max((num_particles - 2) / (2 * (num_particles - 1)), 0.0), table.dtype)
    square = masked_quantile(squares, pair_mask, quantile)
    # If there are so many duplicates that the median is zero, the mean still gives a scale.
    mean = jnp.sum(jnp.where(pair_mask, squares, 0)) / jnp.maximum(jnp.sum(pair_mask), 1)
    square = jnp.where(square > 0, square, mean)
    return square / math.log(num_particles + 1) if rule == "published" else square


@functools.lru_cache
def pair_sample(num_particles: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and second members of a fixed random sample of pairs: all pairs if they are at most 4096."""
    if num_particles * (num_particles - 1) // 2 <= _MAX_PAIRS:
        first, second = np.triu_indices(num_particles, 1)
    else:
        rng = np.random.default_rng(0)
        first = rng.integers(0, num_particles, _MAX_PAIRS)
        second = (first + rng.integers(1, num_particles, _MAX_PAIRS)) % num_particles
    return first.astype(np.int32), second.astype(np.int32)


def masked_quantile(values: Float[Array, " M"], mask: Bool[Array, " M"], quantile: Scalar) -> Scalar:
    """Return the smallest value in the mask that is not exceeded by at least this share of them.

    Args:
        values: nonnegative.
        mask: which values count.
        quantile: the share, in [0, 1].

    Returns:
        One of the values; plus infinity if the mask is empty.
    """
    integer, width = (jnp.int64, 63) if values.dtype == jnp.float64 else (jnp.int32, 31)
    bits = jax.lax.bitcast_convert_type(values, integer)
    count = jnp.sum(mask)
    rank = jnp.maximum(jnp.ceil(quantile * count.astype(values.dtype)).astype(count.dtype), 1)
    infinity = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, values.dtype), integer)

    def bisect(_, bracket):
        low, high = bracket
        middle = low + (high - low) // 2
        enough = jnp.sum((bits <= middle) & mask) >= rank
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    _, value = jax.lax.fori_loop(0, width, bisect, (jnp.zeros((), integer), infinity))
    return jax.lax.bitcast_convert_type(value, values.dtype)


def scaled_kernel(kernel: Any, square: Scalar) -> Any:
    r"""Return the kernel with its lengthscale in units of the bandwidth :math:`\sqrt h`."""
    return dataclasses.replace(kernel, lengthscale=kernel.lengthscale * jnp.sqrt(square))


def check_rule(kernel: Any, rule: str) -> None:
    """Refuse unknown rules, and kernels without a lengthscale that the rule could set.

    Raises:
        ValueError: The rule is unknown.
        TypeError: The kernel is not a function of a scaled distance.
    """
    refresh_classes(kernel)
    if rule not in RULES:
        raise ValueError(f"bandwidth must be one of {', '.join(RULES)}; got {rule!r}")
    if rule != "fixed" and not isinstance(kernel, Stationary):
        raise TypeError(
            f"bandwidth={rule!r} sets the lengthscale of the kernel, but a {type(kernel).__name__} has none; use "
            f"kernels.{RBF.__name__}() or kernels.{InverseMultiquadric.__name__}(), or bandwidth='fixed'"
        )
