"""Bayesian inference in JAX that tunes itself and checks itself."""

import importlib
from typing import Any

from probinfer import targets
from probinfer.checkpoint import Checkpoint
from probinfer.core.algorithm import Algorithm
from probinfer.core.errors import ConvergenceWarning, MissingExtraError, NumericalError
from probinfer.core.status import Status
from probinfer.history import History
from probinfer.infer import infer
from probinfer.posterior import Posterior
from probinfer.run import record_nothing, run, run_until
from probinfer.run_many import ManyPosteriors, run_many

_SUBMODULES = (
    "betting",
    "checks",
    "coin",
    "data",
    "gp",
    "kernels",
    "mcmc",
    "progress",
    "report",
    "smc",
    "vi",
)  # imported when first used

__all__ = [
    "Algorithm",
    "Checkpoint",
    "ConvergenceWarning",
    "History",
    "ManyPosteriors",
    "MissingExtraError",
    "NumericalError",
    "Posterior",
    "Status",
    "betting",
    "checks",
    "coin",
    "data",
    "gp",
    "infer",
    "kernels",
    "mcmc",
    "progress",
    "record_nothing",
    "report",
    "run",
    "run_many",
    "run_until",
    "smc",
    "targets",
    "vi",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
