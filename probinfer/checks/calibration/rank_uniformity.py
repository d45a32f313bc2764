"""Verdict on a table of ranks: which quantities are not uniform, and how small an error would have been detected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from jaxtyping import Float

from probinfer.checks.calibration.bands import Band, ecdf_band, ecdf_pvalue
from probinfer.checks.calibration.ranks import RankTable
from probinfer.checks.power.ranks import Detectable, in_normal_quantity
from probinfer.plots.ranks import axes_or_new, draw_band, draw_ecdf

__all__ = ["OUTCOMES", "UniformityReport", "Yardstick", "holm", "judge", "uniformity"]

Yardstick = Callable[[int, float], tuple[Detectable, int | None]]

OUTCOMES = {True: "passes", False: "fails", None: "cannot tell"}


def holm(pvalues: Float[np.ndarray, " Q"]) -> Float[np.ndarray, " Q"]:
    r"""Adjust p-values for multiple testing by Holm's rule.

    :math:`\tilde p_{(i)} = \max_{j\le i}\min\{(Q-j+1)\,p_{(j)},\,1\}`; valid under any dependence.

    Args:
        pvalues: one per test.

    References:
        Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(pvalues)
    factors = len(pvalues) - np.arange(len(pvalues))
    adjusted = np.minimum(np.maximum.accumulate(pvalues[order] * factors), 1.0)
    return adjusted[np.argsort(order)]


