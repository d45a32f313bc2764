"""The demo's classification: one data set, four approximations, and whether their probabilities can be believed."""

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
from probinfer.core.errors import NumericalError
from probinfer.core.types import PRNGKey
from probinfer.data import Dataset
from probinfer.plots.style import draw
from probinfer.report.html import Gallery, Paragraph, Section
from probinfer.report.scoring import Estimate
from probinfer.report.tables import TextTable, seconds, with_error

__all__ = ["METHODS", "Classified", "Way", "classification_section", "classification_table", "classify"]


class Way(NamedTuple):
    """A method: its name, how the latent function is inferred, and that in one clause."""

    label: str
    inference: Any
    about: str


class Classified(NamedTuple):
    """What a method made of the data.

    Attributes:
        way: the method.
        fit: the fit; None if it failed.
        probabilities: of class 1, for the test points.
        log_density: log p(label) of the test points.
        seconds: wall time, compilation included.
        remark: what was warned of; "" if nothing.
    """

    way: Way
    fit: Any
    probabilities: Any
    log_density: Any
    seconds: float
    remark: str = ""


# The first is the reference of comparisons.
METHODS = (
    Way("EP", gp.EP(), "matches moments, the most plausible setting"),
    Way("VI", gp.VI(), "bounds the evidence from below"),
    Way("Hybrid", gp.Hybrid(), "infers like VI, learns like EP"),
    Way("Laplace", gp.Laplace(), "a normal at the mode"),
)


def classify(
    key: PRNGKey,
    rows: int,
    *,
    ways: Sequence[Way] = METHODS,
    done: Callable[[Classified], None] = lambda method: None,
) -> tuple[Dataset, list[Classified], np.ndarray]:
    """Learn from the first rows of the breast cancer data in random order, and predict the rest.

    Args:
        key: random key.
        rows: training points.
        ways: the methods.
        done: called with each method as soon as it is finished.

    Returns:
        The data, what each method made of them, and the labels of the test points.
    """
    table = data.breast_cancer()
    order = np.random.default_rng(0).permutation(len(table.y))
    train, test = order[:rows], order[rows:]
    model = gp.Model(gp.kernels.Matern52(1.0, 5.0), gp.likelihoods.Bernoulli("probit"))
    found = []
    for way, way_key in zip(ways, jax.random.split(key, len(ways))):
        found.append(_run(way_key, way, model, table, train, test))
        done(found[-1])
    return table, found, table.y[test]


def _run(key, way, model, table, train, test):
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit = gp.fit(key, model, table.X[train], table.y[train], inference=way.inference)
            predictive = fit.predict_y(table.X[test])
        except NumericalError as error:
            return Classified(way, None, None, None, time.perf_counter() - start, f"failed: {error}")
    probabilities = np.asarray(predictive.probability, float)
    log_density = np.asarray(predictive.log_prob(jnp.asarray(table.y[test])), float)
    remark = "; ".join(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
    return Classified(way, fit, probabilities, log_density, time.perf_counter() - start, remark)


def classification_table(found: Sequence[Classified], labels: np.ndarray, *, title: str) -> TextTable:
    """One row a method: NLPD, its paired difference to the first, accuracy, evidence, time."""
    worked = [method for method in found if method.fit is not None]
    rows = []
    for method in found:
        if method.fit is None:
            rows.append((method.way.label, "failed", *("-",) * 4, seconds(method.seconds)))
            continue
        versus = _mean(worked[0].log_density - method.log_density) if method is not worked[0] else None
        loo = _mean(-np.asarray(method.fit.loo(), float))
        right = _mean((method.probabilities > 0.5) == (labels == 1))
        evidence = "-" if method.fit.log_evidence is None else f"{float(method.fit.log_evidence):.1f}"
        rows.append(
            (
                method.way.label,
                with_error(_mean(-method.log_density)),
                with_error(versus, sign=True),
                f"{with_error(right, scale=100.0)} %",
                with_error(loo),
                evidence,
                seconds(method.seconds),
            )
        )
    first = worked[0].way.label if worked else "the first"
    columns = ("method", "NLPD", f"minus {first}", "right", "leave-one-out", "log evidence", "time")
    return TextTable(title, columns, tuple(rows), "", 0)


def classification_section(
    table: Dataset, found: Sequence[Classified], labels: np.ndarray, scores: TextTable, *, rows: int
) -> Section:
    """The story, the table and a reliability diagram a method."""
    story = (
        f"{table.description} The model learns from {rows} tumours and predicts {len(labels)} others. With labels "
        "instead of numbers, the latent function has no closed form: Laplace, expectation propagation (EP), "
        "variational inference (VI) and their hybrid approximate it, each with an evidence of its own, by which "
        "the hyperparameters are learned. “Leave-one-out” is computed from the training data alone, without "
        "refitting; it should be near the NLPD."
    )
    pictures = [_picture(method, labels) for method in found if method.fit is not None]
    remarks = [Paragraph(f"{m.way.label}: {m.remark}", "remark") for m in found if m.remark]
    return Section(
        "Breast cancer: predicting classes", (Paragraph(story), scores, *remarks, Gallery(tuple(pictures)))
    )


def _picture(method, labels):
    result = gp.calibration.reliability(method.probabilities, labels, num_bins=6)
    caption = (
        f"Mean gap {result.calibration_error:.3f}; {result.calibration_error_by_chance:.3f} is to be expected by "
        "chance if the probabilities are right."
    )
    style = [way.label for way in METHODS].index(method.way.label)

    def fn(axes, theme):
        plots.reliability(axes, theme, result, style=style)

    return draw(f"Do the probabilities hold? {method.way.label}", caption, fn, width=3.2, height=3.0)


def _mean(values) -> Estimate:
    values = np.asarray(values, float)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))
