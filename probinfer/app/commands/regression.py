"""``probinfer gp``: regression on a user's table, with cross-validation, predictions, a report and a saved fit."""

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
from probinfer.app.pages import sections as page_sections
from probinfer.app.pages.engines import EngineEntry, find_engine
from probinfer.app.pages.methods import MethodResult, RegressionProblem, chains_table, evidence
from probinfer.app.pages.run_facts import provenance, user_warnings
from probinfer.app.pages.units import learned_names, most_relevant, quantities
from probinfer.core.errors import import_extra
from probinfer.report.html import Paragraph, Section, check_folder, page, write_page
from probinfer.report.scoring import concatenate, difference, normal_baseline, predictions, scores
from probinfer.report.tables import TextTable, number, to_rich, with_error
from probinfer.running import progress as bars

__all__ = ["KERNELS", "RegressionOptions", "choose_engine", "make_model", "run_regression"]

KERNELS: dict[str, Any] = {
    "matern12": gp.kernels.Matern12,
    "matern32": gp.kernels.Matern32,
    "matern52": gp.kernels.Matern52,
    "rbf": gp.kernels.RBF,
    "rq": gp.kernels.RationalQuadratic,
}

_AUTO_ROWS = 300  # up to this size, NUTS with cross-validation takes minutes on one core
_MAX_ROWS = 10_000  # an exact fit stores a few N x N matrices


class RegressionOptions(NamedTuple):
    """Options of ``probinfer gp``; its ``--help`` describes each."""

    target: str
    engine: str = "auto"
    kernel: str = "matern52"
    folds: int = 5
    drop: tuple[str, ...] = ()
    predict: str | None = None
    out: str = "probinfer-report"
    seed: int = 0
    draws: int = 500


def run_regression(path: str, options: RegressionOptions, *, command: str, console: Console) -> Path:
    """Fit a Gaussian process to a CSV file, score it, and write the report and the output files.

    Args:
        path: the CSV file.
        options: the user's options.
        command: the command line, recorded in the report.
        console: console of progress, tables and warnings.

    Returns:
        The path of the report.

    Raises:
        TableError: the file, or the file of rows to predict, cannot be used.
        ValueError: an option is out of range, or the output folder is a file.
        MissingExtraError: matplotlib is not installed.
        NumericalError: the engine found no usable hyperparameters.
    """
    start = time.perf_counter()
    check_folder(options.out)
    import_extra("matplotlib", "plots")
    table, new = _read(path, options, console)
    entry = choose_engine(options.engine, len(table.y))
    model = make_model(options.kernel, table.X.shape[1])
    console.print(f"{len(table.y)} rows, {table.X.shape[1]} inputs; {entry.label} {entry.about}")
    fit_key, fold_key = jax.random.split(jax.random.key(options.seed))
    fit, remarks = _fit(fit_key, model, table.X, table.y, entry, options, f"{entry.label}, all rows", console)
    cross_validation = None
    if options.folds:
        cross_validation = _cross_validate(fold_key, model, table, entry, options, console)
    written = write_files(fit, table, new, cross_validation, options.out, options.predict)
    problem = RegressionProblem(
        data=table,
        train=np.arange(len(table.y)),
        test=np.arange(0),
        model=model,
        prior=gp.default_prior(model, np.asarray(fit.X)),
        parts={},
    )
    method = MethodResult(
        entry=entry,
        fit=fit,
        predicted=cross_validation and cross_validation[0],
        seconds=time.perf_counter() - start,
        remark=remarks,
    )
    tables = _tables(problem, method, cross_validation)
    for result_table in tables:
        console.print(to_rich(result_table))
    facts = provenance(command, seed=options.seed, seconds=time.perf_counter() - start, extra=written)
    sections = _sections(problem, method, tables, cross_validation)
    lead = (
        f"{table.target_name} from {_count(len(table.feature_names), 'column')} of {table.name}, "
        f"{len(table.y)} rows: what a Gaussian process learned, and how reliable its predictions are."
    )
    return write_page(options.out, page(f"Predicting {table.target_name}", lead, sections, facts))


def choose_engine(name: str, rows: int) -> EngineEntry:
    """Return the engine of this name; ``auto`` is NUTS for small tables and MAP for larger ones."""
    if name == "auto":
        name = "nuts" if rows <= _AUTO_ROWS else "map"
    return find_engine(name)


