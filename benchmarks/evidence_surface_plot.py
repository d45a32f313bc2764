"""The plot of ``gp_evidence_surface.py``."""

from __future__ import annotations

import common
import numpy as np

from probinfer.core.status import Status

__all__ = ["place", "plot"]


def place(point) -> str:
    return f"({point[0]:.1f}, {point[1]:.1f})"


def plot(
    surfaces: dict, gaps: dict[str, np.ndarray], rows: list[dict], points: np.ndarray, maxima: dict[str, int]
) -> None:
    """Plot the surfaces of all methods with the same levels, and below each its difference from AIS.

    Args:
        surfaces: the surface of each method, and where it did not converge.
        gaps: difference of each method from AIS at ``rows``.
        rows: results of AIS, and whether they are trusted.
        points: hyperparameters of the surfaces.
        maxima: index of the maximum of each surface, including AIS.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import BoundaryNorm, SymLogNorm

    fig, axes = common.figure(width=16, height=6.6, rows=2, columns=5)
    axis_values = np.unique(points[:, 0])
    coarse = np.unique([row["point"][0] for row in rows])
    square = (len(coarse), len(coarse))
    sampled = np.array([row["log_evidence"] for row in rows]).reshape(square)
    trusted = np.array([row["trusted"] for row in rows]).reshape(square)
    top = np.max(np.where(trusted, sampled, -np.inf))
    below = np.array([300.0, 128, 64, 32, 16, 8, 4, 2, 1, 0.5, 0])
    levels = [*(top - below), top + 2]
    norm = BoundaryNorm(levels, plt.get_cmap("viridis").N, extend="min")
    panels = {
        name: (axis_values, surfaces[name]["log evidence"].reshape(-1, len(axis_values)))
        for name in maxima
        if name != "AIS"
    }
    panels["AIS"] = (coarse, np.where(trusted, sampled, np.nan))
    doubtful = np.array([row["point"] for row in rows if not row["trusted"]]).reshape(-1, 2)
    for axis, (name, (ticks, values)) in zip(axes[0], panels.items(), strict=True):
        drawn = axis.contourf(ticks, ticks, values, levels, norm=norm, extend="min")
        axis.contour(ticks, ticks, values, levels[:-1], colors="k", linewidths=0.4, linestyles="solid")
        best = points[maxima[name]]
        axis.plot(*best, "*", color="red", markersize=12, label=f"maximum {place(best)}")
        if name == "AIS":
            axis.plot(*doubtful.T, "x", color="gray", markersize=4, label="not trusted")
        elif np.any(bad := surfaces[name]["status"] != Status.OK):
            axis.plot(*points[bad].T, ".", color="gray", markersize=2, label="not converged")
        axis.legend(fontsize=7, loc="lower right", framealpha=0.8)
        axis.set_title(name)
    bar = fig.colorbar(drawn, ax=axes[0].tolist(), pad=0.01, ticks=levels[:-1])
    bar.ax.set_yticklabels([f"{-value:g}" for value in below], fontsize=7)
    bar.set_label(f"log evidence minus {top:.1f}, the largest of AIS", fontsize=8)
    for axis, (name, values) in zip(axes[1], gaps.items(), strict=True):
        gap = np.where(trusted, values.reshape(square), np.nan)
        cells = axis.pcolormesh(coarse, coarse, gap, norm=SymLogNorm(0.3, vmin=-100, vmax=100), cmap="RdBu_r")
        axis.plot(*doubtful.T, "x", color="gray", markersize=4)
        axis.set_title(f"{name} minus AIS", fontsize=10)
        axis.set_xlabel("log lengthscale")
    marks = [-100, -30, -10, -3, -1, -0.3, 0, 0.3, 1, 3, 10, 30, 100]
    bar = fig.colorbar(cells, ax=axes[1].tolist(), pad=0.01, ticks=marks)
    bar.ax.set_yticklabels([f"{mark:g}" for mark in marks], fontsize=7)
    bar.set_label("nats", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel(r"log magnitude $\sigma$")
    common.RESULTS.mkdir(exist_ok=True)
    fig.savefig(common.RESULTS / "gp_evidence_surface.png", dpi=110, bbox_inches="tight")
