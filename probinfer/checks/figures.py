"""Axes for the pictures of reports; matplotlib is imported when the first picture is drawn."""

from __future__ import annotations

from typing import Any

from probinfer.errors import import_extra

__all__ = ["axes_for"]


def axes_for(axes: Any) -> Any:
    """Return the given axes, or new ones.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return import_extra("matplotlib.pyplot", "plots").subplots()[1] if axes is None else axes
