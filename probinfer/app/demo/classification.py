"""The demo's section on classification: one data set, four approximations, and the calibration of each."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer import data, gp
from probinfer.app.pages import plots
from probinfer.app.pages.run_facts import user_warnings
from probinfer.core.errors import NumericalError
from probinfer.core.types import PRNGKey
from probinfer.data import Dataset
from probinfer.plots.style import draw
from probinfer.report.html import Gallery, Paragraph, Section
from probinfer.report.scoring import Estimate
from probinfer.report.tables import TextTable, seconds, with_error

__all__ = [
    "METHODS",
    "ClassificationMethod",
    "ClassificationResult",
    "classification_section",
    "classification_table",
    "classify",
]


class ClassificationMethod(NamedTuple):
    """A method: its name, its inference of the latent function, and one clause about it."""

    label: str
    inference: Any
    about: str


class ClassificationResult(NamedTuple):
    """The fit and the predictions of a method.

    Attributes:
        method: the method.
        fit: the fit; None if it failed.
        probabilities: probabilities of class 1 at the test points ``(M,)``; None if the fit failed.
        log_density: log p(label) at the test points ``(M,)``; None if the fit failed.
        seconds: wall time, including compilation.
        remark: warnings of the fit, or why it failed; "" if there are none.
    """

    method: ClassificationMethod
    fit: Any
    probabilities: Any
    log_density: Any
    seconds: float
    remark: str = ""


# The first method is the reference of comparisons.
METHODS = (
    ClassificationMethod(
        "EP", gp.EP(), "expectation propagation, at the hyperparameters of largest evidence"
    ),
    ClassificationMethod("VI", gp.VI(), "maximizes a lower bound of the evidence"),
    ClassificationMethod("Hybrid", gp.Hybrid(), "infers by VI, learns hyperparameters by EP"),
    ClassificationMethod("Laplace", gp.Laplace(), "approximates the posterior by a normal at its mode"),
)


def classify(
    key: PRNGKey,
    rows: int,
    *,
    methods: Sequence[ClassificationMethod] = METHODS,
    done: Callable[[ClassificationResult], None] = lambda result: None,
) -> tuple[Dataset, list[ClassificationResult], np.ndarray]:
    """Train on randomly chosen rows of the breast cancer data, and predict the other rows.

    Args:
        key: random key.
        rows: number of training points.
        methods: the methods.
        done: called with each result as soon as it is available.

    Returns:
        The data, the result of each method, and the labels of the test points.
    """
    table = data.breast_cancer()
    order = np.random.default_rng(0).permutation(len(table.y))
    train, test = order[:rows], order[rows:]
    model = gp.Model(gp.kernels.Matern52(1.0, 5.0), gp.likelihoods.Bernoulli("probit"))
    results = []
    for method, method_key in zip(methods, jax.random.split(key, len(methods))):
        results.append(_fit_method(method_key, method, model, table, train, test))
        done(results[-1])
    return table, results, table.y[test]


def _fit_method(key, method, model, table, train, test):
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit = gp.fit(key, model, table.X[train], table.y[train], inference=method.inference)
            predictive = fit.predict_y(table.X[test])
        except NumericalError as error:
            return ClassificationResult(
                method=method,
                fit=None,
                probabilities=None,
                log_density=None,
                seconds=time.perf_counter() - start,
                remark=f"failed: {error}",
            )
    probabilities = np.asarray(predictive.probability, float)
    log_density = np.asarray(predictive.log_prob(jnp.asarray(table.y[test])), float)
    remark = "; ".join(user_warnings(caught))
    return ClassificationResult(
        method=method,
        fit=fit,
        probabilities=probabilities,
        log_density=log_density,
        seconds=time.perf_counter() - start,
        remark=remark,
    )


def classification_table(
    results: Sequence[ClassificationResult], labels: np.ndarray, *, title: str
) -> TextTable:
    """Return one row for each method: NLPD, its paired difference to the first, accuracy, evidence, time."""
    succeeded = [result for result in results if result.fit is not None]
    rows = []
    for result in results:
        if result.fit is None:
            rows.append((result.method.label, "failed", *("-",) * 4, seconds(result.seconds)))
            continue
        gap = _mean(succeeded[0].log_density - result.log_density) if result is not succeeded[0] else None
        loo = _mean(-np.asarray(result.fit.loo(), float))
        accuracy = _mean((result.probabilities > 0.5) == (labels == 1))
        evidence = "-" if result.fit.log_evidence is None else f"{float(result.fit.log_evidence):.1f}"
        rows.append(
            (
                result.method.label,
                with_error(_mean(-result.log_density)),
                with_error(gap, sign=True),
                f"{with_error(accuracy, scale=100.0)} %",
                with_error(loo),
                evidence,
                seconds(result.seconds),
            )
        )
    first = succeeded[0].method.label if succeeded else "the first"
    columns = ("method", "NLPD", f"minus {first}", "accuracy", "leave-one-out", "log evidence", "time")
    return TextTable(title, columns, tuple(rows), "", 0)


def classification_section(
    table: Dataset,
    results: Sequence[ClassificationResult],
    labels: np.ndarray,
    scores: TextTable,
    *,
    rows: int,
) -> Section:
    """Return the section: introduction, table, and a reliability diagram for each method."""
    introduction = (
        f"{table.description} The model learns from {rows} tumors and predicts {len(labels)} others. With labels "
        "instead of numbers, the posterior of the latent function has no closed form: Laplace, expectation propagation "
        "(EP), variational inference (VI) and their hybrid approximate it. Each has its own estimate of the evidence, "
        "by which the hyperparameters are learned. “Leave-one-out” is computed from the training data alone, without "
        "refitting; it should be close to the NLPD."
    )
    pictures = [_picture(result, labels) for result in results if result.fit is not None]
    remarks = [
        Paragraph(f"{result.method.label}: {result.remark}", "remark") for result in results if result.remark
    ]
    return Section(
        "Breast cancer: predicting classes",
        (Paragraph(introduction), scores, *remarks, Gallery(tuple(pictures))),
    )


def _picture(result, labels):
    diagram = gp.calibration.reliability(result.probabilities, labels, num_bins=6)
    caption = (
        f"Mean calibration error {diagram.calibration_error:.3f}; {diagram.calibration_error_by_chance:.3f} is "
        "expected by chance if the probabilities are correct."
    )
    style = [method.label for method in METHODS].index(result.method.label)

    def fn(axes, theme):
        plots.reliability(axes, theme, diagram, style=style)

    return draw(
        f"Reliability of the probabilities: {result.method.label}", caption, fn, width=3.2, height=3.0
    )


def _mean(values) -> Estimate:
    values = np.asarray(values, float)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))
