"""Regression on a user's table: fit, cross-validated score, predictions, report and a saved fit."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape

from probinfer import data, gp
from probinfer.app.commands.files import write_files
from probinfer.app.pages import sections as sections_of
from probinfer.app.pages.engines import Entry, find_engine
from probinfer.app.pages.methods import Method, Problem, chains_table, evidence
from probinfer.app.pages.run_facts import provenance
from probinfer.app.pages.units import learned_names, most_relevant, quantities
from probinfer.core.errors import import_extra
from probinfer.report.html import Paragraph, Section, check_folder, page, write_page
from probinfer.report.scoring import concatenate, difference, normal_baseline, predictions, scores
from probinfer.report.tables import TextTable, number, to_rich, with_error
from probinfer.running import progress as bars

__all__ = ["KERNELS", "Options", "choose_engine", "make_model", "run_regression"]

KERNELS: dict[str, Any] = {
    "matern12": gp.kernels.Matern12,
    "matern32": gp.kernels.Matern32,
    "matern52": gp.kernels.Matern52,
    "rbf": gp.kernels.RBF,
    "rq": gp.kernels.RationalQuadratic,
}

_AUTO_ROWS = 300  # up to here NUTS takes minutes with its folds on one core
_MAX_ROWS = 10_000  # an exact fit stores a few N x N matrices


class Options(NamedTuple):
    """What a user asked for; see ``probinfer gp --help``."""

    target: str
    engine: str = "auto"
    kernel: str = "matern52"
    folds: int = 5
    drop: tuple[str, ...] = ()
    predict: str | None = None
    out: str = "probinfer-report"
    seed: int = 0
    draws: int = 500


def run_regression(path: str, options: Options, *, command: str, console: Console) -> Path:
    """Do the whole job for one file.

    Args:
        path: the CSV file.
        options: what the user asked for.
        command: what the user typed, for the report.
        console: where progress, tables and remarks go.

    Returns:
        The path of the report.

    Raises:
        TableError: the file, or the one to predict, cannot be used.
        ValueError: an option is out of range, or the folder is a file.
        MissingExtraError: matplotlib is not installed.
        NumericalError: no usable hyperparameters were found.
    """
    start = time.perf_counter()
    check_folder(options.out)
    import_extra("matplotlib", "plots")
    table, new = _read(path, options, console)
    entry = choose_engine(options.engine, len(table.y))
    model = make_model(options.kernel, table.X.shape[1])
    console.print(f"{len(table.y)} rows, {table.X.shape[1]} inputs; {entry.label} {entry.about}")
    fit_key, fold_key = jax.random.split(jax.random.key(options.seed))
    fit, remarks = _learn(
        fit_key, model, table.X, table.y, entry, options, f"{entry.label}, all rows", console
    )
    crossed = None
    if options.folds:
        crossed = _cross_validate(fold_key, model, table, entry, options, console)
    written = write_files(fit, table, new, crossed, options.out, options.predict)
    problem = Problem(
        table, np.arange(len(table.y)), np.arange(0), model, gp.default_prior(model, np.asarray(fit.X)), {}
    )
    method = Method(entry, fit, crossed and crossed[0], time.perf_counter() - start, remarks)
    tables = _tables(problem, method, crossed)
    for shown in tables:
        console.print(to_rich(shown))
    facts = provenance(command, seed=options.seed, seconds=time.perf_counter() - start, extra=written)
    sections = _sections(problem, method, tables, crossed)
    lead = (
        f"{table.target_name} from {_count(len(table.feature_names), 'column')} of {table.name}, "
        f"{len(table.y)} rows: what a Gaussian process learned, and how far its predictions can be trusted."
    )
    return write_page(options.out, page(f"Predicting {table.target_name}", lead, sections, facts))


def choose_engine(name: str, rows: int) -> Entry:
    """The engine of a name; ``auto`` is NUTS for small tables and MAP for larger ones."""
    if name == "auto":
        name = "nuts" if rows <= _AUTO_ROWS else "map"
    return find_engine(name)


def make_model(kernel: str, num_columns: int) -> gp.Model:
    """A kernel with one lengthscale a column, and noise.

    Raises:
        ValueError: no kernel has this name.
    """
    if kernel not in KERNELS:
        raise ValueError(f"no kernel is called {kernel!r}; choose one of {', '.join(KERNELS)}")
    lengthscale = jnp.full(num_columns, 2.0 * float(np.sqrt(num_columns)))
    return gp.Model(
        KERNELS[kernel](variance=1.0, lengthscale=lengthscale), gp.likelihoods.Gaussian(variance=0.3)
    )


def _read(path, options, console):
    """The data set, and the inputs to predict or None."""
    if options.target in options.drop:
        raise ValueError(
            f"--drop {options.target} leaves out the column that --target asks to predict; drop others"
        )
    table = data.read_csv(path, drop=options.drop, target=options.target)
    X, y, features = data.split_target(table, options.target)
    constant = [name for name, column in zip(features, X.T) if np.ptp(column) == 0]
    keep = [i for i, name in enumerate(features) if name not in constant]
    X, features = X[:, keep], tuple(features[i] for i in keep)
    _check(path, options, X, y)
    if constant:
        console.print(f"[yellow]constant, so left out: {escape(', '.join(constant))}[/yellow]")
    if len(np.unique(y)) == 2:
        console.print(
            f"[yellow]{escape(options.target)} has two values; this treats them as numbers, not as classes[/yellow]"
        )
    name = Path(path).name
    story = f"{len(y)} rows of {name}."
    dataset = data.Dataset(name, X, y, features, options.target, story, str(path), "the user's own")
    if options.predict is None:
        return dataset, None
    new = data.read_csv(options.predict, columns=features).values
    _say_extrapolation(new, X, features, console)
    return dataset, new


def _check(path, options, X, y):
    if X.shape[1] == 0:
        raise data.TableError(f"{path}: every input column is constant, so there is nothing to predict from")
    if np.ptp(y) == 0:
        raise data.TableError(
            f"{path}: {options.target} is the same in every row, so there is nothing to learn"
        )
    if len(y) < 5:
        raise data.TableError(
            f"{path} has {len(y)} rows; at least 5 are needed, and some dozens to learn anything"
        )
    if len(y) > _MAX_ROWS:
        raise data.TableError(
            f"{path} has {len(y)} rows; exact Gaussian processes need N x N matrices and stop being practical "
            f"at about {_MAX_ROWS}: take a random part of the rows"
        )
    if options.folds and not 2 <= options.folds <= len(y):
        raise ValueError(
            f"--folds must be 0 (no cross-validation) or between 2 and the {len(y)} rows, got {options.folds}"
        )
    if options.draws < 4:
        raise ValueError(f"--draws must be at least 4, got {options.draws}")


def _say_extrapolation(new, X, features, console):
    outside = (new < X.min(0)) | (new > X.max(0))
    if outside.any():
        names = ", ".join(name for name, column in zip(features, outside.T) if column.any())
        console.print(
            f"[yellow]{outside.any(1).sum()} of {len(new)} rows to predict lie outside the range of the data in "
            f"{escape(names)}: expect wide bands there[/yellow]"
        )


def _learn(key, model, X, y, entry, options, text, console):
    """The fit, and what the engine warned of."""
    with warnings.catch_warnings(record=True) as caught, bars.task(text):
        warnings.simplefilter("always")
        fit = gp.fit(key, model, X, y, learn=entry.make(options.draws), standardize=True)
    remarks = "; ".join(
        dict.fromkeys(str(item.message) for item in caught if issubclass(item.category, UserWarning))
    )
    if remarks:
        console.print(f"[yellow]{escape(text)}: {escape(remarks)}[/yellow]")
    return fit, remarks


def _cross_validate(key, model, table, entry, options, console):
    """Predictions of every row by a fit that did not see it, those of the baseline, and the rows in their order."""
    folds = data.kfold(len(table.y), options.folds, seed=options.seed)
    size = min(len(train) for train, _ in folds)  # one size for all folds: compiled once
    parts, baselines = [], []
    with bars.task("folds", len(folds)) as task:
        for i, ((train, test), fold) in enumerate(zip(folds, jax.random.split(key, len(folds)))):
            rows = train[:size]
            X, y = table.X[rows], table.y[rows]
            fit, _ = _learn(fold, model, X, y, entry, options, f"{entry.label}, fold {i + 1}", console)
            parts.append(predictions(fit, table.X[test], table.y[test]))
            baselines.append(normal_baseline(y, table.y[test]))
            task.update(i + 1)
    return concatenate(parts), concatenate(baselines), np.concatenate([test for _, test in folds])


def _tables(problem, method, crossed):
    tables = []
    label = method.entry.label
    if crossed is not None:
        predicted, baseline, _ = crossed
        rows = []
        for name, one in ((label, predicted), ("no inputs", baseline)):
            own = scores(one)
            gap = difference(one, baseline) if one is predicted else None
            rows.append(
                (
                    name,
                    with_error(own.nlpd),
                    with_error(gap, sign=True),
                    with_error(own.rmse),
                    f"{with_error(own.coverage, scale=100.0)} %",
                )
            )
        columns = ("method", "NLPD", "minus no inputs", "RMSE", "in 95 % band")
        tables.append(
            TextTable(
                "Rows that the fit had not seen", columns, tuple(rows), _usefulness(predicted, baseline), 0
            )
        )
    chains = chains_table([method])
    if chains.rows:
        tables.append(chains)
    names = learned_names(problem.model, problem.prior)
    found = quantities(method.fit, names, problem.data.feature_names, target=problem.data.target_name)
    note = "A long lengthscale: the column hardly changes the prediction."
    known = evidence(method.fit)
    note = note if known == "-" else f"Log evidence: {known}. {note}"
    return [*tables, sections_of.values_table(found, title="What was learned")._replace(note=note)]


def _usefulness(predicted, baseline):
    gap = difference(predicted, baseline)
    if gap.value + 2 * gap.error < 0:
        return "The inputs help: the predictions are clearly better than ignoring them."
    if gap.value - 2 * gap.error > 0 and _squared_gain(predicted, baseline) <= 2:
        return "The predictions are worse than ignoring the inputs: do not use them."
    if _squared_gain(predicted, baseline) > 2:
        return (
            "The typical error is clearly smaller than that of ignoring the inputs (RMSE "
            f"{number(scores(predicted).rmse.value)} against {number(scores(baseline).rmse.value)}), but the NLPD is "
            "not: some outcomes were far outside what was expected. Use the means; do not rely on the bands."
        )
    return "No clear gain over ignoring the inputs, in NLPD or RMSE: do not rely on these predictions."


def _squared_gain(predicted, baseline):
    """How many standard errors the mean squared error is below that of the baseline, on the same rows."""
    gains = (baseline.y - baseline.mean) ** 2 - (predicted.y - predicted.mean) ** 2
    error = gains.std(ddof=1) / np.sqrt(len(gains))
    return gains.mean() / error if error > 0 else 0.0


def _sections(problem, method, tables, crossed):
    label, style = method.entry.label, 0
    sections = []
    if crossed is not None:
        predicted = crossed[0]
        text = (
            "The rows were cut into parts; each part was predicted by a fit to the others. NLPD is the "
            "average surprise at an outcome (lower is better), RMSE the typical error in the unit of the "
            "target, and about 95 % of the outcomes should fall into the 95 % band. “No inputs” predicts the "
            "mean and spread of the training rows for everybody. The number after ± is the standard error."
        )
        pictures = [
            sections_of.observed_picture(predicted, problem.data.target_name, label, style),
            sections_of.calibration_picture(predicted, label, style),
        ]
        sections.append(
            Section("Can it predict?", (Paragraph(text), tables[0], sections_of.gallery(pictures)))
        )
    sections.append(
        Section("What changes the prediction", (_effects_text(problem), _effects(problem, method)))
    )
    blocks = [*tables[1 if crossed is not None else 0 :], *sections_of.remarks([method])]
    blocks.append(sections_of.gallery(sections_of.hyperparameters(problem, [method])))
    sections.append(Section("Inside the model", tuple(blocks)))
    return sections


def _effects_text(problem):
    if problem.data.X.shape[1] == 1:
        return Paragraph(
            "The data and the predictions: the dark band holds half of what is expected, the light band 95 %."
        )
    return Paragraph(
        "One column varies, the others stay at their medians. Columns that matter most come first; the bands "
        "are for a new row, the ticks at the foot are the rows seen."
    )


def _effects(problem, method):
    if problem.data.X.shape[1] == 1:
        return sections_of.gallery([sections_of.series_picture(problem, method)])
    chosen = most_relevant(method.fit, 6)
    X, features = problem.data.X, problem.data.feature_names
    return sections_of.gallery(sections_of.effects(method.fit, X, features, chosen=chosen))


def _count(num, word):
    return f"{num} {word}" + ("s" if num != 1 else "")
