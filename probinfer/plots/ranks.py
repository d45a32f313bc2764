"""Plots of rank checks: the empirical distribution function minus the diagonal, with its simultaneous band."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from probinfer.core.errors import import_extra

__all__ = ["axes_or_new", "draw_band", "draw_ecdf", "draw_null", "ink", "shade"]

_MAX_LABELS = 6


@runtime_checkable
class DrawableBand(Protocol):
    """Attributes of a simultaneous band that are drawn (``probinfer.checks.Band``)."""

    @property
    def points(self) -> np.ndarray: ...
    @property
    def edges(self) -> np.ndarray: ...
    @property
    def lower(self) -> np.ndarray: ...
    @property
    def upper(self) -> np.ndarray: ...
    @property
    def coverage(self) -> float: ...


def axes_or_new(axes: Any = None) -> Any:
    """Return the given matplotlib axes, or those of a new figure that belongs to no window.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if axes is not None:
        return axes
    figure = import_extra("matplotlib.figure", "plots").Figure(figsize=(6, 4), layout="constrained")
    return figure.subplots()


def ink() -> str:
    """Return the color of reference lines: the color of matplotlib's axes, so that plots suit dark themes too."""
    return import_extra("matplotlib", "plots").rcParams["axes.edgecolor"]


def shade() -> dict[str, Any]:
    """Return the style of background areas, such as bands and null distributions."""
    return {"color": import_extra("matplotlib", "plots").rcParams["grid.color"], "alpha": 0.35}


def draw_band(axes: Any, band: DrawableBand) -> None:
    """Shade the band of uniform ranks, minus the diagonal."""
    low, high = band.lower - band.points, band.upper - band.points
    axes.fill_between(
        band.points, low, high, linewidth=0, label=f"{band.coverage:.1%} of uniform ranks", **shade()
    )
    axes.axhline(0, color=ink(), linewidth=0.8)


def draw_ecdf(
    axes: Any, band: DrawableBand, columns: dict[str, Int[np.ndarray, " S"]], rejected: set[str]
) -> None:
    """Draw the distribution function of each column of ranks minus the diagonal; rejected ones in color."""
    for name, ranks in columns.items():
        below = np.searchsorted(np.sort(ranks), band.edges, side="left") / max(len(ranks), 1)
        style = (
            {"linewidth": 1.4, "zorder": 3}
            if name in rejected
            else {"color": ink(), "alpha": 0.6, "linewidth": 0.7}
        )
        labeled = name in rejected and sorted(rejected).index(name) < _MAX_LABELS
        axes.plot(band.points, below - band.points, label=name if labeled else None, **style)
    axes.set_xlabel("rank / number of draws")
    axes.set_ylabel("ECDF - diagonal")
    axes.legend(frameon=False, fontsize="small", loc="upper right")


def draw_null(axes: Any, null: Shaped[np.ndarray, " m"], statistic: float, *, null_label: str) -> Any:
    """Draw a null distribution, if there is one, and a statistic; return the axes, new ones if ``axes`` is None.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    axes = axes_or_new(axes)
    if len(null):
        axes.hist(null, bins=30, label=null_label, **shade())
    axes.axvline(statistic, color="C3", label="these draws")
    axes.legend()
    return axes
