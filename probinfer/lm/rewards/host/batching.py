"""Arrays of a host callback under ``vmap``: any number of leading axes, flattened to one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["flatten_leading_axes"]


def flatten_leading_axes(
    arrays: Sequence[Any], ranks: Sequence[int]
) -> tuple[tuple[int, ...], list[np.ndarray]]:
    """Broadcast the leading axes of arrays, and flatten them to one.

    Args:
        arrays: arrays with leading axes that broadcast, as ``vmap_method="expand_dims"`` makes them.
        ranks: number of trailing axes of each array, which are not flattened; may be longer than ``arrays``.

    Returns:
        The shape of the leading axes, and arrays with one axis of the same size in their place.
    """
    arrays = [np.asarray(array) for array in arrays]
    tails = [array.shape[array.ndim - rank :] for array, rank in zip(arrays, ranks, strict=False)]
    leads = [array.shape[: array.ndim - len(tail)] for array, tail in zip(arrays, tails, strict=True)]
    lead = np.broadcast_shapes(*leads)
    full = [np.broadcast_to(array, lead + tail) for array, tail in zip(arrays, tails, strict=True)]
    return lead, [array.reshape(math.prod(lead), *tail) for array, tail in zip(full, tails, strict=True)]
