"""Errors that say what was expected, what came and what to do.

Three kinds: static facts are ``ValueError`` or ``TypeError`` at the boundary; value failures inside jitted code travel
as a ``Status``; facades, which run outside jit, raise ``NumericalError`` on a bad status.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import reprlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import jax.numpy as jnp

from probinfer.core.status import Status

__all__ = [
    "ConvergenceWarning",
    "DamagedFileError",
    "MissingExtraError",
    "NumericalError",
    "advice",
    "close_matches",
    "import_extra",
    "levels_to_caller",
    "reading",
    "shortened",
    "warn_interrupted",
]

_ADVICE = {
    Status.OK: "nothing went wrong",
    Status.MAX_ITERATIONS: "the iteration limit was reached before the stopping rule was met; raise the limit",
    Status.LINE_SEARCH_STALLED: "no step along the search direction improved the objective: it is at its rounding "
    "level, it has no optimum (an improper density, a parameter that runs to a limit), or its gradient is wrong",
    Status.DIVERGENT_TRANSITIONS: "some trajectories left the posterior by numerical error, so parts of it are visited "
    "too rarely: raise target_acceptance (0.95, 0.99), or reparametrize",
    Status.CHAINS_DISAGREE: "the chains have not mixed (R-hat above 1.01 or too few effective draws): run more draws "
    "(num_draws), reparametrize, or look for several modes",
    Status.POOR_APPROXIMATION: "the approximation misses too much of the posterior for its draws to be trusted or "
    "mended by importance weights: use mcmc.NUTS(), or a richer approximation (vi.FullRank() after vi.MeanField())",
    Status.PRECISION_LOST: "some results are smaller than the rounding of the numbers that they are differences of: "
    "only their order of magnitude is known. Bound the hyperparameters by a prior (gp.MAP()), or give the noise a "
    "known floor",
    Status.AT_LIMIT: "a hyperparameter ran to the end of its range, where nothing in the data holds it: give it a "
    "prior (gp.MAP(), mcmc.NUTS()) or fix it",
    Status.NOTHING_LEARNED: "the data are explained as well without the inputs: check that X belongs to y, start "
    "elsewhere (more restarts), scale the inputs or drop those that carry nothing",
    Status.INTERRUPTED: "Ctrl-C ended the work early and what was finished is returned: for the rest make the same "
    "call again, which continues where a checkpoint or path was given",
    Status.DEGENERATE_WEIGHTS: "every weight is zero: the target gives no mass to any particle; check the model on "
    "one draw, or use more particles",
    Status.NOT_POSITIVE_DEFINITE: "a covariance matrix stayed indefinite after the largest jitter: remove duplicate "
    "rows, add noise, or bound the lengthscale",
    Status.NON_FINITE: "a value became NaN or infinite: check the data, the scale of the parameters, and that the "
    "density is proper (falls off in every direction, so that its integral is finite)",
    Status.IMPROPER_DENSITY: "the density has no finite integral, so there is no posterior to draw from: give every "
    "parameter a proper prior, or data that determine it",
}
_IN_FLOAT32 = {
    Status.LINE_SEARCH_STALLED: "; float64 lowers the rounding level",
    Status.PRECISION_LOST: "; or use float64",
    Status.NOT_POSITIVE_DEFINITE: "; or use float64",
    Status.NON_FINITE: "; float64 helps where the numbers are large",
}
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


class NumericalError(ArithmeticError):
    """A computation finished with a bad status; the message says what happened and what to do."""

    def __init__(self, message: str, status: Status | int | None = None):
        super().__init__(message)
        self.status = None if status is None else Status(int(status))


class ConvergenceWarning(UserWarning):
    """An engine finished, but its result is not to be trusted yet; the message says why and what to do."""


class DamagedFileError(ValueError):
    """A file is not what was written; the message names the file and says what to do."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def advice(status: Status | int) -> str:
    """Say in one sentence what a status means and what to do about it."""
    status = Status(int(status))
    narrow = jnp.result_type(float) == jnp.float32
    return _ADVICE[status] + (_IN_FLOAT32.get(status, "") if narrow else "")


@contextlib.contextmanager
def reading(path: Any, advice: str) -> Iterator[None]:
    """Turn whatever goes wrong with the content of a file into one error that names it and says what to do.

    Args:
        path: the file.
        advice: what to do, a clause.

    Raises:
        DamagedFileError: something went wrong that is not said already.
    """
    try:
        yield
    except (FileNotFoundError, MissingExtraError):
        raise
    except BaseException as error:  # libraries in Rust panic with an exception of their own kind
        foreign = not isinstance(error, Exception) and "Panic" not in type(error).__name__
        if foreign or (isinstance(error, (ValueError, MemoryError)) and str(path) in str(error)):
            raise
        if type(error) is ValueError:
            raise DamagedFileError(f"{path}: {error}; {advice}") from error
        said = f"{type(error).__name__}: {shortened(str(error))}"
        raise DamagedFileError(f"{path} is damaged, or not what it should be ({said}); {advice}") from error


def warn_interrupted(details: str) -> None:
    """Warn that Ctrl-C ended the work early.

    Args:
        details: what was finished, a clause.
    """
    warnings.warn(
        f"{details}; {advice(Status.INTERRUPTED)}", ConvergenceWarning, stacklevel=levels_to_caller()
    )


def levels_to_caller() -> int:
    """How many frames of this library stand above the line of the user that called it, for a ``warn`` of the caller."""
    frame, level = sys._getframe(1), 1
    while (
        frame.f_back is not None
        and frame.f_globals.get("__name__", "").split(".")[0] == __name__.split(".")[0]
    ):
        frame, level = frame.f_back, level + 1
    return level


def shortened(value: Any) -> str:
    """A value in an error message: its representation on one line of at most 80 characters."""
    return " ".join(_REPR.repr(value).split())


def close_matches(name: str, known: Iterable[str]) -> str:
    """What a misspelt name may have meant: ``"; did you mean 'mu'?"``, or what there is."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; there is {', '.join(names[:20])}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")


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
