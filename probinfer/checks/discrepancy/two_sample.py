"""The report of distances between two sets of draws, and the sums over pairs of draws that two distances need.

With ``labels`` l in {0, 1} and a symmetric function k, the three means over pairs (within a, within b, between) follow
from two sums: l'Kl and l'K1 (without the diagonal of K). So one pass over the tiles of K gives the statistic and its
permutation distribution.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from probinfer.checks.discrepancy.permutation import Pooled, critical_value, pvalue
from probinfer.checks.power.ranks import Detectable
from probinfer.core.types import Array, Bool
from probinfer.numerics.pairwise import pair_sums
from probinfer.plots.ranks import draw_null

__all__ = ["TwoSampleReport", "pair_statistics", "report"]


@dataclasses.dataclass(frozen=True)
class TwoSampleReport:
    """A distance between two sets of draws, with its distribution under the hypothesis of one distribution.

    Attributes:
        name: name of the distance.
        statistic: the distance; unbiased estimates may be negative.
        pvalue: permutation p-value; None without a key.
        null: ``(num_permutations,)`` statistics of relabeled draws.
        sizes: numbers of draws of a and b that were used.
        block: number of draws that were relabeled together; 1 for independent draws.
        level: significance level of the verdict.
        yardstick: ``(null, critical value, level)`` -> ``power``.
    """

    name: str
    statistic: float
    pvalue: float | None
    null: Shaped[np.ndarray, " m"]
    sizes: tuple[int, int]
    block: int
    level: float
    yardstick: Callable[[np.ndarray, float, float], Detectable] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    @property
    def detectable(self) -> float | None:
        """Critical value: a larger statistic counts as a difference at the level."""
        return critical_value(self.null, self.level)

    @functools.cached_property
    def power(self) -> Detectable | None:
        """Errors of one set that are detected with probability 0.9; None without a p-value."""
        if self.yardstick is None or self.detectable is None:
            return None
        return self.yardstick(self.null, self.detectable, self.level)

    @property
    def passed(self) -> bool | None:
        """True if no difference was detected, False if one was, None without a p-value."""
        return None if self.pvalue is None else self.pvalue > self.level

    @property
    def verdict(self) -> str:
        """The verdict in one sentence, with the errors that could have been detected."""
        summary = f"{self.name} = {self.statistic:.3g} from {self.sizes[0]} and {self.sizes[1]} draws"
        if self.pvalue is None:
            return f"cannot tell: {summary}, and no p-value; pass key=jax.random.key(...)"
        tail = f"p = {self.pvalue:.2g}, {len(self.null)} permutations"
        if self.block > 1:
            tail += f" of blocks of {self.block} draws"
        if self.pvalue <= self.level:
            return f"the draws differ in distribution: {summary} ({tail})"
        power = f"; the check {self.power}" if self.power is not None else ""
        return f"no difference seen: {summary} ({tail}; the critical value is {self.detectable:.3g}){power}"

    def plot(self, axes: Any = None) -> Any:
        """Draw the permutation distribution and the statistic; return the axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        axes = draw_null(axes, self.null, self.statistic, null_label="relabeled draws")
        axes.set(xlabel=self.name, ylabel="permutations")
        return axes


def report(
    name: str, statistics: Array, pooled: Pooled, level: float, yardstick: Callable[..., Detectable]
) -> TwoSampleReport:
    """Build the report from statistics, of which the first belongs to the true labels."""
    values = np.asarray(statistics)
    statistic, null = float(values[0]), values[1:]
    return TwoSampleReport(
        name=name,
        statistic=statistic,
        pvalue=pvalue(statistic, null),
        null=null,
        sizes=pooled.sizes,
        block=pooled.block,
        level=float(level),
        yardstick=yardstick,
    )


def pair_statistics(block_fn: Any, pooled: Pooled, labels: Bool[Array, "m n"]) -> tuple[Array, Array, Array]:
    """Return sums of k over ordered pairs i ≠ j for every labeling: within a, within b, and over a times b.

    Args:
        block_fn: two slices of draws -> ``(S, b, b)`` values of symmetric functions, which are summed.
        pooled: n draws.
        labels: true for the draws of a.

    Returns:
        Three arrays ``(m,)``.
    """
    sums = pair_sums(block_fn, pooled.rows, labels.T.astype(jnp.int8))
    within_a = sums.forms
    between = sums.linear - sums.forms
    within_b = jnp.sum(sums.totals) - 2 * sums.linear + sums.forms
    return jax.block_until_ready((within_a, within_b, between))
