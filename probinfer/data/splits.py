"""Training and test rows as index arrays: random with a seed, or in order for time series."""

from __future__ import annotations

import numpy as np

from probinfer.core.types import Int

__all__ = ["kfold", "ordered_split", "random_split"]

_Rows = tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]


def random_split(num: int, train: float, *, seed: int) -> _Rows:
    """Split the rows 0, ..., num - 1 at random; the same seed gives the same rows.

    Args:
        num: number of rows.
        train: fraction of training rows, between 0 and 1.
        seed: seed of NumPy's generator.

    Returns:
        Training and test rows, each in ascending order.

    Raises:
        ValueError: one part would be empty.
    """
    order = np.random.default_rng(seed).permutation(num)
    cut = _cut(num, train)
    return np.sort(order[:cut]), np.sort(order[cut:])


def ordered_split(num: int, train: float) -> _Rows:
    """Split the rows of a series: the first ones are for training, the others for testing.

    Args:
        num: number of rows.
        train: fraction of training rows, between 0 and 1.

    Returns:
        Training and test rows.

    Raises:
        ValueError: one part would be empty.
    """
    cut = _cut(num, train)
    return np.arange(cut), np.arange(cut, num)


def kfold(num: int, folds: int, *, seed: int) -> list[_Rows]:
    """Split the rows into folds at random; each row is in exactly one test set.

    Args:
        num: number of rows.
        folds: number of folds, whose sizes differ by at most one.
        seed: seed of NumPy's generator.

    Returns:
        Training and test rows of each fold, in ascending order.

    Raises:
        ValueError: fewer than 2 folds, or more folds than rows.
    """
    if not 2 <= folds <= num:
        raise ValueError(f"the number of folds must be between 2 and the number of rows ({num}), got {folds}")
    order = np.random.default_rng(seed).permutation(num)
    tests = [np.sort(part) for part in np.array_split(order, folds)]
    return [(np.setdiff1d(np.arange(num), test), test) for test in tests]


def _cut(num, train):
    cut = round(num * train)
    if not 0 < cut < num:
        raise ValueError(
            f"a fraction of {train} of {num} rows leaves one part empty; use a fraction between 0 and 1, and at least "
            "2 rows"
        )
    return cut
