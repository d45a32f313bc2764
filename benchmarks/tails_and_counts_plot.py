"""The plot of ``gp_tails_and_counts.py``, from its results."""

from __future__ import annotations

from typing import Any

import common
import jax
import numpy as np
from measurements import measurement_path
from tails_and_counts import Fold

__all__ = ["curves", "plot", "shown_data"]


def curves(name: str, predictive, fold: Fold) -> dict:
    """Median and band: of the output of neal, of the rate of coal."""
    levels = np.array([0.05, 0.5, 0.95])
    if name == "coal":
        sd = np.sqrt(predictive.variances)
        choice = np.random.default_rng(0).integers(len(sd), size=4000)
        noise = np.random.default_rng(1).standard_normal((4000, sd.shape[1]))
        samples = np.exp(np.asarray(predictive.means)[choice] + sd[choice] * noise)
    else:
        samples = np.asarray(predictive.sample(jax.random.key(2), 20000))
    rows = slice(100, None) if name == "neal" else slice(None)
    return {"x": fold.X_all[rows, 0], "quantiles": np.quantile(samples[:, rows], levels, axis=0)}


def shown_data(name: str) -> dict[str, Any]:
    """What is plotted beside the curves: points, or counts of windows of six bins as rates."""
    if name == "neal":
        return {"shown": np.loadtxt(measurement_path("gp/li2023_neal.txt"), delimiter=",")}
    years, counts = np.loadtxt(measurement_path("gp/coal_binned.csv")).T
    per_year, num = 1 / np.diff(years).mean(), len(years) // 6
    windows = years[: 6 * num].reshape(num, 6).mean(1), counts[: 6 * num].reshape(num, 6).mean(1) * per_year
    return {"shown": np.stack(windows, 1), "unit": [years.mean(), years.std()], "per year": per_year}


def plot(results: dict) -> None:
    """The reference with its band over the data, and the differences from it."""
    fig, axes = common.figure(width=11, height=3.6 * len(results), rows=len(results), columns=2)
    for (left, right), (name, result) in zip(np.atleast_2d(axes), results.items(), strict=True):
        plot_curves(left, name, result)
        plot_differences(right, name, result)
    common.save_figure(fig, "gp_tails_and_counts")


def plot_curves(axis, name: str, result: dict) -> None:
    part = result["folds"][0]
    for method, color in (("NUTS", "C0"), ("EP, ML-II", "C1"), ("Gaussian noise, ML-II", "C2")):
        known = part.get(method, {}).get("curves")
        if known is None:
            continue
        x = np.asarray(known["x"])
        low, middle, high = np.asarray(known["quantiles"])
        if name == "coal":
            x, low, middle, high = (
                x * result["unit"][1] + result["unit"][0],
                *(curve * result["per year"] for curve in (low, middle, high)),
            )
        axis.plot(x, middle, color=color, lw=1.2, label=method)
        if method == "NUTS":
            axis.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
        else:
            axis.plot(x, low, color=color, lw=0.8, ls="--")
            axis.plot(x, high, color=color, lw=0.8, ls="--")
    data = np.asarray(result["shown"])
    axis.plot(*data.T, "k.", ms=4, alpha=0.6, zorder=0)
    titles = {
        "neal": "neal, fold 1: predictive median and 90 % band",
        "coal": "coal, fold 1: rate with 90 % band; dots: counts of 2-year windows, a year",
    }
    axis.set_title(titles[name], fontsize=9)
    axis.set_xlabel("x" if name == "neal" else "year")
    axis.set_ylabel("y" if name == "neal" else "disasters a year")
    axis.legend(frameon=False, fontsize=8)


def plot_differences(axis, name: str, result: dict) -> None:
    labels = [label for label, difference in result["compared"].items() if difference and label != "NUTS"]
    for position, label in enumerate(labels):
        low, high = result["compared"][label]["interval"]
        color = "C0" if label.startswith("NUTS") else "C3" if label.endswith("θ of NUTS") else "C1"
        color = "C2" if label in ("Gaussian noise, ML-II", "constant rate") else color
        axis.plot([low, high], [position, position], color=color, lw=2)
        axis.plot(result["compared"][label]["difference"], position, "o", color=color)
        converged = result["compared, converged"][label]
        if converged and converged["folds"] < result["compared"][label]["folds"]:
            axis.plot(converged["interval"], [position, position], color=color, lw=1)
            axis.plot(converged["difference"], position, "o", color=color, fillstyle="none")
    axis.axvline(0, color="0.6", lw=0.8)
    axis.set_xscale("symlog", linthresh=0.02)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("test NLPD minus that of NUTS, 95 % (beyond ±0.02 logarithmic)")
    axis.set_title(f"{name}: all folds; open: the folds whose sites converged", fontsize=9)
