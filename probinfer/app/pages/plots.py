"""Plots of fits and of their hyperparameters: each function draws one plot into matplotlib axes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binom, gaussian_kde

from probinfer.core.types import Float
from probinfer.plots.style import LINES, Theme
from probinfer.report.scoring import Estimate, Predictions

__all__ = [
    "Curve",
    "calibration",
    "comparison",
    "curve",
    "densities",
    "errors",
    "intervals",
    "observed",
    "reliability",
    "series",
]

_TAIL = 0.004  # probability on each side that the axis of a density leaves out


class Curve(NamedTuple):
    """A label, an index in the palette, and draws ``(S,)`` of one quantity; one value for a point estimate."""

    label: str
    style: int
    values: Float[np.ndarray, " S"]


def series(
    axes: Any,
    theme: Theme,
    x: np.ndarray,
    predicted: Predictions,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    labels: tuple[str, str],
) -> None:
    """Plot predictions along one input: median, central 50 and 95 % bands, and the data.

    Args:
        axes: matplotlib axes.
        theme: colors.
        x: inputs of the predictions ``(M,)``, ascending.
        predicted: predictions at ``x``.
        train: inputs and outputs of the training data.
        test: inputs and outputs of the held-out data; may be empty.
        labels: names of the axes.
    """
    _bands(axes, theme, x, predicted)
    many = len(train[0]) > 150
    axes.plot(*train, ".", color=theme.data, markersize=2.2 if many else 4, label="data", alpha=0.8, zorder=3)
    if len(test[0]):
        axes.plot(
            *test, ".", color=theme.held_out, markersize=2.6 if many else 4.5, label="held-out data", zorder=4
        )
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.margins(x=0.01)
    axes.legend(loc="best", handlelength=1.4)


def curve(axes: Any, theme: Theme, x: np.ndarray, predicted: Predictions, x_train: np.ndarray) -> None:
    """Plot the prediction along one input, with the others fixed at their medians.

    Args:
        axes: matplotlib axes.
        theme: colors.
        x: values of the input, ascending.
        predicted: predictions at these values.
        x_train: its values in the training data, drawn as ticks at the bottom.
    """
    _bands(axes, theme, x, predicted)
    inside = x_train[(x_train >= x[0]) & (x_train <= x[-1])]
    axes.plot(
        inside,
        np.zeros(len(inside)),
        "|",
        color=theme.muted,
        transform=axes.get_xaxis_transform(),
        markersize=7,
    )
    axes.margins(x=0.01)


def densities(
    axes: Any, theme: Theme, curves: list[Curve], *, label: str, positive: bool, legend: bool = False
) -> None:
    """Plot posteriors of one hyperparameter by several methods: densities of draws, lines for point estimates.

    Args:
        axes: matplotlib axes.
        theme: colors.
        curves: one for each method; a single value is a point estimate.
        label: name and unit of the hyperparameter.
        positive: whether to use a logarithmic axis; the densities are then those of the logarithm.
        legend: whether to draw a legend inside the plot.
    """
    to_axis = np.log10 if positive else np.asarray
    low, high = _axis_limits([to_axis(curve.values) for curve in curves])
    grid = np.linspace(low, high, 300)
    shown = 10**grid if positive else grid
    for item in curves:
        color, values = theme.series[item.style], to_axis(item.values)
        if _is_point(item):
            _point_line(axes, item, color, shown)
            continue
        density = gaussian_kde(values)(grid)
        axes.plot(shown, density, color=color, linestyle=LINES[item.style], label=item.label)
        axes.fill_between(shown, density, color=color, alpha=0.10, linewidth=0)
    if positive:
        axes.set_xscale("log")
        _plain_log_ticks(axes, low, high)
    axes.set(xlabel=label, yticks=[], xlim=(shown[0], shown[-1]))
    axes.set_ylim(bottom=0)
    axes.spines["left"].set_visible(False)
    if legend:
        axes.legend(loc="best", handlelength=1.6)


def intervals(axes: Any, theme: Theme, rows: list[tuple[str, list[Curve]]], *, label: str) -> None:
    """Plot intervals on a logarithmic axis, one row per hyperparameter, one bar per method: median, 50 and 95 %.

    Args:
        axes: matplotlib axes.
        theme: colors.
        rows: name of each row, and the values by method.
        label: label of the axis.
    """
    num = max(len(curves) for _, curves in rows)
    offsets = np.linspace(-0.28, 0.28, num) if num > 1 else np.zeros(1)
    low, high = _axis_limits([np.log10(curve.values) for _, curves in rows for curve in curves], tail=0.025)
    for i, (_, curves) in enumerate(rows):
        for item, offset in zip(curves, offsets):
            color, height = theme.series[item.style], i + offset
            q = np.clip(_interval_quantiles(item.values), 10**low, 10**high)
            axes.plot(q[[0, 4]], [height, height], color=color, linewidth=1.0, solid_capstyle="butt")
            axes.plot(q[[1, 3]], [height, height], color=color, linewidth=3.2, solid_capstyle="butt")
            outside = ">" if q[2] == 10**high else "<" if q[2] == 10**low else "o"
            axes.plot(
                q[2], height, outside, color=color, markersize=3.4 if outside == "o" else 6, clip_on=False
            )
    axes.set_xscale("log")
    axes.set(yticks=range(len(rows)), yticklabels=[name for name, _ in rows], xlabel=label)
    axes.set(xlim=(10**low, 10**high), ylim=(len(rows) - 0.5, -0.5))
    _plain_log_ticks(axes, low, high)
    axes.grid(False, axis="y")


def observed(axes: Any, theme: Theme, predicted: Predictions, *, label: str, style: int = 0) -> None:
    """Plot predictions with their 95 % intervals against outcomes; outcomes outside the interval are marked.

    Args:
        axes: matplotlib axes.
        theme: colors.
        predicted: predictions with outcomes.
        label: name of the predicted quantity.
        style: color of the method.
    """
    color, lower, upper = theme.series[style], predicted.quantiles[0.025], predicted.quantiles[0.975]
    outside = (predicted.y < lower) | (predicted.y > upper)
    error_bars = np.stack([np.maximum(predicted.mean - lower, 0), np.maximum(upper - predicted.mean, 0)])
    axes.errorbar(
        predicted.y, predicted.mean, error_bars, fmt="none", ecolor=color, elinewidth=0.7, alpha=0.30
    )
    axes.plot(predicted.y[~outside], predicted.mean[~outside], "o", color=color, markersize=3, label="inside")
    axes.plot(
        predicted.y[outside],
        predicted.mean[outside],
        "D",
        color=theme.held_out,
        markersize=4,
        label="outside",
    )
    ends = np.array([predicted.y.min(), predicted.y.max()])
    axes.plot(ends, ends, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
    axes.set(xlabel=f"observed {label}", ylabel="predicted")
    if outside.any():
        axes.legend(loc="upper left", handletextpad=0.1, title="95 % interval", title_fontsize=8.5)


def errors(
    axes: Any, theme: Theme, x: np.ndarray, predicted: Predictions, *, labels: tuple[str, str], style: int
) -> None:
    """Plot observed minus predicted values, over the predicted 50 and 95 % bands.

    Args:
        axes: matplotlib axes.
        theme: colors.
        x: inputs, ascending.
        predicted: predictions at ``x``, with outcomes.
        labels: names of the axes.
        style: color of the method.
    """
    median = predicted.quantiles[0.5]
    _bands(axes, theme, x, predicted, minus=median, style=style)
    axes.plot(x, predicted.y - median, ".", color=theme.held_out, markersize=4.5, label="observed", zorder=4)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.margins(x=0.01)
    axes.legend(loc="lower left", handlelength=1.4, ncols=2, columnspacing=1.0)


def calibration(axes: Any, theme: Theme, pit: np.ndarray, *, style: int = 0) -> None:
    """Plot the histogram of p(y' <= observed), flat if calibrated; the band contains 95 % of the bars of a flat one.

    Args:
        axes: matplotlib axes.
        theme: colors.
        pit: probability integral transforms, one for each test point.
        style: color of the method.
    """
    num_bins = int(np.clip(len(pit) // 12, 4, 20))
    share = 1 / num_bins
    low, high = (binom.ppf(q, len(pit), share) / len(pit) for q in (0.025, 0.975))
    counts, edges = np.histogram(np.clip(pit, 0, 1), num_bins, (0, 1))
    axes.bar(
        edges[:-1] + share / 2,
        counts / len(pit),
        0.9 * share,
        color=theme.series[style],
        alpha=0.75,
        linewidth=0,
    )
    axes.axhspan(low, high, color=theme.muted, alpha=0.30, linewidth=0)
    axes.axhline(share, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
    axes.set(xlabel="predicted probability of a smaller value", ylabel="share of test points", xlim=(0, 1))
    axes.grid(False, axis="x")


def reliability(axes: Any, theme: Theme, diagram: Any, *, style: int = 0) -> None:
    """Plot observed frequencies with intervals against predicted probabilities: on the diagonal if calibrated.

    Args:
        axes: matplotlib axes.
        theme: colors.
        diagram: a ``gp.calibration.Reliability``.
        style: color of the method.
    """
    color = theme.series[style]
    axes.plot([0, 1], [0, 1], color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
    axes.vlines(diagram.probability, diagram.lower, diagram.upper, color=color, linewidth=2)
    axes.plot(diagram.probability, diagram.frequency, "o", color=color, markersize=5)
    axes.set(
        xlabel="predicted probability", ylabel="observed frequency", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03)
    )


def comparison(axes: Any, theme: Theme, rows: list[tuple[str, int, Estimate]], *, label: str) -> None:
    """Plot one number for each method with its 95 % interval (1.96 standard errors), and a line at zero.

    Args:
        axes: matplotlib axes.
        theme: colors.
        rows: name, index in the palette, and estimate of each method.
        label: name of the number.
    """
    axes.axvline(0, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
    for i, (_, style, estimate) in enumerate(rows):
        half_width = 1.96 * estimate.error
        color = theme.series[style]
        axes.plot(
            [estimate.value - half_width, estimate.value + half_width], [i, i], color=color, linewidth=2
        )
        axes.plot(estimate.value, i, "o", color=color, markersize=6)
    axes.set(yticks=range(len(rows)), yticklabels=[name for name, _, _ in rows], xlabel=label)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(False, axis="y")


def _bands(axes, theme, x, predicted, *, minus=0.0, style=0):
    color, quantiles = theme.series[style], predicted.quantiles
    for low, high, alpha, name in ((0.025, 0.975, 0.18, "95 %"), (0.25, 0.75, 0.32, "50 %")):
        lower, upper = quantiles[low] - minus, quantiles[high] - minus
        axes.fill_between(x, lower, upper, color=color, alpha=alpha, linewidth=0, label=f"{name} band")
    axes.plot(x, quantiles[0.5] - minus, color=color, linewidth=1.2, label="median", zorder=2)


def _interval_quantiles(values):
    """Return the ends of the 50 and 95 % intervals and the median; all are equal for a point estimate."""
    # np.quantile would turn an infinite point estimate into NaN.
    return np.full(5, values[0]) if len(values) == 1 else np.quantile(values, [0.025, 0.25, 0.5, 0.75, 0.975])


def _is_point(item):
    return len(item.values) == 1 or bool(np.ptp(item.values) == 0)


def _point_line(axes, item, color, shown):
    """Draw a line at a point estimate, or an arrow at the edge if it lies outside the axis."""
    value = item.values[0]
    if shown[0] <= value <= shown[-1]:
        axes.axvline(value, color=color, linestyle=LINES[item.style], label=item.label)
        return
    x, marker = (0.99, ">") if value > shown[-1] else (0.01, "<")
    height = 0.92 - 0.13 * item.style % 0.8
    axes.plot(
        x,
        height,
        marker,
        color=color,
        markersize=7,
        transform=axes.transAxes,
        label=item.label,
        clip_on=False,
    )


def _axis_limits(columns, tail=_TAIL):
    """Return limits that contain nearly all draws of each column; a distant point estimate does not extend them."""
    draws = [column for column in columns if len(column) > 1] or columns
    low = min(np.quantile(column, tail) for column in draws)
    high = max(np.quantile(column, 1 - tail) for column in draws)
    room = 0.6 * max(high - low, 0.05)
    points = [column[0] for column in columns if len(column) == 1 and low - room <= column[0] <= high + room]
    low, high = min([low, *points]), max([high, *points])
    margin = 0.07 * max(high - low, 0.02)
    return low - margin, high + margin


def _plain_log_ticks(axes, low, high):
    """Set at most about five labeled ticks on a logarithmic axis, in decimal notation where that is short."""
    ticks = _log_ticks(low, high)
    axes.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _log_ticks(low, high):
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**e for e in range(int(np.floor(low)), int(np.ceil(high)) + 1) for step in steps]
        ticks = [tick for tick in ticks if low <= np.log10(tick) <= high]
        if 2 <= len(ticks) <= 5:
            return ticks
    if len(ticks) > 5:
        return ticks[:: -(-len(ticks) // 5)]
    return [float(f"{10**value:.3g}") for value in np.linspace(low, high, 5)[1:-1]]
