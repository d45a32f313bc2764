"""The parts of a report: plots and texts about the fits of several engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from probinfer.app.pages import plots
from probinfer.app.pages.methods import MethodResult, RegressionProblem
from probinfer.app.pages.units import Quantity, interval, learned_names, quantities
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
    "NLPD is the average negative log predictive density of held-out points, in nats. Lower is better; confident wrong "
    "predictions cost most. The next column is the paired difference on the same points, so that points that are hard "
    "for every method cancel; a difference below two standard errors (the number after ±) is not significant. “In 95 % "
    "band” should be near 95 %: lower means overconfident, higher underconfident. The log evidence of a point estimate "
    "is evaluated at its optimum and is therefore optimistic; “≥” marks a lower bound that averages over the "
    "hyperparameters; NUTS gives no evidence. “No inputs” predicts the mean and the standard deviation of the training "
    "data for every point."
)

_WIDE, _HALF, _THIRD = 10.5, 5.05, 3.2


def verdict(problem: RegressionProblem, methods: Sequence[MethodResult]) -> str:
    """Return the conclusion from the table of methods, in two or three sentences."""
    succeeded = [method for method in methods if method.predicted is not None]
    if not succeeded:
        return "No method succeeded: see the remarks."
    reference, *others = succeeded
    groups: dict[str, list[str]] = {"worse": [], "better": [], "same": []}
    for method in others:
        gap = difference(method.predicted, reference.predicted, block=problem.block)
        significant = abs(gap.value) > 2 * gap.error
        group = "same" if not significant else "worse" if gap.value > 0 else "better"
        groups[group].append(method.entry.label)
    name = reference.entry.label
    sentences = [
        f"Clearly {kind} than {name} on held-out data: {_listed(groups[kind])}."
        for kind in ("worse", "better")
        if groups[kind]
    ]
    if groups["same"]:
        sentences.append(f"No clear difference from {name}: {_listed(groups['same'])}.")
    for method in succeeded:
        coverage = scores(method.predicted, block=problem.block).coverage
        if coverage.value + 2 * coverage.error < 0.95:
            sentences.append(
                f"{method.entry.label} is overconfident: its 95 % bands contain {coverage.value:.0%} of the outcomes."
            )
    return " ".join(sentences)


def legend(methods: Sequence[MethodResult]) -> Legend:
    """Return the legend of the methods that succeeded."""
    return Legend(
        tuple((method.entry.label, method.entry.style) for method in methods if method.fit is not None)
    )


def series_picture(problem: RegressionProblem, method: MethodResult, *, points: int = 600) -> Picture:
    """Plot the series with predictions on a fine grid of inputs."""
    x = problem.data.X[:, 0]
    grid = np.linspace(x.min(), x.max(), points)
    predicted = predictions(method.fit, grid[:, None])
    train, test = ((x[rows], problem.data.y[rows]) for rows in (problem.train, problem.test))
    labels = (problem.data.feature_names[0], problem.data.target_name)
    return draw(
        f"{problem.data.target_name}: {method.entry.label}",
        "Dark dots: training data. Orange dots: held-out data. The dark band is the central 50 % interval, the light "
        "band 95 %.",
        lambda axes, theme: plots.series(axes, theme, grid, predicted, train, test, labels=labels),
        width=_WIDE,
        height=3.5,
    )


def error_pictures(problem: RegressionProblem, methods: Sequence[MethodResult]) -> list[Picture]:
    """Plot the forecast errors along the first input, on the same scale for all methods."""
    x = problem.data.X[problem.test, 0]
    half_widths = [
        method.predicted.quantiles[q] - method.predicted.quantiles[0.5]
        for method in methods
        for q in (0.025, 0.975)
    ]
    errors = [method.predicted.y - method.predicted.quantiles[0.5] for method in methods]
    limit = 1.05 * max(float(np.abs(values).max()) for values in [*half_widths, *errors])
    labels = (problem.data.feature_names[0], "observed minus forecast")

    def picture(method):
        def fn(axes, theme):
            plots.errors(axes, theme, x, method.predicted, labels=labels, style=method.entry.style)
            axes.set_ylim(-1.25 * limit, limit)

        caption = "Orange dots inside the light band: the method predicted the size of its errors."
        return draw(f"Forecast errors: {method.entry.label}", caption, fn, width=_HALF)

    return [picture(method) for method in methods]


def score_pictures(
    problem: RegressionProblem, methods: Sequence[MethodResult], *, unit: str
) -> list[Picture]:
    """Plot predicted against observed values and the calibration of the reference, and compare the other methods."""
    succeeded = [method for method in methods if method.predicted is not None]
    if not succeeded:
        return []
    reference = succeeded[0]
    pictures = [observed_picture(reference.predicted, unit, reference.entry.label, reference.entry.style)]
    pictures += [calibration_picture(reference.predicted, reference.entry.label, reference.entry.style)]
    if len(succeeded) > 1:
        pictures.append(_comparison(problem, reference, succeeded[1:]))
    return pictures


def observed_picture(predicted: Predictions, unit: str, label: str, style: int) -> Picture:
    """Plot predicted against observed values."""
    return draw(
        f"Predicted and observed: {label}",
        "Each dot is one held-out point; the thin line is its 95 % interval. On the dashed line, prediction and "
        "outcome are equal.",
        lambda axes, theme: plots.observed(axes, theme, predicted, label=unit, style=style),
        width=_HALF,
    )


def calibration_picture(predicted: Predictions, label: str, style: int) -> Picture:
    """Plot the histogram of the probability integral transform."""
    return draw(
        f"Calibration of the probabilities: {label}",
        "Flat means calibrated, high at both ends overconfident, high in the middle underconfident. If the predictions "
        "are calibrated, 95 % of the bars end in the gray band.",
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
    label = f"NLPD minus that of {reference.entry.label} (nats per point)"
    return draw(
        f"Comparison with {reference.entry.label}",
        "Right of the dashed line is worse. If a bar (95 % interval) crosses it, the difference is not significant.",
        lambda axes, theme: plots.comparison(axes, theme, rows, label=label),
        width=_HALF,
        height=2.6,
    )


def hyperparameters(problem: RegressionProblem, methods: Sequence[MethodResult]) -> list[Picture]:
    """Plot the posterior of each learned hyperparameter for all methods; vectors as rows of intervals."""
    learned = _by_method(problem, methods)
    if not learned:
        return []
    first = learned[0][1]
    vectors = {item.name.split("[")[0] for item in first if "[" in item.name}
    has_draws = any(len(item.values) > 1 for _, items in learned for item in items)
    pictures = [_density(i, learned) for i, item in enumerate(first) if has_draws and "[" not in item.name]
    return pictures + [_rows(name, problem, learned) for name in sorted(vectors)]


def _by_method(problem, methods):
    names = learned_names(problem.model, problem.prior)
    features, target = problem.data.feature_names, problem.data.target_name
    return [
        (method.entry, quantities(method.fit, names, features, target=target, parts=problem.parts))
        for method in methods
        if method.fit is not None
    ]


def _density(i, learned):
    item = learned[0][1][i]
    curves = [plots.Curve(entry.label, entry.style, items[i].values) for entry, items in learned]
    label = item.unit or "dimensionless"
    return draw(
        item.label,
        "",
        lambda axes, theme: plots.densities(axes, theme, curves, label=label, positive=item.positive),
        width=_THIRD,
        height=2.1,
    )


def _rows(name, problem, learned):
    features = problem.data.feature_names
    chosen = [i for i, item in enumerate(learned[0][1]) if item.name.split("[")[0] == name]
    rows = [
        (
            features[row],
            [plots.Curve(entry.label, entry.style, items[i].standardized) for entry, items in learned],
        )
        for row, i in enumerate(chosen)
    ]
    last = name.rsplit(".", 1)[-1]
    return draw(
        f"The {last} of every column",
        "Dot: median; thick line: central 50 % interval; thin line: 95 %. Columns with a short lengthscale matter; "
        "those with a long one have little effect. An arrow marks a value beyond the edge.",
        lambda axes, theme: plots.intervals(
            axes, theme, rows, label=f"{last}, in standard deviations of the column"
        ),
        width=_HALF + 0.6,
        height=1.2 + 0.42 * len(rows),
    )


def values_table(learned: Sequence[Quantity], *, title: str) -> TextTable:
    """Return the learned hyperparameters of one fit in the user's units: median and central 90 % interval."""
    is_point = all(len(item.values) == 1 for item in learned)
    columns = (
        ("hyperparameter", "value", "unit")
        if is_point
        else ("hyperparameter", "median", "5 %", "95 %", "unit")
    )
    rows = []
    for item in learned:
        low, middle, high = (number(value) for value in interval(item.values))
        middle = "no effect" if item.irrelevant else middle
        rows.append(
            (item.label, middle, item.unit) if is_point else (item.label, middle, low, high, item.unit)
        )
    return TextTable(title, columns, tuple(rows), text_columns=(len(columns) - 1,))


