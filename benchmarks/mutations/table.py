"""The table of rejections: intervals, criteria, Markdown, plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from .checks import CHECKS
from .faults import APPROXIMATIONS, FAULTS, NULLS

__all__ = ["best_check", "clopper_pearson", "heat_map", "judge", "markdown", "sizes_above"]

_NAMES = [one.name for one in (*NULLS, *APPROXIMATIONS, *FAULTS)]


def clopper_pearson(rejected: int, total: int, level: float) -> tuple[float, float]:
    """Return the exact two-sided interval of a probability."""
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, rejected, total - rejected + 1) if rejected else 0.0
    high = stats.beta.ppf(1 - tail, rejected + 1, total - rejected) if rejected < total else 1.0
    return float(low), float(high)


def sizes_above(
    counts: Mapping[str, Mapping[str, tuple[int, int]]],
    level: float,
    nulls: Sequence[Any] = NULLS,
    checks: Sequence[str] = CHECKS,
) -> list[str]:
    """List the checks whose 99 % interval of the size, Bonferroni over the checks, lies above the level."""
    confidence = 1 - 0.01 / len(checks)
    return [
        f"{check} ({name}): {rejected} of {total}"
        for name in (procedure.name for procedure in nulls)
        for check, (rejected, total) in counts[name].items()
        if clopper_pearson(rejected, total, confidence)[0] > level
    ]


def best_check(row: Mapping[str, tuple[int, int]]) -> tuple[str, float]:
    """Return the check with the largest lower 95 % bound of its power for a fault, and this bound."""
    ends = {check: clopper_pearson(*pair, 0.95)[0] for check, pair in row.items()}
    best = max(ends, key=lambda check: ends[check])
    return best, ends[best]


def judge(
    counts: Mapping[str, Any],
    level: float,
    nulls: Sequence[Any] = NULLS,
    faults: Sequence[Any] = FAULTS,
    checks: Sequence[str] = CHECKS,
) -> dict[str, Any]:
    """Return the criteria for the table, and whether they hold."""
    best = {procedure.name: best_check(counts[procedure.name]) for procedure in faults}
    return {
        "sizes above the level": sizes_above(counts, level, nulls, checks),
        "best check": {name: {"check": check, "lower 95 % end": end} for name, (check, end) in best.items()},
        "not caught": [name for name, (_, end) in best.items() if end < 0.9],
    }


def markdown(counts: Mapping[str, Any], names: Sequence[str] = _NAMES, checks: Sequence[str] = CHECKS) -> str:
    """The table in per cent, for the README; powers of 90 % and more in bold, a dash where no check can be made."""
    lines = ["| | " + " | ".join(checks) + " |", "|---" * (len(checks) + 1) + "|"]
    for name in names:
        cells = []
        for check in checks:
            if check not in counts[name]:
                cells.append("-")
                continue
            rejected, total = counts[name][check]
            share = 100 * rejected / total
            shown = f"{share:.1f}" if total >= 1000 else f"{share:.0f}"
            cells.append(f"**{shown}**" if share >= 90 else shown)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def heat_map(
    axes: Any,
    counts: Mapping[str, Any],
    names: Sequence[str] = _NAMES,
    checks: Sequence[str] = CHECKS,
    lines: Sequence[int] = (len(NULLS), len(NULLS) + len(APPROXIMATIONS)),
) -> None:
    """Per cent of repetitions in which each check rejects each procedure; ``lines``: rows above which one is drawn."""
    share = np.full((len(names), len(checks)), np.nan)
    for row, column in np.ndindex(share.shape):
        if checks[column] in counts[names[row]]:
            rejected, total = counts[names[row]][checks[column]]
            share[row, column] = rejected / total
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.argwhere(np.isfinite(share)):
        dark = share[row, column] > 0.6
        axes.text(
            column,
            row,
            f"{100 * share[row, column]:.0f}",
            ha="center",
            va="center",
            fontsize=8,
            color="w" if dark else "k",
        )
    axes.set_xticks(range(len(checks)), checks, rotation=35, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    for place, width in zip(lines, (1.5, 0.8)):
        axes.axhline(place - 0.5, color="C3", linewidth=width)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