def make_model(kernel: str, num_columns: int) -> gp.Model:
    """Return a model with one lengthscale for each column, and Gaussian noise.

    Raises:
        ValueError: no kernel has this name.
    """
    if kernel not in KERNELS:
        raise ValueError(f"no kernel is called {kernel!r}; choose one of {', '.join(KERNELS)}")
    # The typical distance between two standardized points grows with the square root of the dimension.
    lengthscale = jnp.full(num_columns, 2.0 * float(np.sqrt(num_columns)))
    return gp.Model(
        KERNELS[kernel](variance=1.0, lengthscale=lengthscale), gp.likelihoods.Gaussian(variance=0.3)
    )


def _read(path, options, console):
    """Return the data set, and the inputs to predict or None."""
    if options.target in options.drop:
        raise ValueError(
            f"--drop {options.target} leaves out the column that --target names; drop other columns"
        )
    table = data.read_csv(path, drop=options.drop, target=options.target)
    X, y, features = data.split_target(table, options.target)
    constant = [name for name, column in zip(features, X.T) if np.ptp(column) == 0]
    varying = [i for i, name in enumerate(features) if name not in constant]
    X, features = X[:, varying], tuple(features[i] for i in varying)
    _check_table(path, options, X, y)
    if constant:
        console.print(f"[yellow]left out because constant: {escape(', '.join(constant))}[/yellow]")
    if len(np.unique(y)) == 2:
        console.print(
            f"[yellow]{escape(options.target)} has two values; they are treated as numbers, not as classes[/yellow]"
        )
    name = Path(path).name
    dataset = data.Dataset(
        name=name,
        X=X,
        y=y,
        feature_names=features,
        target_name=options.target,
        description=f"{len(y)} rows of {name}.",
        source=str(path),
        license="the user's own",
    )
    if options.predict is None:
        return dataset, None
    new = data.read_csv(options.predict, columns=features).values
    _warn_extrapolation(new, X, features, console)
    return dataset, new


def _check_table(path, options, X, y):
    if X.shape[1] == 0:
        raise data.TableError(f"{path}: every input column is constant, so there is nothing to predict from")
    if np.ptp(y) == 0:
        raise data.TableError(
            f"{path}: {options.target} is the same in every row, so there is nothing to learn"
        )
    if len(y) < 5:
        raise data.TableError(
            f"{path} has {len(y)} rows; at least 5 are needed, and several dozen for useful predictions"
        )
    if len(y) > _MAX_ROWS:
        raise data.TableError(
            f"{path} has {len(y)} rows; exact Gaussian processes need N x N matrices, which are impractical "
            f"beyond about {_MAX_ROWS} rows: use a random subset of the rows"
        )
    if options.folds and not 2 <= options.folds <= len(y):
        raise ValueError(
            f"--folds must be 0 (no cross-validation) or between 2 and the {len(y)} rows, got {options.folds}"
        )
    if options.draws < 4:
        raise ValueError(f"--draws must be at least 4, got {options.draws}")


def _warn_extrapolation(new, X, features, console):
    outside = (new < X.min(0)) | (new > X.max(0))
    if outside.any():
        names = ", ".join(name for name, column in zip(features, outside.T) if column.any())
        console.print(
            f"[yellow]{outside.any(1).sum()} of {len(new)} rows to predict lie outside the range of the data in "
            f"{escape(names)}: expect wide bands for them[/yellow]"
        )


def _fit(key, model, X, y, entry, options, text, console):
    """Return the fit and the warnings of the engine."""
    with warnings.catch_warnings(record=True) as caught, bars.task(text):
        warnings.simplefilter("always")
        fit = gp.fit(key, model, X, y, learn=entry.make(options.draws), standardize=True)
    remarks = "; ".join(user_warnings(caught))
    if remarks:
        console.print(f"[yellow]{escape(text)}: {escape(remarks)}[/yellow]")
    return fit, remarks


def _cross_validate(key, model, table, entry, options, console):
    """Return held-out predictions of every row, those of the baseline, and the indices of the rows in this order."""
    folds = data.kfold(len(table.y), options.folds, seed=options.seed)
    size = min(len(train) for train, _ in folds)  # one size for all folds, so that the fit is compiled once
    parts, baselines = [], []
    with bars.task("folds", len(folds)) as task:
        for i, ((train, test), fold_key) in enumerate(zip(folds, jax.random.split(key, len(folds)))):
            rows = train[:size]
            X, y = table.X[rows], table.y[rows]
            fit, _ = _fit(fold_key, model, X, y, entry, options, f"{entry.label}, fold {i + 1}", console)
            parts.append(predictions(fit, table.X[test], table.y[test]))
            baselines.append(normal_baseline(y, table.y[test]))
            task.update(i + 1)
    return concatenate(parts), concatenate(baselines), np.concatenate([test for _, test in folds])


