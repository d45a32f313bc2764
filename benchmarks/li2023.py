"""The classification protocol of Li, John and Solin (2023): data, folds, model, published scores.

Isotropic Matern-5/2 kernel from variance = lengthscale = 1, probit, five folds, inputs standardized on the training
part. The published data sets carry the row number as their first column, an artifact of how the files are read.
Fold membership is not that of the paper: compare means.

References:
    Li, John and Solin (2023), Improving Hyperparameter Learning under Approximate Inference in Gaussian Process Models,
    table 1, from the repository's result file: means over 50 folds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from measurements import measurement_path

from probinfer import gp

__all__ = ["DATA", "PUBLISHED", "Fold", "folds", "start_model"]

# Test NLPD and accuracy; NUTS here stands beside their Markov chain Monte Carlo on latent values and hyperparameters.
PUBLISHED = {
    "ionosphere": {
        "Laplace": (0.224, 0.927),
        "EP": (0.230, 0.930),
        "VI": (0.170, 0.942),
        "Hybrid": (0.170, 0.945),
        "MCMC": (0.179, 0.943),
    },
    "breast cancer": {
        "Laplace": (0.085, 0.969),
        "EP": (0.140, 0.974),
        "VI": (0.077, 0.970),
        "Hybrid": (0.075, 0.972),
        "MCMC": (0.076, 0.973),
    },
}


class Fold(NamedTuple):
    """Standardized inputs, and labels 0 and 1."""

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray


def ionosphere(index: bool) -> tuple[np.ndarray, np.ndarray]:
    """351 radar returns, 33 columns, and the row number in front of them, as published, or zeros.

    To an isotropic kernel zeros are no column; the default prior counts them, which moves log lengthscale by 0.015.
    """
    with np.load(measurement_path("gp/li2023_ionosphere_original_order.npz")) as data:
        X, y = data["X"], (data["Y"][:, 0] + 1) / 2
    return np.concatenate([X[:, :1] if index else np.zeros_like(X[:, :1]), X[:, 1:]], 1), y


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    """569 tumors, 30 columns; without the row number of the published set."""
    from sklearn.datasets import load_breast_cancer

    X, y = load_breast_cancer(return_X_y=True)
    return X, y.astype(float)


def banana() -> tuple[np.ndarray, np.ndarray]:
    """400 points in the plane."""
    X = np.loadtxt(measurement_path("gp/banana_X.csv"), delimiter=",")
    return X, np.loadtxt(measurement_path("gp/banana_Y.csv")).reshape(-1)


DATA: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "ionosphere": lambda: ionosphere(True),
    "ionosphere without index": lambda: ionosphere(False),
    "breast cancer": breast_cancer,
    "banana": banana,
}


def folds(name: str, num: int = 5, seed: int = 42) -> list[Fold]:
    """Shuffled folds, each standardized on its training part.

    Training parts are cut to one size, the smallest (a row less in some folds): one shape to compile.
    """
    X, y = DATA[name]()
    order = np.random.default_rng(seed).permutation(len(y))
    parts = np.array_split(order, num)
    result = []
    for part in parts:
        train = np.setdiff1d(order, part)[: len(y) - len(parts[0])]
        mean, scale = X[train].mean(0), X[train].std(0)
        scaled = (X - mean) / np.where(scale > 0, scale, 1.0)
        result.append(Fold(scaled[train], y[train], scaled[part], y[part]))
    return result


def start_model() -> gp.Model:
    """Return the initial model of all methods."""
    return gp.Model(gp.kernels.Matern52(1.0, 1.0), gp.likelihoods.Bernoulli("probit"))
