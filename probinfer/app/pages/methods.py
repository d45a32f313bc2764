"""Fit one regression problem with several engines, and compare their predictions."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from probinfer import gp
from probinfer.app.pages.engines import EngineEntry
from probinfer.app.pages.run_facts import user_warnings
from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import Int, PRNGKey
from probinfer.data import Dataset
from probinfer.report.scoring import difference, normal_baseline, predictions, scores
from probinfer.report.tables import TextTable, seconds, with_error

__all__ = ["MethodResult", "RegressionProblem", "chains_table", "evidence", "methods_table", "run_methods"]


class RegressionProblem(NamedTuple):
    """A data set with its split, a model and a prior.

    Attributes:
        data: all rows of the data.
        train: indices of the training rows.
        test: indices of the test rows.
        model: model with the initial hyperparameters.
        prior: prior of the hyperparameters, a tree with the structure of the model.
        parts: names of the parts of the kernel, by dotted prefix.
        block: number of neighboring test rows with correlated errors (``scoring.scores``).
    """

    data: Dataset
    train: Int[np.ndarray, " N"]
    test: Int[np.ndarray, " M"]
    model: Any
    prior: Any
    parts: dict[str, str]
    block: int = 1


class MethodResult(NamedTuple):
    """The fit and the predictions of one engine.

    Attributes:
        entry: the engine.
        fit: the fit; None if it failed.
        predicted: ``Predictions`` of the test rows; None if the fit failed.
        seconds: wall time of learning and prediction, including compilation.
        remark: warnings of the engine, or why it failed; "" if there are none.
    """

    entry: EngineEntry
    fit: Any
    predicted: Any
    seconds: float
    remark: str = ""


def run_methods(
    key: PRNGKey,
    problem: RegressionProblem,
    entries: Sequence[EngineEntry],
    *,
    draws: int,
    progress: bool | None = None,
    done: Callable[[MethodResult], None] = lambda method: None,
) -> list[MethodResult]:
    """Fit a problem with several engines; an engine that fails does not stop the others.

    Args:
        key: random key; each engine gets its own key.
        problem: the data, the model and the prior.
        entries: the engines.
        draws: number of draws per chain.
        progress: whether to show progress; None shows it on a terminal.
        done: called with each result as soon as it is available.
    """
    methods = []
    for entry, method_key in zip(entries, jax.random.split(key, len(entries))):
        methods.append(_fit_engine(method_key, problem, entry, draws, progress))
        done(methods[-1])
    return methods


def _fit_engine(key, problem, entry, draws, progress):
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
            elapsed = time.perf_counter() - start
            return MethodResult(
                entry=entry, fit=None, predicted=None, seconds=elapsed, remark=f"failed: {error}"
            )
    remarks = user_warnings(caught)
    status = int(getattr(fit.info, "status", Status.OK))
    if status != Status.OK and not remarks:
        remarks = [advice(status)]
    return MethodResult(
        entry=entry,
        fit=fit,
        predicted=predicted,
        seconds=time.perf_counter() - start,
        remark="; ".join(remarks),
    )


def evidence(fit: Any) -> str:
    """Return the log evidence of a fit as text: at the optimum, integrated over hyperparameters, or a lower bound."""
    if fit.log_evidence is not None:
        return f"{float(fit.log_evidence):.1f}" + (" at optimum" if fit.is_point else "")
    bound = getattr(fit.info, "elbo", None)
    if bound is None:
        return "-"
    # The engine works with standardized outputs y / s. In the user's units, each of the n data points contributes the
    # Jacobian 1 / s of that map to the density: log p(y) = log p(y / s) - n log s.
    value = float(bound) - len(fit.y) * float(np.log(fit.scaling.y_scale))
    return f"≥ {value:.1f} (bound)"


def methods_table(problem: RegressionProblem, methods: Sequence[MethodResult], *, title: str) -> TextTable:
    """Return a table with one row for each method: scores on the test rows with standard errors, evidence and time.

    The reference of the paired differences is the first method that succeeded; the last row predicts without inputs.
    """
    succeeded = [method for method in methods if method.predicted is not None]
    reference = succeeded[0] if succeeded else None
    rows = [_method_row(method, reference, problem.block) for method in methods]
    baseline = normal_baseline(problem.data.y[problem.train], problem.data.y[problem.test])
    rows.append(_row("no inputs", baseline, reference, problem.block, "-", "-"))
    difference_column = f"minus {reference.entry.label}" if reference else "difference"
    columns = ("method", "NLPD", difference_column, "RMSE", "in 95 % band", "log evidence", "time")
    return TextTable(title, columns, tuple(rows), "", methods.index(reference) if reference else None)


def chains_table(methods: Sequence[MethodResult]) -> TextTable:
    """Return the convergence diagnostics of each method's chains: largest R-hat, smallest ESS, divergences."""
    rows = []
    for method in methods:
        if method.fit is None or method.fit.posterior is None or method.fit.posterior.num_chains < 2:
            continue
        posterior, info = method.fit.posterior, method.fit.info
        rhat, bulk, tail = _convergence(posterior, info)
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
        "draws per chain",
        "max R-hat",
        "min ESS, bulk",
        "min ESS, tail",
        "divergences",
        "metric",
    )
    note = "R-hat below 1.01 and an ESS of at least 100 per chain indicate that the chains agree."
    return TextTable("Convergence of the chains", columns, tuple(rows), note)


def _convergence(posterior, info):
    """Return the largest R-hat and the smallest ESS, as the engine reports them or else computed from the draws."""
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
    values = scores(predicted, block=block)
    is_reference = reference is not None and predicted is reference.predicted
    gap = (
        None if reference is None or is_reference else difference(predicted, reference.predicted, block=block)
    )
    return (
        label,
        with_error(values.nlpd),
        with_error(gap, sign=True),
        with_error(values.rmse),
        f"{with_error(values.coverage, scale=100.0)} %",
        log_evidence,
        time_text,
    )
