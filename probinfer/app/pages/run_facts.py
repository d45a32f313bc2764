"""The facts of a run: command, seed, versions and machine, which make it reproducible, and its warnings."""

from __future__ import annotations

import importlib.metadata
import platform
import time
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp

__all__ = ["provenance", "user_warnings"]

_PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "numpyro", "blackjax", "optax")


def provenance(
    command: str, *, seed: int, seconds: float, extra: dict[str, str] | None = None
) -> list[tuple[str, str]]:
    """Return the facts for the last section of a report, as pairs of name and value.

    Args:
        command: the command line that reproduces the report.
        seed: the seed.
        seconds: wall time of the run.
        extra: further facts, such as data sources.
    """
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    precision = f"{jnp.finfo(jnp.result_type(float)).bits}-bit floats"
    return [
        ("command", command),
        ("seed", str(seed)),
        ("date", time.strftime("%Y-%m-%d %H:%M")),
        ("wall time", f"{seconds:.0f} s"),
        ("probinfer", importlib.metadata.version("probinfer")),
        ("versions", f"Python {platform.python_version()}, {versions}"),
        ("computed on", f"{jax.default_backend()} ({platform.machine()}), {precision}"),
        *(extra or {}).items(),
    ]


def user_warnings(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """Return the distinct messages of the user warnings in a record of ``warnings.catch_warnings``."""
    return list(dict.fromkeys(str(item.message) for item in caught if issubclass(item.category, UserWarning)))
