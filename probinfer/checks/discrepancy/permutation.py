"""Random relabelling of two sets of draws: exact for independent draws, in blocks for chains.

Under the hypothesis of one distribution the labels of independent draws may be exchanged, so the rank of the statistic
among those of random labels is uniform: a p-value with no asymptotics. The draws of a chain are not exchangeable;
stretches of it that are long beside its correlation time nearly are, so whole stretches are relabelled.

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

__all__ = ["Pooled", "pool", "pvalue", "random_labels", "standardize"]

_TIMES = 8  # correlation times in a block; what a block still shares with its neighbours biases its variance by 1/16
_LEAST = 20  # blocks, below which neither the correlation time nor the p-value mean anything


class Pooled(NamedTuple):
    """Two sets of draws below one another, in blocks that may change places.

    Attributes:
        rows: ``(n, d)``, first those of a.
        sizes: draws of a and of b.
        block: draws in a block; 1 for independent draws.
    """

    rows: Float[Array, "n d"]
    sizes: tuple[int, int]
    block: int


def pool(a: FlatDraws, b: FlatDraws) -> Pooled:
    """Pool two sets; the first draws of a chain are dropped where its length is no multiple of the block.

    Raises:
        ValueError: too few blocks: the chains are too short for their correlation.
    """
    time = max(correlation_time(a), correlation_time(b))
    block = 1
    if not (a.independent and b.independent):
        block = 2 ** math.ceil(math.log2(_TIMES * time))  # few lengths: few compilations
    parts = [draws.values[:, draws.values.shape[1] % block :] for draws in (a, b)]
    counts = [part.shape[0] * part.shape[1] // block for part in parts]
    if min(counts) == 0 or sum(counts) < _LEAST:
        raise ValueError(
            f"cannot tell: one draw in {time:.0f} is independent, so a and b make {counts[0]} and {counts[1]} blocks "
            f"of {block} draws, and a verdict needs {_LEAST} together; run longer chains"
        )
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    return Pooled(jnp.concatenate(rows), (len(rows[0]), len(rows[1])), block)


def standardize(pooled: Pooled, scale: str | None) -> Pooled:
    """Measure every coordinate in units of its pooled standard deviation, or leave it.

    Raises:
        ValueError: an unknown scale.
    """
    if scale not in ("pooled", None):
        raise ValueError(f"scale must be 'pooled' or None, got {scale!r}")
    if scale is None:
        return pooled
    rows = pooled.rows
    return pooled._replace(rows=(rows - jnp.mean(rows, axis=0)) / jnp.std(rows, axis=0))


def random_labels(key: PRNGKey | None, pooled: Pooled, num: int) -> Bool[Array, "m n"]:
    """Return who belongs to a: first the truth, then ``num`` random relabellings of the blocks; no key: the truth only.

    Raises:
        ValueError: ``num`` below 19, with which no p-value reaches 0.05.
    """
    if num < 19:
        raise ValueError(f"num_permutations must be at least 19 to reach a p-value of 0.05, got {num}")
    blocks = len(pooled.rows) // pooled.block
    truth = jnp.arange(blocks) < pooled.sizes[0] // pooled.block
    if key is None:
        labels = truth[None]
    else:
        labels = jnp.concatenate([truth[None], _shuffle(key, truth, num)])
    return jnp.repeat(labels, pooled.block, axis=1)


@partial(jax.jit, static_argnames="num")
def _shuffle(key: PRNGKey, truth: Array, num: int) -> Array:
    return jax.lax.map(lambda k: jax.random.permutation(k, truth), jax.random.split(key, num))


def pvalue(statistic: float, null: np.ndarray) -> float | None:
    """Return ``(1 + #{null ≥ statistic}) / (1 + m)``; without a null there is none."""
    slack = 1e-5 * abs(statistic) if null.dtype == np.float32 else 1e-10 * abs(statistic)
    return float(1 + np.sum(null >= statistic - slack)) / (1 + len(null)) if len(null) else None
