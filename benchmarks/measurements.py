"""Data for measurements: files that are not part of the project, found through one environment variable.

Benchmarks that compare with published numbers read them; nothing else needs them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from probinfer.data.dataset import Dataset

__all__ = ["VARIABLE", "measurement", "measurement_names", "measurement_path"]

VARIABLE = "PROBINFER_DATA"


class _File(NamedTuple):
    path: str
    delimiter: str | None
    has_header: bool
    features: tuple[str, ...]
    target: str
    description: str
    source: str
    license: str


_UCI = "UCI machine learning repository"
_FILES = {
    "concrete": _File(
        path="gp/concrete.csv",
        delimiter=",",
        has_header=True,
        features=(
            "cement",
            "slag",
            "ash",
            "water",
            "superplasticizer",
            "coarse aggregate",
            "fine aggregate",
            "age",
        ),
        target="compressive strength (MPa)",
        description="1030 concretes: what is in them, how old they are, and how much they carry.",
        source=f"Yeh (1998); {_UCI}",
        license="CC BY 4.0",
    ),
    "winequality_red": _File(
        path="gp/winequality_red.csv",
        delimiter=",",
        has_header=True,
        features=(
            "fixed acidity",
            "volatile acidity",
            "citric acid",
            "residual sugar",
            "chlorides",
            "free sulfur dioxide",
            "total sulfur dioxide",
            "density",
            "pH",
            "sulphates",
            "alcohol",
        ),
        target="quality (0 to 10)",
        description="1599 Portuguese red wines: eleven measurements, and the grade that tasters gave.",
        source=f"Cortez, Cerdeira, Almeida, Matos and Reis (2009); {_UCI}",
        license="CC BY 4.0",
    ),
    "yacht": _File(
        path="gp/yacht_hydrodynamics.data",
        delimiter=None,
        has_header=False,
        features=(
            "buoyancy",
            "prismatic",
            "length/displacement",
            "beam/draught",
            "length/beam",
            "Froude number",
        ),
        target="residuary resistance",
        description="308 towing-tank runs: the shape of a hull, its speed, and the resistance.",
        source=f"Gerritsma, Onnink and Versluis (1981); {_UCI}",
        license="CC BY 4.0",
    ),
    "airline": _File(
        path="gp/AirPassengers.csv",
        delimiter=",",
        has_header=True,
        features=("year",),
        target="airline passengers (thousands)",
        description="International airline passengers by month, 1949 to 1960.",
        source="Box and Jenkins (1976), series G",
        license="published with the book",
    ),
}


def measurement_names() -> tuple[str, ...]:
    """Return the names of the data sets."""
    return tuple(_FILES)


def measurement_path(relative: str) -> Path:
    """A file of the measurement data.

    Args:
        relative: its path inside the folder.

    Raises:
        FileNotFoundError: the environment variable is not set, its folder does not exist, or the file is not in it.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise FileNotFoundError(
            f"the measurement data are not part of probinfer: set the environment variable {VARIABLE} to the folder "
            f"that holds {relative}, for example: export {VARIABLE}=/data/probinfer"
        )
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{VARIABLE} is set to {folder}, which is not a folder")
    path = Path(folder) / relative
    if not path.is_file():
        raise FileNotFoundError(f"{VARIABLE} is set to {folder}, which has no file {relative}; put it there")
    return path


def measurement(name: str) -> Dataset:
    """A data set of the benchmarks: ``concrete``, ``winequality_red``, ``yacht`` or ``airline``.

    Args:
        name: which.

    Returns:
        The data set, all rows in the order of the file.

    Raises:
        ValueError: the name is not known, or the file has not the columns that it should have.
        FileNotFoundError: see ``measurement_path``.
    """
    if name not in _FILES:
        raise ValueError(f"no measurement data are called {name!r}; there is {', '.join(_FILES)}")
    file = _FILES[name]
    path = measurement_path(file.path)
    table = _read(path, file)
    if table.shape[1] != len(file.features) + 1 or not np.isfinite(table).all():
        raise ValueError(
            f"{path} should have {len(file.features) + 1} numeric columns and no gaps; it has {table.shape[1]} columns "
            f"and {int((~np.isfinite(table)).sum())} cells that are not numbers"
        )
    return Dataset(
        name=name,
        X=table[:, :-1],
        y=table[:, -1],
        feature_names=file.features,
        target_name=file.target,
        description=file.description,
        source=file.source,
        license=file.license,
    )


def _read(path, file):
    converters: Any = {0: _year} if file.features == ("year",) else None
    return np.genfromtxt(
        path,
        delimiter=file.delimiter,
        skip_header=int(file.has_header),
        ndmin=2,
        converters=converters,
        encoding="utf-8",
    )


def _year(text):
    """Return the middle of the month of a date such as 1949-01-01, in years."""
    year, month, *_ = text.split("-")
    return float(year) + (float(month) - 0.5) / 12
