"""Verdict on a table of ranks: which quantities are not uniform, and how small an error would have been seen."""

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

__all__ = ["WORDS", "UniformityReport", "Yardstick", "holm", "judge", "uniformity"]

Yardstick = Callable[[int, float], tuple[Detectable, int | None]]

WORDS = {True: "passes", False: "fails", None: "cannot tell"}


def holm(pvalues: Float[np.ndarray, " Q"]) -> Float[np.ndarray, " Q"]:
    r"""Adjust p-values so that the smallest of them still means what one alone would.

    :math:`\tilde p_{(i)} = \max_{j\le i}\min\{(Q-j+1)\,p_{(j)},\,1\}`; valid under any dependence.

    Args:
        pvalues: one a test.

    References:
        Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(pvalues)
    factors = len(pvalues) - np.arange(len(pvalues))
    adjusted = np.minimum(np.maximum.accumulate(pvalues[order] * factors), 1.0)
    return adjusted[np.argsort(order)]


@dataclass(frozen=True)
class UniformityReport:
    """What the ranks of many simulations say of a posterior.

    Attributes:
        ranks: the table.
        pvalues: by quantity, adjusted by Holm's rule over the quantities; quantities that never vary are left out.
        raw_pvalues: by quantity, unadjusted.
        level: probability of a false alarm of the whole report.
        num_simulations: simulations in which every quantity was ranked.
        yardstick: (simulations, level of one quantity) to ``power`` and ``needed``.
    """

    ranks: RankTable
    pvalues: dict[str, float]
    raw_pvalues: dict[str, float]
    level: float
    num_simulations: int
    yardstick: Yardstick = field(repr=False, compare=False)

    @property
    def power(self) -> Detectable | None:
        """Smallest errors that one quantity of the family would have shown; None where nothing was ranked."""
        return self._measured[0]

    @property
    def needed(self) -> int | None:
        """Simulations for a verdict, where there were too few; None if no number is enough."""
        return self._measured[1]

    @cached_property
    def _measured(self) -> tuple[Detectable | None, int | None]:
        if not self.pvalues or not self.num_simulations:
            return None, None
        return self.yardstick(self.num_simulations, self.level / len(self.pvalues))

    @cached_property
    def bands(self) -> Band:
        """The band of one quantity of the family: what leaves it is rejected even after Holm's correction."""
        num = max(self.num_simulations, 1)
        share = self.level / max(len(self.pvalues), 1)
        return ecdf_band(num, self.ranks.num_draws + 1, level=1 - share)

    @property
    def rejected(self) -> tuple[str, ...]:
        """Quantities whose ranks are not uniform."""
        return tuple(name for name, value in self.pvalues.items() if value <= self.level)

    @property
    def blind(self) -> str | None:
        """Why the check cannot tell although nothing was rejected; None if it can."""
        table, total = self.ranks, len(self.ranks.ranks)
        if self.power is None:
            return "no quantity could be ranked"
        if not self.power.enough:
            need = "no number of simulations is enough; take more independent draws"
            if self.needed is not None:
                need = f"about {self.needed} simulations are needed with {table.num_draws} draws each"
            return f"{self.num_simulations} simulations are too few: the check {self.power}; {need}"
        width = float(np.max(self.bands.upper - self.bands.points))
        if total - self.num_simulations > width * total:
            return (
                f"{total - self.num_simulations} of {total} simulations failed, and may hide more than the band "
                f"shows; repair or explain them"
            )
        return None

    @property
    def passed(self) -> bool | None:
        """True, False, or None where the check cannot tell."""
        return False if self.rejected else None if self.blind else True

    @property
    def verdict(self) -> str:
        """The verdict in words, with what the check could have seen and what it cannot."""
        parts = []
        if self.rejected:
            worst = sorted(self.rejected, key=lambda name: self.pvalues[name])[:5]
            named = ", ".join(f"{name} (p = {self.pvalues[name]:.2g})" for name in worst)
            parts.append(
                f"{len(self.rejected)} of {len(self.pvalues)} quantities are not calibrated: {named}"
            )
        elif self.blind:
            parts.append(self.blind)
        if self.power is not None and (self.rejected or not self.blind):
            parts.append(f"{self.num_simulations} simulations of {self.ranks.num_draws} draws {self.power}")
        if self.ranks.thin > 1:
            parts.append(f"every {self.ranks.thin}th draw was used, the others are not independent")
        if not any(self.ranks.uses_data):
            parts.append("no quantity looks at the data, so a posterior that ignores the data is not seen")
        return f"{WORDS[self.passed]}: " + "; ".join(parts + self.ranks.remarks)

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
    """Test every column of ranks for uniformity, and say what the test could have found.

    Each quantity is tested by the statistic of the simultaneous band, the p-values are adjusted by Holm's rule.
    A clean result is a pass only if a bias of one posterior standard deviation and a width wrong by a factor of two
    would have been found with probability 0.9 and if failed simulations cannot hide more than the band shows; else
    the verdict is "cannot tell", as it is about each quantity that never varies.

    Args:
        table: from ``rank_table``.
        level: probability of a false alarm over all quantities.

    Raises:
        ValueError: a level not between 0 and 0.5.

    References:
        Säilynoja et al. (2022), section 2. Holm (1979).
    """
    return judge(table, level, partial(in_normal_quantity, table.num_draws + 1))


def judge(table: RankTable, level: float, yardstick: Yardstick) -> UniformityReport:
    """Test every column of ranks for uniformity; what the test could have found is up to the yardstick.

    Args:
        table: from ``rank_table``.
        level: probability of a false alarm over all quantities.
        yardstick: (simulations, level of one quantity) to what one quantity would have shown, and the number of
            simulations that are enough where these are not.

    Raises:
        ValueError: a level not between 0 and 0.5.
    """
    if not 0 < level < 0.5:
        raise ValueError(f"level is the probability of a false alarm, between 0 and 0.5; got {level}")
    good = table.ranks >= 0
    judged = [
        (name, column[ok])
        for name, column, ok in zip(table.names, table.ranks.T, good.T, strict=True)
        if ok.any() and name not in table.constant
    ]
    cells, complete = table.num_draws + 1, int(good.all(axis=1).sum())
    raw = np.asarray([ecdf_pvalue(column, cells) for _, column in judged])
    names = [name for name, _ in judged]
    return UniformityReport(
        table,
        dict(zip(names, holm(raw).tolist(), strict=True)),
        dict(zip(names, raw.tolist(), strict=True)),
        level,
        complete,
        yardstick,
    )