def effects(fit: Any, X: np.ndarray, features: Sequence[str], *, chosen: Sequence[int]) -> list[Picture]:
    """Plot the prediction along one column at a time, with the others at their medians, all on the same scale."""
    medians = np.median(X, axis=0)
    grids, predicted_along = [], []
    for column in chosen:
        grid = np.linspace(np.quantile(X[:, column], 0.02), np.quantile(X[:, column], 0.98), 60)
        rows = np.tile(medians, (len(grid), 1))
        rows[:, column] = grid
        grids.append(grid)
        predicted_along.append(predictions(fit, rows))
    low = min(predicted.quantiles[0.025].min() for predicted in predicted_along)
    high = max(predicted.quantiles[0.975].max() for predicted in predicted_along)
    margin = 0.05 * (high - low)

    def picture(column, grid, predicted):
        def fn(axes, theme):
            plots.curve(axes, theme, grid, predicted, X[:, column])
            axes.set_ylim(low - 2 * margin, high + margin)

        return draw(features[column], "", fn, width=_THIRD, height=2.2)

    return [picture(*args) for args in zip(chosen, grids, predicted_along)]


def remarks(methods: Sequence[MethodResult]) -> list[Paragraph]:
    """Return the warnings of the engines, one paragraph for each."""
    return [
        Paragraph(f"{method.entry.label}: {method.remark.removeprefix(method.entry.label + ': ')}", "remark")
        for method in methods
        if method.remark
    ]


def gallery(pictures: Sequence[Picture]) -> Gallery:
    """Return pictures side by side."""
    return Gallery(tuple(pictures))


def _listed(names):
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
