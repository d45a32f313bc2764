"""Errors that say what was expected, what came and what to do.

Three kinds: static facts are ``ValueError`` or ``TypeError`` at the boundary; value failures inside jitted code travel
as a ``Status``; facades, which run outside jit, raise ``NumericalError`` on a bad status.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.base import Status

__all__ = [
    "ConvergenceWarning",
    "MissingExtraError",
    "NumericalError",
    "advice",
    "check_finite",
    "check_floating",
    "import_extra",
]

_ADVICE = {
    Status.OK: "nothing went wrong",
    Status.MAX_ITERATIONS: "the iteration limit was reached before the stopping rule was met; raise the limit",
    Status.LINE_SEARCH_STALLED: "no step along the search direction improved the objective: it is at its rounding "
    "level (use float64) or its gradient is wrong",
    Status.CHAINS_DISAGREE: "the chains have not mixed (R-hat above 1.01 or too few effective draws): run more draws, "
    "reparametrise, or look for several modes",
    Status.DEGENERATE_WEIGHTS: "every weight is zero: the target gives no mass to any particle; check the model on "
    "one draw, or use more particles",
    Status.NOT_POSITIVE_DEFINITE: "a covariance matrix stayed indefinite after the largest jitter: remove duplicate "
    "rows, add noise, bound the lengthscale, or use float64",
    Status.NON_FINITE: "a value became NaN or infinite: check the data and the scale of the parameters; float64 "
    "helps where the numbers are large",
}


class NumericalError(ArithmeticError):
    """A computation finished with a bad status; the message says what happened and what to do."""

    def __init__(self, message: str, status: Status | int | None = None):
        super().__init__(message)
        self.status = None if status is None else Status(int(status))


class ConvergenceWarning(UserWarning):
    """An engine finished, but its result is not to be trusted yet; the message says why and what to do."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def advice(status: Status | int) -> str:
    """Say in one sentence what a status means and what to do about it."""
    return _ADVICE[Status(int(status))]


def import_extra(package: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"this needs the package '{package}', which is not installed; run: pip install 'probinfer[{extra}]'"
        ) from error


def check_floating(name: str, value: Any) -> None:
    """Refuse arrays that are not floating point.

    Raises:
        TypeError: the dtype is integer, boolean, complex or not numeric.
    """
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating point, got dtype {dtype}; convert it, for example {name}.astype(float)"
        )


def check_finite(name: str, value: Any) -> None:
    """Refuse concrete arrays with NaN or infinite entries, saying where; traced arrays pass.

    Raises:
        ValueError: an entry is NaN or infinite.
    """
    if isinstance(value, jax.core.Tracer):
        return
    bad = np.argwhere(~np.isfinite(np.asarray(value)))
    if len(bad):
        where = ", ".join(str(tuple(int(i) for i in row)) for row in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"{name} has {len(bad)} entries that are NaN or infinite, at {where}{more}; drop or impute those rows"
        )
