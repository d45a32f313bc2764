"""Small real data sets that are distributed with scikit-learn and statsmodels: nothing is downloaded."""

from __future__ import annotations

import numpy as np

from probinfer.core.errors import import_extra
from probinfer.data.dataset import Dataset

__all__ = ["breast_cancer", "co2", "diabetes", "nile", "sunspots"]

_DIABETES_NAMES = (
    "age",
    "sex",
    "body mass index",
    "blood pressure",
    "total cholesterol",
    "LDL",
    "HDL",
    "cholesterol/HDL",
    "log triglycerides",
    "glucose",
)


def diabetes() -> Dataset:
    """Return the disease progression of 442 diabetes patients and ten baseline measurements, in raw units.

    Returns:
        ``X (442, 10)`` and ``y (442,)``.

    Raises:
        MissingExtraError: scikit-learn is not installed.

    References:
        Efron, Hastie, Johnstone and Tibshirani (2004), "Least angle regression", table 1.
    """
    raw = import_extra("sklearn.datasets", "data").load_diabetes(scaled=False)
    return Dataset(
        name="diabetes",
        X=np.asarray(raw.data, np.float64),
        y=np.asarray(raw.target, np.float64),
        feature_names=_DIABETES_NAMES,
        target_name="disease progression after one year",
        description="442 patients: ten baseline measurements, and the progression of the disease one year later.",
        source="Efron, Hastie, Johnstone and Tibshirani (2004), Least angle regression; bundled with scikit-learn",
        license="published with the article, distributed with scikit-learn (BSD-3-Clause)",
    )


def breast_cancer() -> Dataset:
    """Return the diagnosis of 569 tumors (1 benign, 0 malignant) and thirty measurements of their cell nuclei.

    Returns:
        ``X (569, 30)`` and ``y (569,)``.

    Raises:
        MissingExtraError: scikit-learn is not installed.

    References:
        Street, Wolberg and Mangasarian (1993), "Nuclear feature extraction for breast tumor diagnosis".
    """
    raw = import_extra("sklearn.datasets", "data").load_breast_cancer()
    return Dataset(
        name="breast cancer",
        X=np.asarray(raw.data, np.float64),
        y=np.asarray(raw.target, np.float64),
        feature_names=tuple(str(name) for name in raw.feature_names),
        target_name="benign",
        description="569 breast tumors: thirty measurements of cell nuclei under the microscope, and the diagnosis.",
        source="Street, Wolberg and Mangasarian (1993), Wisconsin diagnostic data; bundled with scikit-learn",
        license="CC BY 4.0 (UCI Machine Learning Repository), distributed with scikit-learn",
    )


def co2() -> Dataset:
    """Return monthly means of atmospheric CO2 at Mauna Loa, March 1958 to December 2001, without missing months.

    Returns:
        ``X (521, 1)``, the middle of each month as a year (1958.21 is mid-March), and ``y (521,)`` in parts per
        million.

    Raises:
        MissingExtraError: statsmodels (or pandas, which it reads with) is not installed.

    References:
        Keeling and Whorf (2004), "Atmospheric CO2 concentrations derived from flask air samples".
    """
    import_extra("pandas", "data")
    weekly = import_extra("statsmodels.api", "data").datasets.co2.load_pandas().data["co2"].dropna()
    month = 12 * weekly.index.year.to_numpy() + weekly.index.month.to_numpy() - 1
    months, month_index = np.unique(month, return_inverse=True)
    values = weekly.to_numpy(np.float64)
    return Dataset(
        name="co2",
        X=((months + 0.5) / 12)[:, None],
        y=np.bincount(month_index, values) / np.bincount(month_index),
        feature_names=("year",),
        target_name="CO2 at Mauna Loa (ppm)",
        description="Monthly means of the carbon dioxide in the air at Mauna Loa, Hawaii, 1958 to 2001.",
        source="Keeling and Whorf (2004), Scripps and CDIAC; weekly values bundled with statsmodels",
        license="public domain",
    )


def sunspots() -> Dataset:
    """Return the yearly mean sunspot numbers, 1700 to 2008.

    Returns:
        ``X (309, 1)``, the year, and ``y (309,)``.

    Raises:
        MissingExtraError: statsmodels (or pandas, which it reads with) is not installed.
    """
    years, values = _series("sunspots", "SUNACTIVITY")
    return Dataset(
        name="sunspots",
        X=years[:, None],
        y=values,
        feature_names=("year",),
        target_name="mean sunspot number",
        description="Yearly mean number of sunspots, 1700 to 2008: a cycle of about eleven years.",
        source="National Geophysical Data Center; bundled with statsmodels",
        license="public domain",
    )


def nile() -> Dataset:
    """Return the yearly flow of the Nile at Aswan, 1871 to 1970.

    Returns:
        ``X (100, 1)``, the year, and ``y (100,)`` in 10^8 cubic metres.

    Raises:
        MissingExtraError: statsmodels (or pandas, which it reads with) is not installed.

    References:
        Cobb (1978), "The problem of the Nile: conditional solution to a changepoint problem".
    """
    years, values = _series("nile", "volume")
    return Dataset(
        name="nile",
        X=years[:, None],
        y=values,
        feature_names=("year",),
        target_name="flow of the Nile (10^8 m^3)",
        description="Yearly flow of the Nile at Aswan in a hundred years.",
        source="Cobb (1978), The problem of the Nile; bundled with statsmodels",
        license="public domain",
    )


def _series(name, column):
    """Return years and values of a yearly series of statsmodels."""
    import_extra("pandas", "data")
    import_extra("statsmodels.api", "data")
    table = import_extra(f"statsmodels.datasets.{name}", "data").load_pandas().data
    lower = {str(header).lower(): header for header in table.columns}
    return table[lower["year"]].to_numpy(np.float64), table[lower[column.lower()]].to_numpy(np.float64)
