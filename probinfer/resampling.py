r"""Resampling replaces a weighted sample by draws from it.

A *scheme* is a function ``(key, log_weights (n,), num) -> (ancestors (num,), log_weights (num,))``. It keeps
the weighted measure in expectation, total weight included: for every function f,
:math:`E\sum_j w'_j f(x_{a_j}) = \sum_i w_i f(x_i)`. So the log evidence carried by the weights survives
resampling, a wrapper such as "only below an effective sample size" has the same signature, and weights that
are all zero stay all zero. A draw of weight zero is never chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from probinfer import weights
from probinfer.types import Array, Float, Int, PRNGKey

__all__ = ["Scheme", "systematic"]

Scheme = Callable[[Array, Array, int], tuple[Array, Array]]


@partial(jax.jit, static_argnames="num")
def systematic(
    key: PRNGKey, log_weights: Float[Array, " n"], num: int
) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
    r"""Choose draw i either floor or ceil of :math:`num\,W_i` times, on average :math:`num\,W_i` times.

    One uniform number u; the ancestors are where the cumulative normalised weight passes
    :math:`(u + j)/num,\; j = 0 \dots num-1`. Linear in n + num; ancestors come sorted.

    Args:
        key: random key.
        log_weights: unnormalised log weights, minus infinity allowed.
        num: how many to choose, at least 1; need not be n.

    Returns:
        ancestors: indices into the sample, none of weight zero.
        log_weights: all equal to log(sum of the weights / num). When every weight is zero they are minus
            infinity,
        when one is NaN or plus infinity they are NaN (see ``weights.status``); the ancestors are then 0, 1,
        ...

    Raises:
        ValueError: ``num`` is not positive or there is nothing to choose from.

    References:
        Kitagawa (1996); Carpenter, Clifford and Fearnhead (1999).
    """
    size = log_weights.shape[0]
    if num < 1 or size < 1:
        raise ValueError(
            f"resampling needs num >= 1 and at least one weight, got num={num} and {size} weights"
        )
    log_normalized, log_sum = weights.normalize(log_weights)
    offset = jax.random.uniform(key, (), log_weights.dtype)
    bounds = _offspring_bounds(jnp.exp(log_normalized), offset, num)
    # draw j descends from the number of particles whose cumulative offspring count is at most j
    counts = jnp.zeros(num, jnp.int32).at[bounds].add(1, mode="drop")
    ancestors = jnp.where(
        jnp.isfinite(log_sum), jnp.cumsum(counts, dtype=jnp.int32), jnp.arange(num, dtype=jnp.int32) % size
    )
    return ancestors.astype(jnp.int32), jnp.full(num, log_sum - jnp.log(jnp.asarray(num, log_sum.dtype)))


def _offspring_bounds(probabilities: Array, offset: Array, num: int) -> Array:
    """Return how many draws descend from particles 0 ... i, non-decreasing, exactly flat at zero weights.

    A floating-point cumulative sum is neither monotone nor flat at zeros (XLA associates it as it likes), and
    in single precision it is wrong by whole offspring for a million particles. So the whole and the
    fractional parts of the expected counts are summed as integers: exact, the fractional part modulo one with
    its carries.
    """
    dtype = probabilities.dtype
    unsigned, bits = (jnp.uint64, 64) if dtype == jnp.float64 else (jnp.uint32, 32)
    expected = jnp.where(jnp.isfinite(probabilities), probabilities, 0) * num
    whole = jnp.floor(expected)
    fraction = ((expected - whole) * 2.0**bits).astype(unsigned)
    wrapped = jnp.cumsum(fraction, dtype=unsigned)
    whole = jnp.cumsum(whole.astype(jnp.int32) + (wrapped < fraction), dtype=jnp.int32)
    fraction = wrapped.astype(dtype) * 2.0**-bits
    # the rounded normalisation left a total of num + O(eps num): spread the difference in proportion
    missing = (num - whole[-1]).astype(dtype) - fraction[-1]
    correction = missing * ((whole.astype(dtype) + fraction) / num)
    bounds = whole + jnp.ceil(fraction + correction - offset).astype(jnp.int32)
    bounds = jax.lax.cummax(jnp.clip(bounds, 0, num))
    index = jnp.arange(probabilities.shape[0])
    last = jnp.max(jnp.where(expected > 0, index, 0))
    return jnp.where(index >= last, num, bounds)
