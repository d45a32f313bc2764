"""Status codes: what numerical work reports of itself."""

from __future__ import annotations

import enum
from typing import Any

import jax
import numpy as np

__all__ = ["Status", "with_named_status"]


class Status(enum.IntEnum):
    """What numerical work reports of itself, carried as an integer through jitted code, and shown by its name.

    Larger is worse, so the status of a whole is the maximum over its parts. ``INTERRUPTED`` stands above all that might
    have been otherwise at the end of the work, and below what leaves no draws to use.

    >>> print(Status.OK, [Status(4)], f"{Status.NON_FINITE}")
    OK [Status.CHAINS_DISAGREE] NON_FINITE
    """

    OK = 0
    MAX_ITERATIONS = 1
    LINE_SEARCH_STALLED = 2
    DIVERGENT_TRANSITIONS = 3
    CHAINS_DISAGREE = 4
    POOR_APPROXIMATION = 5
    PRECISION_LOST = 6
    AT_LIMIT = 7
    NOTHING_LEARNED = 8
    INTERRUPTED = 9
    DEGENERATE_WEIGHTS = 10
    NOT_POSITIVE_DEFINITE = 11
    NON_FINITE = 12
    IMPROPER_DENSITY = 13

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Status.{self.name}"

    def __format__(self, spec: str) -> str:
        return format(int(self), spec) if spec else self.name


def with_named_status(info: Any) -> Any:
    """Return a report whose ``status`` is a ``Status`` where it was one concrete number, anything else as it is.

    Args:
        info: a report of an engine, or None.
    """
    status: Any = getattr(info, "status", None)
    known = isinstance(status, (int, np.generic, np.ndarray, jax.Array)) and not isinstance(
        status, jax.core.Tracer
    )
    if not known or np.ndim(status) or not hasattr(info, "_replace"):
        return info
    return info._replace(status=Status(int(status)))