@dataclass(frozen=True)
class UniformityReport:
    """Test of the ranks of many simulations for uniformity.

    Attributes:
        ranks: table of ranks.
        pvalues: by quantity, adjusted by Holm's rule over the quantities; quantities that never vary are left out.
        raw_pvalues: by quantity, unadjusted.
        level: probability of a false alarm of the whole report.
        num_simulations: number of simulations in which every quantity was ranked.
        yardstick: ``(num_simulations, level of one quantity)`` -> ``(power, needed)``.
    """

    ranks: RankTable
    pvalues: dict[str, float]
    raw_pvalues: dict[str, float]
    level: float
    num_simulations: int
    yardstick: Yardstick = field(repr=False, compare=False)

    @property
    def power(self) -> Detectable | None:
        """Smallest errors that one quantity of the family would have detected; None if nothing was ranked."""
        return self._power_and_needed[0]

    @property
    def needed(self) -> int | None:
        """Number of simulations needed for a verdict if there were too few; None if no number is enough."""
        return self._power_and_needed[1]

    @cached_property
    def _power_and_needed(self) -> tuple[Detectable | None, int | None]:
        if not self.pvalues or not self.num_simulations:
            return None, None
        return self.yardstick(self.num_simulations, self.level / len(self.pvalues))

    @cached_property
    def bands(self) -> Band:
        """Band of one quantity of the family: ranks that leave it are rejected even after Holm's correction."""
        num_simulations = max(self.num_simulations, 1)
        level = self.level / max(len(self.pvalues), 1)
        return ecdf_band(num_simulations, self.ranks.num_draws + 1, level=1 - level)

    @property
    def rejected(self) -> tuple[str, ...]:
        """Quantities whose ranks are not uniform."""
        return tuple(name for name, value in self.pvalues.items() if value <= self.level)

    @property
    def blind(self) -> str | None:
        """Reason why the check cannot tell although nothing was rejected; None if it can."""
        table, total = self.ranks, len(self.ranks.ranks)
        if self.power is None:
            return "no quantity could be ranked"
        if not self.power.enough:
            advice = "no number of simulations is enough; take more independent draws"
            if self.needed is not None:
                advice = f"about {self.needed} simulations are needed with {table.num_draws} draws each"
            return f"{self.num_simulations} simulations are too few: the check {self.power}; {advice}"
        width = float(np.max(self.bands.upper - self.bands.points))
        num_failed = total - self.num_simulations
        if num_failed > width * total:
            return (
                f"{num_failed} of {total} simulations failed, which could hide an error larger than the band; repair "
                "or explain them"
            )
        return None

    @property
    def passed(self) -> bool | None:
        """True, False, or None if the check cannot tell."""
        return False if self.rejected else None if self.blind else True

    @property
    def verdict(self) -> str:
        """The verdict in words, with what the check could have detected and what it cannot."""
        parts = []
        if self.rejected:
            smallest = sorted(self.rejected, key=lambda name: self.pvalues[name])[:5]
            listed = ", ".join(f"{name} (p = {self.pvalues[name]:.2g})" for name in smallest)
            parts.append(
                f"{len(self.rejected)} of {len(self.pvalues)} quantities are not calibrated: {listed}"
            )
        elif self.blind:
            parts.append(self.blind)
        if self.power is not None and (self.rejected or not self.blind):
            parts.append(f"{self.num_simulations} simulations of {self.ranks.num_draws} draws {self.power}")
        if self.ranks.thin > 1:
            parts.append(f"every {self.ranks.thin}th draw was used, because the draws are not independent")
        if not any(self.ranks.uses_data):
            parts.append(
                "no quantity depends on the data, so a posterior that ignores the data is not detected"
            )
        return f"{OUTCOMES[self.passed]}: " + "; ".join(parts + self.ranks.remarks)

    def plot(self, axes: Any = None) -> Any:
        """Draw the distribution functions of the ranks minus the diagonal, with the band.

        Args:
            axes: matplotlib axes; None: those of a new figure.

        Returns:
            The axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        axes = axes_or_new(axes)
        draw_band(axes, self.bands)
        table = dict(zip(self.ranks.names, self.ranks.ranks.T, strict=True))
        columns = {name: table[name][table[name] >= 0] for name in self.pvalues}
        draw_ecdf(axes, self.bands, columns, set(self.rejected))
        return axes

    def __str__(self) -> str:
        return self.verdict


def uniformity(table: RankTable, *, level: float = 0.05) -> UniformityReport:
    """Test every column of ranks for uniformity, and report what the test could have detected.

    Each quantity is tested by the statistic of the simultaneous band; the p-values are adjusted by Holm's rule.
    The table passes only if nothing is rejected, if a bias of one posterior standard deviation and a width wrong by a
    factor of two would have been detected with probability 0.9, and if failed simulations cannot hide an error larger
    than the band. Otherwise the verdict is "cannot tell", as it is about each quantity that never varies.

    Args:
        table: from ``rank_table``.
        level: probability of a false alarm over all quantities.

    Raises:
        ValueError: the level is not between 0 and 0.5.

    References:
        Säilynoja et al. (2022), section 2. Holm (1979).
    """
    return judge(table, level, partial(in_normal_quantity, table.num_draws + 1))


def judge(table: RankTable, level: float, yardstick: Yardstick) -> UniformityReport:
    """Test every column of ranks for uniformity; the yardstick computes what the test could have detected.

    Args:
        table: from ``rank_table``.
        level: probability of a false alarm over all quantities.
        yardstick: ``(num_simulations, level of one quantity)`` -> the errors that one quantity would have detected, and
            the number of simulations needed if these are too few.

    Raises:
        ValueError: the level is not between 0 and 0.5.
    """
    if not 0 < level < 0.5:
        raise ValueError(f"level is the probability of a false alarm, between 0 and 0.5; got {level}")
    ranked = table.ranks >= 0
    columns = {
        name: column[valid]
        for name, column, valid in zip(table.names, table.ranks.T, ranked.T, strict=True)
        if valid.any() and name not in table.constant
    }
    raw = np.asarray([ecdf_pvalue(column, table.num_draws + 1) for column in columns.values()])
    return UniformityReport(
        ranks=table,
        pvalues=dict(zip(columns, holm(raw).tolist(), strict=True)),
        raw_pvalues=dict(zip(columns, raw.tolist(), strict=True)),
        level=level,
        num_simulations=int(ranked.all(axis=1).sum()),
        yardstick=yardstick,
    )
