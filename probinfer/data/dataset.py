"""A table with its story: numbers, names, where they come from and under which licence."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Dataset"]


class Dataset(NamedTuple):
    """Inputs and one output, with what a reader needs to know about them.

    Attributes:
        name: short name.
        X: inputs ``(N, D)``, float64, in the units of the source.
        y: outputs ``(N,)``, float64, in the units of the source.
        feature_names: one name a column of ``X``.
        target_name: what ``y`` is, with its unit where it has one.
        description: one or two sentences in plain words.
        source: where the data were published.
        licence: under which terms.
    """

    name: str
    X: np.ndarray
    y: np.ndarray
    feature_names: tuple[str, ...]
    target_name: str
    description: str
    source: str
    licence: str

    def take(self, rows: np.ndarray) -> Dataset:
        """The same data set with some of the rows, in the order given."""
        return self._replace(X=self.X[rows], y=self.y[rows])
