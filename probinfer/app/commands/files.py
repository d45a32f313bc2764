"""The files that ``probinfer gp`` writes beside its page: the saved fit and tables of predictions."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probinfer.data import Dataset
from probinfer.report.scoring import Predictions, predictions

__all__ = ["write_files"]


def write_files(
    fit: Any, table: Dataset, new: Any, cross_validation: Any, folder: str, source: Any
) -> dict[str, str]:
    """Write the saved fit and the CSV files.

    Args:
        fit: a ``gp.Fit``.
        table: the training data.
        new: inputs of the rows to predict, or None.
        cross_validation: cross-validated predictions, those of the baseline, and the rows of both, or None.
        folder: output folder, created if it does not exist.
        source: the file that ``new`` was read from.

    Returns:
        The files written, for the report: a name and a description of each.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    fit.save(out / "fit.npz")
    written = {"saved fit": "fit.npz; read it with probinfer.gp.load"}
    if cross_validation is not None:
        predicted, _, rows = cross_validation
        order = np.argsort(rows)
        extra = {"row": rows[order] + 1.0, "observed": predicted.y[order]}
        _write_columns(out / "cross-validation.csv", extra, predicted, order)
        written["cross-validated predictions"] = "cross-validation.csv"
    if new is not None:
        predicted = predictions(fit, new)
        _write_columns(
            out / "predictions.csv", dict(zip(table.feature_names, new.T)), predicted, np.arange(len(new))
        )
        written["predictions"] = f"predictions.csv, for the rows of {source}"
    return written


def _write_columns(
    path: Path, extra: dict[str, Any], predicted: Predictions, order: Sequence[int] | np.ndarray
) -> None:
    columns = {**extra, "mean": predicted.mean[order], "sd": predicted.sd[order]}
    columns |= {
        f"q{round(100 * level):02d}": predicted.quantiles[level][order] for level in (0.05, 0.5, 0.95)
    }
    if predicted.log_density is not None:
        columns["log_density"] = predicted.log_density[order]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([f"{value:.10g}" for value in row] for row in zip(*columns.values()))
