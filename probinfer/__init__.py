"""Bayesian inference in JAX that tunes itself and checks itself."""

import importlib
from typing import Any

from probinfer import targets
from probinfer.core.algorithms import Algorithm
from probinfer.core.errors import ConvergenceWarning, MissingExtraError, NumericalError
from probinfer.core.status import Status
from probinfer.inference.facade import infer
from probinfer.inference.posterior import Posterior
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.driver import record_nothing, run, run_until
from probinfer.running.history import History
from probinfer.running.many.driver import ManyPosteriors, run_many

# Where packages and modules live that are imported when first used.
_LAZY = {
    "betting": "betting",
    "checks": "checks",
    "coin": "coin",
    "data": "data",
    "gp": "gp",
    "kernels": "kernels",
    "lm": "lm",
    "mcmc": "mcmc",
    "progress": "running.progress",
    "report": "report",
    "resampling": "resampling",
    "smc": "smc",
    "vi": "vi",
}

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
    "lm",
    "mcmc",
    "progress",
    "record_nothing",
    "report",
    "resampling",
    "run",
    "run_many",
    "run_until",
    "smc",
    "targets",
    "vi",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{_LAZY[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
