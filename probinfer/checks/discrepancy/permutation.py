"""Random relabeling of two sets of draws: exact for independent draws, in blocks for chains.

Under the hypothesis of one distribution the labels of independent draws are exchangeable, so the rank of the statistic
among those of random labels is uniform: the p-value needs no asymptotics. The draws of a chain are not exchangeable,
but blocks much longer than its correlation time nearly are, so whole blocks are relabeled.

References:
    Phipson and Smyth (2010), "Permutation p-values should never be zero"; Kunsch (1989) for blocks of dependent data.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.checks.draws import FlatDraws, correlation_time
from probinfer.core.types import Array, Bool, Float, PRNGKey

__all__ = ["Pooled", "critical_value", "pool", "pvalue", "random_labels", "standardize"]

_BLOCK_CORRELATION_TIMES = 8  # correlation between neighboring blocks biases the variance by 1/16
_MIN_BLOCKS = 20  # with fewer, neither the correlation time nor the p-value is reliable


class Pooled(NamedTuple):
    """Two sets of draws, concatenated, in exchangeable blocks.

    Attributes:
        rows: ``(n, d)``, the draws of a, then those of b.
        sizes: numbers of draws of a and of b.
        block: number of draws in a block; 1 for independent draws.
    """

    rows: Float[Array, "n d"]
    sizes: tuple[int, int]
    block: int


def pool(a: FlatDraws, b: FlatDraws) -> Pooled:
    """Pool two sets; the first draws of a chain are dropped if its length is not a multiple of the block.

    Raises:
        ValueError: there are too few blocks, as the chains are too short for their correlation.
    """
    time = max(correlation_time(a), correlation_time(b))
    block = 1
    if not (a.independent and b.independent):
        block = 2 ** math.ceil(
            math.log2(_BLOCK_CORRELATION_TIMES * time)
        )  # powers of two: few shapes to compile
    parts = [draws.values[:, draws.values.shape[1] % block :] for draws in (a, b)]
    counts = [part.shape[0] * part.shape[1] // block for part in parts]
    if min(counts) == 0 or sum(counts) < _MIN_BLOCKS:
        raise ValueError(
            f"cannot tell: one draw in {time:.0f} is independent, so a and b have {counts[0]} and {counts[1]} blocks "
            f"of {block} draws, and a verdict needs {_MIN_BLOCKS} in total; run longer chains"
        )
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    return Pooled(jnp.concatenate(rows), (len(rows[0]), len(rows[1])), block)


def standardize(pooled: Pooled, scale: str | None) -> Pooled:
    """Standardize every coordinate by the pooled sets if ``scale`` is "pooled"; leave it if it is None.

    Raises:
        ValueError: ``scale`` is unknown.
    """
    if scale not in ("pooled", None):
        raise ValueError(f"scale must be 'pooled' or None, got {scale!r}")
    if scale is None:
        return pooled
    rows = pooled.rows
    return pooled._replace(rows=(rows - jnp.mean(rows, axis=0)) / jnp.std(rows, axis=0))


def random_labels(key: PRNGKey | None, pooled: Pooled, num: int) -> Bool[Array, "m n"]:
    """Return masks of the draws of a: the true labels, then ``num`` random relabelings of the blocks if there is a key.

    Raises:
        ValueError: ``num`` is below 19, so that no p-value reaches 0.05.
    """
    if num < 19:
        raise ValueError(f"num_permutations must be at least 19 to reach a p-value of 0.05, got {num}")
    blocks = len(pooled.rows) // pooled.block
    true_labels = jnp.arange(blocks) < pooled.sizes[0] // pooled.block
    if key is None:
        labels = true_labels[None]
    else:
        labels = jnp.concatenate([true_labels[None], _shuffle(key, true_labels, num)])
    return jnp.repeat(labels, pooled.block, axis=1)


@partial(jax.jit, static_argnames="num")
def _shuffle(key: PRNGKey, labels: Array, num: int) -> Array:
    return jax.lax.map(lambda k: jax.random.permutation(k, labels), jax.random.split(key, num))


def pvalue(statistic: float, null: np.ndarray) -> float | None:
    """Return ``(1 + #{null ≥ statistic}) / (1 + m)``; None without a null distribution."""
    # Statistics of equivalent labels differ by rounding.
    tolerance = 1e-5 * abs(statistic) if null.dtype == np.float32 else 1e-10 * abs(statistic)
    return float(1 + np.sum(null >= statistic - tolerance)) / (1 + len(null)) if len(null) else None


def critical_value(null: np.ndarray, level: float) -> float | None:
    """Return the largest statistic that does not count as a difference; None without a null distribution."""
    return float(np.quantile(null, 1 - level, method="higher")) if len(null) else None
