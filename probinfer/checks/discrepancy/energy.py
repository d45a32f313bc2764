"""Energy distance of two sets of draws."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.checks.discrepancy.permutation import pool, random_labels, standardize
from probinfer.checks.discrepancy.two_sample import TwoSampleReport, pair_statistics, report
from probinfer.checks.draws import collect_pair
from probinfer.checks.power.distances import detectable_in_pairs
from probinfer.core.types import Array, PRNGKey
from probinfer.kernels.stationary import squared_distances

__all__ = ["energy_distance"]


def energy_distance(
    a: Any,
    b: Any,
    *,
    key: PRNGKey | None = None,
    scale: str | None = "pooled",
    num_permutations: int = 499,
    level: float = 0.05,
) -> TwoSampleReport:
    r"""Estimate :math:`2 E|a - b| - E|a - a'| - E|b - b'|` without bias, and test it by permutation.

    The expectation is zero if and only if the distributions are equal; there is no scale to choose. Time and memory as
    ``mmd``.

    Args:
        a: draws: ``(n, d)`` independent, ``(chain, draw, d)``, or a tree with leaves (chain, draw, ...).
        b: draws of the other set, in any of these forms.
        key: random key of the permutations; None: no p-value.
        scale: "pooled" divides each coordinate by its standard deviation over both sets; None leaves them.
        num_permutations: number of relabelings; of blocks of eight correlation times if a set has chains.
        level: significance level of the verdict.

    Returns:
        The statistic, its p-value and null distribution, and the verdict.

    Raises:
        TypeError: the draws are not floating point.
        ValueError: ``collect_pair`` refuses the draws, or there are too few blocks or permutations.

    References:
        Szekely and Rizzo (2013), "Energy statistics", section 6; here over distinct pairs.
    """
    pooled = standardize(pool(*collect_pair(a, b)), scale)
    labels = random_labels(key, pooled, num_permutations)
    block_fn = jax.tree_util.Partial(_distances)
    within_a, within_b, between = pair_statistics(block_fn, pooled, labels)
    n, m = pooled.sizes
    statistics = 2 * between / (1.0 * n * m) - within_a / (n * (n - 1.0)) - within_b / (m * (m - 1.0))
    yardstick = partial(detectable_in_pairs, block_fn, -1, pooled)
    return report("energy distance", statistics, pooled, level, yardstick)


def _distances(rows: Array, columns: Array) -> Array:
    return jnp.sqrt(squared_distances(rows, columns))[None]
