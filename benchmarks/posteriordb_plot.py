"""The plot of ``posteriordb.py``."""

from __future__ import annotations

from typing import Any

import common
import numpy as np

from probinfer.app.pages.engines import engine_names, target_engines
from probinfer.plots.style import LIGHT

__all__ = ["FAR", "plot", "short_names"]

FAR = 100.0  # errors beyond are drawn here


def short_names(posteriors: list[str]) -> list[str]:
    """The part after the hyphen, which names the model; the whole where two models have one name."""
    models = [name.split("-", 1)[1] for name in posteriors]
    return [
        model if models.count(model) == 1 else name for model, name in zip(models, posteriors, strict=True)
    ]


def plot(name: str, target: float, facts: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Plot the largest errors and the numbers of gradients, one row of dots for each posterior.

    Args:
        name: name of the file.
        target: the required error, drawn as a line.
        facts: facts about the posteriors.
        rows: rows of the table.
    """
    figure, (left, right) = common.figure(11, 0.42 * len(facts) + 1.6, 1, 2)
    heights = {fact["posterior"]: -i for i, fact in enumerate(facts)}
    engines = [entry for entry in target_engines() if any(row["engine"] == entry.name for row in rows)]
    for offset, entry in zip(np.linspace(0.26, -0.26, len(engines)), engines, strict=True):
        engine_rows = [row for row in rows if row["engine"] == entry.name and "mean" in row]
        positions = np.array([heights[row["posterior"]] for row in engine_rows]) + offset
        color = LIGHT.series[entry.style]
        marker = "os^"[engine_names().index(entry.name) // len(LIGHT.series)]  # where the colors begin anew
        dots = {"linestyle": "none", "marker": marker, "color": color, "ms": 5}
        left.plot([min(row["mean"], FAR) for row in engine_rows], positions, **dots, label=entry.label)
        left.plot([min(row["second moment"], FAR) for row in engine_rows], positions, **dots, mfc="white")
        right.plot([row["gradients"] for row in engine_rows], positions, **dots)
    mcse = [max(row["mean, reference MCSE"] for row in rows if "mean" in row)] * 2
    left.axvspan(1e-4, mcse[0], color="0.9", lw=0)
    left.axvline(target, color="0.4", lw=1, ls="--")
    left.set(
        xscale="log",
        xlim=(1e-3, 2 * FAR),
        xlabel=f"largest error, reference standard deviations ({FAR:g}: that or more)",
    )
    left.set_title("filled: means, open: second moments", fontsize=9, loc="left")
    right.set(xscale="log", xlabel="gradients")
    models = short_names([fact["posterior"] for fact in facts])
    labels = [f"{model} ({fact['dimension']})" for model, fact in zip(models, facts, strict=True)]
    left.set_yticks(list(heights.values()), labels)
    right.set_yticks(list(heights.values()), [""] * len(heights))
    for axis in (left, right):
        axis.grid(axis="x", color="0.92")
        axis.set_axisbelow(True)
    right.legend(
        *left.get_legend_handles_labels(),
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    common.save_figure(figure, name)
