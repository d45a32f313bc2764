"""The parts of a report: pictures and sentences made of what the engines found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from probinfer.app.pages import plots
from probinfer.app.pages.methods import Method, Problem
from probinfer.app.pages.units import Quantity, learned_names, quantities, spread
from probinfer.plots.style import Picture, draw
from probinfer.report.html import Gallery, Legend, Paragraph
from probinfer.report.scoring import Predictions, difference, predictions, scores
from probinfer.report.tables import TextTable, number

__all__ = [
    "READING",
    "calibration_picture",
    "effects",
    "error_pictures",
    "gallery",
    "hyperparameters",
    "legend",
    "observed_picture",
    "remarks",
    "score_pictures",
    "series_picture",
    "values_table",
    "verdict",
]

READING = (
    "NLPD is the average surprise at an unseen outcome, in nats: the lower, the better, and being sure and "
    "wrong costs most. The column beside it is the difference on the same points, so that what is hard for "
    "every method cancels; a difference below two standard errors (the number after ±) is no difference. “In "
    "95 % band” should be near 95 %: lower means too sure, higher too cautious. The log evidence of a point "
    "estimate is taken at its best setting and flatters it; “≥” marks a lower bound with the settings "
    "averaged over; NUTS gives none. “No inputs” predicts the training mean and spread for everybody."
)

_WIDE, _HALF, _THIRD = 10.5, 5.05, 3.2


def verdict(problem: Problem, methods: Sequence[Method]) -> str:
    """What the table says, in two or three sentences."""
    worked = [method for method in methods if method.predicted is not None]
    if not worked:
        return "No method worked: see the remarks."
    reference, *others = worked
    groups: dict[str, list[str]] = {"worse": [], "better": [], "same": []}
    for method in others:
        gap = difference(method.predicted, reference.predicted, block=problem.block)
        sure = abs(gap.value) > 2 * gap.error
        groups["same" if not sure else "worse" if gap.value > 0 else "better"].append(method.entry.label)
    name = reference.entry.label
    sentences = [
        f"Clearly {kind} than {name} on unseen data: {_listed(groups[kind])}."
        for kind in ("worse", "better")
        if groups[kind]
    ]
    if groups["same"]:
        sentences.append(f"No clear difference from {name}: {_listed(groups['same'])}.")
    for method in worked:
        share = scores(method.predicted, block=problem.block).coverage
        if share.value + 2 * share.error < 0.95:
            sentences.append(
                f"{method.entry.label} is too sure: {share.value:.0%} of the outcomes fell into its 95 % bands."
            )
    return " ".join(sentences)


def legend(methods: Sequence[Method]) -> Legend:
    """The methods that worked, with their colours."""
    return Legend(
        tuple((method.entry.label, method.entry.style) for method in methods if method.fit is not None)
    )


def series_picture(problem: Problem, method: Method, *, points: int = 600) -> Picture:
    """The whole series with predictions on a fine grid."""
    x = problem.data.X[:, 0]
    grid = np.linspace(x.min(), x.max(), points)
    predicted = predictions(method.fit, grid[:, None])
    train, test = ((x[rows], problem.data.y[rows]) for rows in (problem.train, problem.test))
    labels = (problem.data.feature_names[0], problem.data.target_name)
    return draw(
        f"{problem.data.target_name}: {method.entry.label}",
        "Dark dots: what the model learned from. Orange dots: what it had to predict. The dark band holds "
        "half of what it expects, the light band 95 %.",
        lambda axes, theme: plots.series(axes, theme, grid, predicted, train, test, labels=labels),
        width=_WIDE,
        height=3.5,
    )


def error_pictures(problem: Problem, methods: Sequence[Method]) -> list[Picture]:
    """Forecast errors along the first input, on one scale for all methods."""
    x = problem.data.X[problem.test, 0]
    ends = [
        method.predicted.quantiles[q] - method.predicted.quantiles[0.5]
        for method in methods
        for q in (0.025, 0.975)
    ]
    misses = [method.predicted.y - method.predicted.quantiles[0.5] for method in methods]
    limit = 1.05 * max(float(np.abs(values).max()) for values in [*ends, *misses])
    labels = (problem.data.feature_names[0], "observed minus forecast")

    def picture(method):
        def fn(axes, theme):
            plots.errors(axes, theme, x, method.predicted, labels=labels, style=method.entry.style)
            axes.set_ylim(-1.25 * limit, limit)

        caption = "Orange dots inside the light band: the method knew how wrong it could be."
        return draw(f"Forecast errors: {method.entry.label}", caption, fn, width=_HALF)

    return [picture(method) for method in methods]


def score_pictures(problem: Problem, methods: Sequence[Method], *, unit: str) -> list[Picture]:
    """Predicted against observed and calibration of the reference, and the differences between methods."""
    worked = [method for method in methods if method.predicted is not None]
    if not worked:
        return []
    reference = worked[0]
    pictures = [observed_picture(reference.predicted, unit, reference.entry.label, reference.entry.style)]
    pictures += [calibration_picture(reference.predicted, reference.entry.label, reference.entry.style)]
    if len(worked) > 1:
        pictures.append(_comparison(problem, reference, worked[1:]))
    return pictures


def observed_picture(predicted: Predictions, unit: str, label: str, style: int) -> Picture:
    """Predicted against observed."""
    return draw(
        f"Predicted and observed: {label}",
        "Each dot is one unseen point; the thin line is its 95 % interval. On the dashed line prediction and "
        "outcome agree.",
        lambda axes, theme: plots.observed(axes, theme, predicted, label=unit, style=style),
        width=_HALF,
    )


def calibration_picture(predicted: Predictions, label: str, style: int) -> Picture:
    """Histogram of the probability integral transform."""
    return draw(
        f"Do the probabilities mean what they say? {label}",
        "Flat is honest. High at both ends: too sure. High in the middle: too cautious. Honest bars end in "
        "the grey band 19 times out of 20.",
        lambda axes, theme: plots.calibration(axes, theme, predicted.pit, style=style),
        width=_HALF,
    )


def _comparison(problem, reference, others):
    rows = [
        (
            method.entry.label,
            method.entry.style,
            difference(method.predicted, reference.predicted, block=problem.block),
        )
        for method in others
    ]
    label = f"NLPD minus that of {reference.entry.label} (nats a point)"
    return draw(
        f"Worse or better than {reference.entry.label}",
        "Right of the dashed line is worse. A bar (95 % interval) that crosses it: no clear difference.",
        lambda axes, theme: plots.comparison(axes, theme, rows, label=label),
        width=_HALF,
        height=2.6,
    )


def hyperparameters(problem: Problem, methods: Sequence[Method]) -> list[Picture]:
    """Posteriors of every learned number, all methods in one picture; vectors as rows of intervals."""
    found = _by_method(problem, methods)
    if not found:
        return []
    first = found[0][1]
    vectors = {item.name.split("[")[0] for item in first if "[" in item.name}
    has_draws = any(len(item.values) > 1 for _, items in found for item in items)
    pictures = [_density(i, found) for i, item in enumerate(first) if has_draws and "[" not in item.name]
    return pictures + [_rows(name, problem, found) for name in sorted(vectors)]


def _by_method(problem, methods):
    names = learned_names(problem.model, problem.prior)
    features, target = problem.data.feature_names, problem.data.target_name
    return [
        (method.entry, quantities(method.fit, names, features, target=target, parts=problem.parts))
        for method in methods
        if method.fit is not None
    ]


def _density(i, found):
    item = found[0][1][i]
    curves = [plots.Curve(entry.label, entry.style, items[i].values) for entry, items in found]
    label = item.unit or "a pure number"
    return draw(
        item.label,
        "",
        lambda axes, theme: plots.densities(axes, theme, curves, label=label, positive=item.positive),
        width=_THIRD,
        height=2.1,
    )


def _rows(name, problem, found):
    features = problem.data.feature_names
    chosen = [i for i, item in enumerate(found[0][1]) if item.name.split("[")[0] == name]
    rows = [
        (
            features[row],
            [plots.Curve(entry.label, entry.style, items[i].standardized) for entry, items in found],
        )
        for row, i in enumerate(chosen)
    ]
    last = name.rsplit(".", 1)[-1]
    return draw(
        f"The {last} of every column",
        "Dot: median; thick: half of the plausible values; thin: 95 %. Short means that the column matters; a "
        "long one hardly changes the prediction. An arrow lies beyond the edge.",
        lambda axes, theme: plots.intervals(
            axes, theme, rows, label=f"{last}, in standard deviations of the column"
        ),
        width=_HALF + 0.6,
        height=1.2 + 0.42 * len(rows),
    )


def values_table(found: Sequence[Quantity], *, title: str) -> TextTable:
    """Learned hyperparameters of one fit in the user's units: median and central 90 % interval."""
    is_point = all(len(item.values) == 1 for item in found)
    columns = ("what", "value", "unit") if is_point else ("what", "median", "5 %", "95 %", "unit")
    rows = []
    for item in found:
        low, middle, high = (number(value) for value in spread(item.values))
        middle = "no effect" if item.idle else middle
        rows.append(
            (item.label, middle, item.unit) if is_point else (item.label, middle, low, high, item.unit)
        )
    return TextTable(title, columns, tuple(rows), text_columns=(len(columns) - 1,))


