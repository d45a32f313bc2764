"""Maximum mean discrepancy of two sets of draws, at several scales at once."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.checks.discrepancy.permutation import Pooled, pool, random_labels, standardize
from probinfer.checks.discrepancy.two_sample import TwoSampleReport, pair_statistics, report
from probinfer.checks.draws import collect_pair
from probinfer.checks.power.distances import detectable_in_pairs
from probinfer.core.identity import refresh_classes
from probinfer.core.types import Array, PRNGKey
from probinfer.kernels import Kernel
from probinfer.kernels.stationary import squared_distances

__all__ = ["mmd"]

_LENGTHSCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # in units of the median distance
_MAX_MEDIAN_DRAWS = 1000


def mmd(
    a: Any,
    b: Any,
    *,
    key: PRNGKey | None = None,
    kernel: Kernel | None = None,
    scale: str | None = "pooled",
    num_permutations: int = 499,
    level: float = 0.05,
) -> TwoSampleReport:
    r"""Estimate the squared maximum mean discrepancy without bias, and test it by permutation.

    .. math:: \frac{1}{n(n-1)} \sum_{i \ne j} k(a_i, a_j) + \frac{1}{m(m-1)} \sum_{i \ne j} k(b_i, b_j)
        - \frac{2}{nm} \sum_{ij} k(a_i, b_j)

    The default kernel is the mean of five squared exponentials whose lengthscales are the median distance times
    1/4 ... 4. Time O((n + m)² (d + num_permutations)), memory O((n + m) (d + num_permutations)).

    Args:
        a: draws: ``(n, d)`` independent, ``(chain, draw, d)``, or a tree with leaves (chain, draw, ...).
        b: draws of the other set, in any of these forms.
        key: random key of the permutations; None: no p-value.
        kernel: a kernel of ``probinfer.kernels``; None: the default.
        scale: "pooled" divides each coordinate by its standard deviation over both sets; None leaves them.
        num_permutations: number of relabelings; of blocks of eight correlation times if a set has chains.
        level: significance level of the verdict.

    Returns:
        The statistic, its p-value and null distribution, and the verdict.

    Raises:
        TypeError: the draws are not floating point.
        ValueError: ``collect_pair`` refuses the draws, or there are too few blocks or permutations.

    References:
        Gretton, Borgwardt, Rasch, Schoelkopf and Smola (2012), "A kernel two-sample test", equation 3.
    """
    refresh_classes(kernel)
    pooled = standardize(pool(*collect_pair(a, b)), scale)
    labels = random_labels(key, pooled, num_permutations)
    if kernel is None:
        block_fn = jax.tree_util.Partial(
            _multiscale, _median_distance(pooled) * jnp.asarray(_LENGTHSCALES, pooled.rows.dtype)
        )
    else:
        block_fn = jax.tree_util.Partial(_gram, kernel)
    within_a, within_b, between = pair_statistics(block_fn, pooled, labels)
    n, m = pooled.sizes
    statistics = within_a / (n * (n - 1.0)) + within_b / (m * (m - 1.0)) - 2 * between / (1.0 * n * m)
    yardstick = partial(detectable_in_pairs, block_fn, 1, pooled)
    return report("squared MMD", statistics, pooled, level, yardstick)


def _multiscale(lengthscales: Array, rows: Array, columns: Array) -> Array:
    squared = squared_distances(rows, columns)
    return jnp.exp(-0.5 * squared / lengthscales[:, None, None] ** 2) / lengthscales.shape[0]


def _gram(kernel: Kernel, rows: Array, columns: Array) -> Array:
    return kernel.gram(rows, columns)[None]


def _median_distance(pooled: Pooled) -> Array:
    """Compute the median distance of at most 1000 pooled draws; pooled, so that it does not depend on the labels."""
    return _median(pooled.rows[:: math.ceil(len(pooled.rows) / _MAX_MEDIAN_DRAWS)])


@jax.jit
def _median(rows: Array) -> Array:
    squared = squared_distances(rows, rows)[np.triu_indices(len(rows), 1)]
    return jnp.median(jnp.sqrt(jnp.where(squared > 0, squared, jnp.mean(squared))))
