"""Arrays of a host callback under ``vmap``: any number of leading axes, made one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["flat"]


def flat(asked: Sequence[Any], ranks: Sequence[int]) -> tuple[tuple[int, ...], list[np.ndarray]]:
    """The common leading axes of arrays, and the arrays with these made one.

    Args:
        asked: arrays with leading axes that broadcast, as ``vmap_method="expand_dims"`` makes them.
        ranks: how many trailing axes each array has of its own; there may be more of them than arrays.

    Returns:
        The shape of the leading axes, and arrays with one axis in their place, of the product of their sizes.
    """
    arrays = [np.asarray(array) for array in asked]
    tails = [array.shape[array.ndim - rank :] for array, rank in zip(arrays, ranks, strict=False)]
    leads = [array.shape[: array.ndim - len(tail)] for array, tail in zip(arrays, tails, strict=True)]
    lead = np.broadcast_shapes(*leads)
    wide = [np.broadcast_to(array, lead + tail) for array, tail in zip(arrays, tails, strict=True)]
    return lead, [array.reshape(math.prod(lead), *tail) for array, tail in zip(wide, tails, strict=True)]