def effects(fit: Any, X: np.ndarray, features: Sequence[str], *, chosen: Sequence[int]) -> list[Picture]:
    """How the prediction changes with one column, the others at their medians; all on one scale."""
    middle = np.median(X, axis=0)
    grids, found = [], []
    for column in chosen:
        grid = np.linspace(np.quantile(X[:, column], 0.02), np.quantile(X[:, column], 0.98), 60)
        rows = np.tile(middle, (len(grid), 1))
        rows[:, column] = grid
        grids.append(grid)
        found.append(predictions(fit, rows))
    low = min(one.quantiles[0.025].min() for one in found)
    high = max(one.quantiles[0.975].max() for one in found)
    margin = 0.05 * (high - low)

    def picture(column, grid, predicted):
        def fn(axes, theme):
            plots.curve(axes, theme, grid, predicted, X[:, column])
            axes.set_ylim(low - 2 * margin, high + margin)

        return draw(features[column], "", fn, width=_THIRD, height=2.2)

    return [picture(*one) for one in zip(chosen, grids, found)]


def remarks(methods: Sequence[Method]) -> list[Paragraph]:
    """What engines warned of, one paragraph each."""
    return [
        Paragraph(f"{method.entry.label}: {method.remark.removeprefix(method.entry.label + ': ')}", "remark")
        for method in methods
        if method.remark
    ]


def gallery(pictures: Sequence[Picture]) -> Gallery:
    """Pictures side by side."""
    return Gallery(tuple(pictures))


def _listed(names):
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
