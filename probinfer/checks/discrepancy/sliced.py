"""Sliced Wasserstein distance of two sets of draws: optimal transport along many lines."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.checks.discrepancy.permutation import pool, random_labels, standardize
from probinfer.checks.discrepancy.two_sample import TwoSampleReport, report
from probinfer.checks.draws import collect_pair
from probinfer.checks.power.distances import detectable_on_lines
from probinfer.core.types import Array, Float, PRNGKey

__all__ = ["directions", "sliced_wasserstein"]


def sliced_wasserstein(
    a: Any,
    b: Any,
    *,
    key: PRNGKey | None = None,
    scale: str | None = "pooled",
    num_directions: int = 64,
    num_permutations: int = 199,
    level: float = 0.05,
) -> TwoSampleReport:
    r"""Compute the mean over directions w of :math:`W_2^2(a \cdot w, b \cdot w)`, and test it by permutation.

    On a line the squared distance is :math:`\int_0^1 (F_a^{-1}(q) - F_b^{-1}(q))^2 dq`, exact for unequal numbers of
    draws too. Time O(num_directions (n + m) num_permutations).

    Args:
        a: draws: ``(n, d)`` independent, ``(chain, draw, d)``, or a tree with leaves (chain, draw, ...).
        b: draws of the other set, in any of these forms.
        key: random key of the permutations; None: no p-value.
        scale: "pooled" divides each coordinate by its standard deviation over both sets; None leaves them.
        num_directions: size of a fixed, even cover of the sphere, so that the distance depends on the draws alone.
        num_permutations: number of relabelings; of blocks of eight correlation times if a set has chains.
        level: significance level of the verdict.

    Returns:
        The statistic (squared distance; positive also for equal distributions), its p-value and null distribution, and
        the verdict.

    Raises:
        TypeError: the draws are not floating point.
        ValueError: ``collect_pair`` refuses the draws, or there are too few blocks, permutations or directions.

    References:
        Bonneel, Rabin, Peyre and Pfister (2015), "Sliced and Radon Wasserstein barycenters of measures", section 3.
    """
    if num_directions < 1:
        raise ValueError(f"num_directions must be at least 1, got {num_directions}")
    pooled = standardize(pool(*collect_pair(a, b)), scale)
    labels = random_labels(key, pooled, num_permutations)
    lines = directions(num_directions, pooled.rows.shape[1])
    statistics = _sliced(pooled.rows, labels, jnp.asarray(lines, pooled.rows.dtype), sizes=pooled.sizes)
    yardstick = partial(detectable_on_lines, lines, pooled)
    return report("squared sliced Wasserstein distance", statistics, pooled, level, yardstick)


def directions(num: int, dims: int) -> Float[np.ndarray, "num dims"]:
    """Return unit vectors from a Kronecker sequence of normal quantiles; a single one in one dimension.

    References:
        Roberts (2018): additive recurrence with powers of the root of x^(d + 1) = x + 1.
    """
    if dims == 1:
        return np.ones((1, 1))
    from scipy.special import ndtri

    root = 2.0
    for _ in range(64):
        root = (1 + root) ** (1 / (dims + 1))
    steps = np.arange(1, num + 1)[:, None] * root ** -np.arange(1, dims + 1)
    normal = ndtri(np.clip((0.5 + steps) % 1, 1e-9, 1 - 1e-9))
    return normal / np.linalg.norm(normal, axis=1, keepdims=True)


@partial(jax.jit, static_argnames="sizes")
def _sliced(rows: Array, labels: Array, lines: Array, *, sizes: tuple[int, int]) -> Array:
    piece_widths, order_a, order_b = _quantile_pieces(*sizes)
    widths = jnp.asarray(piece_widths, rows.dtype)

    def distances_along(line):
        projected = rows @ line
        order = jnp.argsort(projected)
        ordered = projected[order]

        def distance(label):
            in_a = label[order]
            count_a = jnp.cumsum(in_a, dtype=jnp.int32)
            # The draws of a, then those of b, both in order: one scatter, several times faster than two searches.
            index = jnp.where(in_a, count_a - 1, sizes[0] + jnp.arange(len(in_a)) - count_a)
            separated = jnp.zeros_like(ordered).at[index].set(ordered, unique_indices=True)
            return jnp.sum(widths * (separated[order_a] - separated[sizes[0] + order_b]) ** 2)

        return jax.lax.map(distance, labels)

    return (
        jax.lax.fori_loop(
            0,
            lines.shape[0],
            lambda i, total: total + distances_along(lines[i]),
            jnp.zeros(labels.shape[0], rows.dtype),
        )
        / lines.shape[0]
    )


def _quantile_pieces(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pieces of [0, 1] on which both empirical quantile functions are constant: their widths and draws."""
    edges = np.unique(np.concatenate([np.arange(n + 1) * m, np.arange(m + 1) * n]))
    return np.diff(edges) / (n * m), edges[:-1] // m, edges[:-1] // n