def _tables(problem, method, cross_validation):
    tables = []
    label = method.entry.label
    if cross_validation is not None:
        predicted, baseline, _ = cross_validation
        rows = []
        for name, predictive in ((label, predicted), ("no inputs", baseline)):
            values = scores(predictive)
            gap = difference(predictive, baseline) if predictive is predicted else None
            rows.append(
                (
                    name,
                    with_error(values.nlpd),
                    with_error(gap, sign=True),
                    with_error(values.rmse),
                    f"{with_error(values.coverage, scale=100.0)} %",
                )
            )
        columns = ("method", "NLPD", "minus no inputs", "RMSE", "in 95 % band")
        tables.append(
            TextTable(
                "Cross-validation scores on held-out rows",
                columns,
                tuple(rows),
                _usefulness(predicted, baseline),
                0,
            )
        )
    chains = chains_table([method])
    if chains.rows:
        tables.append(chains)
    names = learned_names(problem.model, problem.prior)
    learned = quantities(method.fit, names, problem.data.feature_names, target=problem.data.target_name)
    note = "A column with a long lengthscale has little effect on the prediction."
    evidence_text = evidence(method.fit)
    note = note if evidence_text == "-" else f"Log evidence: {evidence_text}. {note}"
    return [*tables, page_sections.values_table(learned, title="Learned hyperparameters")._replace(note=note)]


def _usefulness(predicted, baseline):
    gap = difference(predicted, baseline)
    if gap.value + 2 * gap.error < 0:
        return "The inputs help: the predictions are clearly better than those without inputs."
    if gap.value - 2 * gap.error > 0 and _squared_error_gain(predicted, baseline) <= 2:
        return "The predictions are worse than those without inputs: do not use them."
    if _squared_error_gain(predicted, baseline) > 2:
        return (
            "The typical error is clearly smaller than without inputs (RMSE "
            f"{number(scores(predicted).rmse.value)} against {number(scores(baseline).rmse.value)}), but the NLPD is "
            "not: some outcomes lay far outside the predicted bands. Use the means; do not rely on the bands."
        )
    return "No clear gain over predictions without inputs, in NLPD or RMSE: do not rely on these predictions."


def _squared_error_gain(predicted, baseline):
    """How many paired standard errors the mean squared error lies below that of the baseline."""
    gains = (baseline.y - baseline.mean) ** 2 - (predicted.y - predicted.mean) ** 2
    error = gains.std(ddof=1) / np.sqrt(len(gains))
    return gains.mean() / error if error > 0 else 0.0


def _sections(problem, method, tables, cross_validation):
    label, style = method.entry.label, 0
    sections = []
    if cross_validation is not None:
        predicted = cross_validation[0]
        text = (
            "Each fold of the rows was predicted by a fit to the other folds. NLPD is the negative log predictive "
            "density, averaged over the rows (lower is better). RMSE is the root mean square error in the unit of the "
            "target. About 95 % of the outcomes should lie in the 95 % band. “No inputs” predicts the mean and the "
            "standard deviation of the training rows for every row. The number after ± is the standard error."
        )
        pictures = [
            page_sections.observed_picture(predicted, problem.data.target_name, label, style),
            page_sections.calibration_picture(predicted, label, style),
        ]
        sections.append(
            Section("Predictive accuracy", (Paragraph(text), tables[0], page_sections.gallery(pictures)))
        )
    sections.append(Section("Effects of the inputs", (_effects_text(problem), _effects(problem, method))))
    blocks = [*tables[1 if cross_validation is not None else 0 :], *page_sections.remarks([method])]
    blocks.append(page_sections.gallery(page_sections.hyperparameters(problem, [method])))
    sections.append(Section("Hyperparameters", tuple(blocks)))
    return sections


def _effects_text(problem):
    if problem.data.X.shape[1] == 1:
        return Paragraph(
            "The data and the predictions: the dark band is the central 50 % interval, the light band 95 %."
        )
    return Paragraph(
        "Each plot varies one column and fixes the others at their medians. The most relevant columns come first; the "
        "bands are predictive intervals of a new row, and the ticks at the bottom mark the training rows."
    )


def _effects(problem, method):
    if problem.data.X.shape[1] == 1:
        return page_sections.gallery([page_sections.series_picture(problem, method)])
    chosen = most_relevant(method.fit, 6)
    X, features = problem.data.X, problem.data.feature_names
    return page_sections.gallery(page_sections.effects(method.fit, X, features, chosen=chosen))


def _count(num, noun):
    return f"{num} {noun}" + ("s" if num != 1 else "")
