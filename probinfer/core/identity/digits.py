"""Whether NumPy values survive the narrower dtype that JAX gives them while 64-bit numbers are off."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

__all__ = ["keeps_its_digits"]

_SPREAD = 1e3  # largest size of the values in units of their spread: differences keep four digits of seven
_INTEGER = 2.0**31


def keeps_its_digits(value: Any) -> bool:
    """Say whether a function may be given the values in the dtype of JAX, where Python would have had 64 bits.

    A function may compute with captured NumPy values in Python, ``(t - t.mean()) / t.std()``: years to the hour or
    identifiers of users would lose there what they are about. True where the dtype stays, where every value does, and
    where only digits far below the spread of the values are lost; whole numbers must leave room for sums and squares.
    """
    narrow = jax.dtypes.canonicalize_dtype(value.dtype)
    if narrow == value.dtype:
        return True
    values = np.asarray(value)
    if values.dtype.kind in "iu":
        size = np.abs(values.astype(float))
        return float(np.sum(size)) < _INTEGER and float(np.max(size, initial=0.0)) ** 2 < _INTEGER
    with np.errstate(over="ignore", under="ignore"):
        narrowed = values.astype(narrow)
        if np.array_equal(narrowed, values, equal_nan=True):
            return True
        if values.dtype.kind != "f" or not np.all(np.isfinite(narrowed) == np.isfinite(values)):
            return False
        finite = values[np.isfinite(values)]
        size, spread = float(np.max(np.abs(finite))), float(np.std(finite))
    return bool(1e-30 < size <= _SPREAD * spread)
