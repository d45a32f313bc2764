"""A data set: numbers, names, source and license."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from probinfer.core.types import Float

__all__ = ["Dataset"]


class Dataset(NamedTuple):
    """Inputs and one output, with their description.

    Attributes:
        name: short name.
        X: inputs ``(N, D)``, float64, in the units of the source.
        y: outputs ``(N,)``, float64, in the units of the source.
        feature_names: names of the columns of ``X``.
        target_name: name of ``y``, with its unit if it has one.
        description: one or two sentences about the data.
        source: publication and distribution of the data.
        license: license of the data.
    """

    name: str
    X: Float[np.ndarray, "N D"]
    y: Float[np.ndarray, " N"]
    feature_names: tuple[str, ...]
    target_name: str
    description: str
    source: str
    license: str

    def take(self, rows: np.ndarray) -> Dataset:
        """Return the data set with the given rows, in the given order."""
        return self._replace(X=self.X[rows], y=self.y[rows])
