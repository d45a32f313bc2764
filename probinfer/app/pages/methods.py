"""One problem, several engines: fit, predict, score, and put side by side."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from probinfer import gp
from probinfer.app.pages.engines import Entry
from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import PRNGKey
from probinfer.data import Dataset
from probinfer.report.scoring import difference, normal_baseline, predictions, scores
from probinfer.report.tables import TextTable, seconds, with_error

__all__ = ["Method", "Problem", "chains_table", "evidence", "methods_table", "run_methods"]


class Problem(NamedTuple):
    """What is learned from what.

    Attributes:
        data: the whole table.
        train: rows to learn from.
        test: rows to predict.
        model: where learning starts.
        prior: a tree shaped like the model.
        parts: words for the parts of its kernel by dotted prefix.
        block: neighbouring test rows whose errors are alike (``scores.scores``).
    """

    data: Dataset
    train: np.ndarray
    test: np.ndarray
    model: Any
    prior: Any
    parts: dict[str, str]
    block: int = 1


class Method(NamedTuple):
    """What one engine made of a problem.

    Attributes:
        entry: the engine.
        fit: the fit; None if it failed.
        predicted: ``Predictions`` of the test rows; None if it failed.
        seconds: wall time of learning and predicting, compilation included.
        remark: what the engine warned of, or why it failed; "" if nothing.
    """

    entry: Entry
    fit: Any
    predicted: Any
    seconds: float
    remark: str = ""


def run_methods(
    key: PRNGKey,
    problem: Problem,
    entries: Sequence[Entry],
    *,
    draws: int,
    progress: bool | None = None,
    done: Callable[[Method], None] = lambda method: None,
) -> list[Method]:
    """Fit a problem with several engines; one that fails does not stop the others.

    Args:
        key: random key; every engine gets one of its own.
        problem: what is learned.
        entries: the engines.
        draws: draws of a chain.
        progress: show progress; by default on a terminal.
        done: called with each method as soon as it is finished.
    """
    methods = []
    for entry, method_key in zip(entries, jax.random.split(key, len(entries))):
        methods.append(_run(method_key, problem, entry, draws, progress))
        done(methods[-1])
    return methods


def _run(key, problem, entry, draws, progress):
    X, y = problem.data.X[problem.train], problem.data.y[problem.train]
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit = gp.fit(
                key,
                problem.model,
                X,
                y,
                prior=problem.prior,
                learn=entry.make(draws),
                standardize=True,
                progress=progress,
            )
            predicted = predictions(fit, problem.data.X[problem.test], problem.data.y[problem.test])
        except NumericalError as error:
            return Method(entry, None, None, time.perf_counter() - start, f"failed: {error}")
    remarks = [str(item.message) for item in caught if issubclass(item.category, UserWarning)]
    status = int(getattr(fit.info, "status", Status.OK))
    if status != Status.OK and not remarks:
        remarks = [advice(status)]
    return Method(entry, fit, predicted, time.perf_counter() - start, "; ".join(dict.fromkeys(remarks)))


def evidence(fit: Any) -> str:
    """The log evidence of a fit in words: at the optimum, integrated over hyperparameters, or bounded from below."""
    if fit.log_evidence is not None:
        return f"{float(fit.log_evidence):.1f}" + (" at optimum" if fit.is_point else "")
    bound = getattr(fit.info, "elbo", None)
    if bound is None:
        return "-"
    # The engine saw outputs in units of their standard deviation: the density in the user's units is smaller by the
    # Jacobian of that map, once a data point.
    value = float(bound) - len(fit.y) * float(np.log(fit.scaling.y_scale))
    return f"≥ {value:.1f} (bound)"


def methods_table(problem: Problem, methods: Sequence[Method], *, title: str) -> TextTable:
    """One row a method: scores on the test rows with standard errors, evidence and time.

    The reference of the paired differences is the first method that worked; the last row predicts without inputs.
    """
    worked = [method for method in methods if method.predicted is not None]
    reference = worked[0] if worked else None
    rows = [_method_row(method, reference, problem.block) for method in methods]
    baseline = normal_baseline(problem.data.y[problem.train], problem.data.y[problem.test])
    rows.append(_row("no inputs", baseline, reference, problem.block, "-", "-"))
    against = f"minus {reference.entry.label}" if reference else "difference"
    columns = ("method", "NLPD", against, "RMSE", "in 95 % band", "log evidence", "time")
    return TextTable(title, columns, tuple(rows), "", methods.index(reference) if reference else None)


def chains_table(methods: Sequence[Method]) -> TextTable:
    """How well the Markov chains of each method agree: worst R-hat, smallest effective sample sizes, divergences."""
    rows = []
    for method in methods:
        if method.fit is None or method.fit.posterior is None or method.fit.posterior.num_chains < 2:
            continue
        posterior, info = method.fit.posterior, method.fit.info
        rhat, bulk, tail = _agreement(posterior, info)
        diverging = getattr(info, "diverging", None)
        rows.append(
            (
                method.entry.label,
                str(posterior.num_chains),
                str(posterior.num_draws),
                f"{rhat:.3f}",
                f"{bulk:.0f}",
                f"{tail:.0f}",
                "-" if diverging is None else str(int(np.sum(np.asarray(diverging)))),
                getattr(info, "metric_name", "-"),
            )
        )
    columns = (
        "method",
        "chains",
        "draws of each",
        "worst R-hat",
        "least ESS, bulk",
        "least ESS, tail",
        "divergences",
        "metric",
    )
    note = "R-hat below 1.01 and at least 100 effective draws a chain (ESS) mean that the chains agree."
    return TextTable("Have the chains mixed?", columns, tuple(rows), note)


def _agreement(posterior, info):
    """Worst R-hat and least ESS: the engine's own where it reports them, else of the draws."""
    if hasattr(info, "rhat"):
        parts = [
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
            for tree in (info.rhat, info.ess, info.ess_tail)
        ]
    else:
        columns = posterior.summary().columns
        parts = [columns["rhat"], columns["ess_bulk"], columns["ess_tail"]]
    return np.nanmax(parts[0]), np.nanmin(parts[1]), np.nanmin(parts[2])


def _method_row(method, reference, block):
    if method.predicted is None:
        return (method.entry.label, "failed", *("-",) * 4, seconds(method.seconds))
    return _row(
        method.entry.label, method.predicted, reference, block, evidence(method.fit), seconds(method.seconds)
    )


def _row(label, predicted, reference, block, log_evidence, time_text):
    own = scores(predicted, block=block)
    is_reference = reference is not None and predicted is reference.predicted
    versus = (
        None if reference is None or is_reference else difference(predicted, reference.predicted, block=block)
    )
    return (
        label,
        with_error(own.nlpd),
        with_error(versus, sign=True),
        with_error(own.rmse),
        f"{with_error(own.coverage, scale=100.0)} %",
        log_evidence,
        time_text,
    )
