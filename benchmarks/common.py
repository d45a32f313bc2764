"""Shared code of the benchmark scripts: arguments, tables, results with versions, plots.

Set OPENBLAS_NUM_THREADS=1 before a script starts: with more threads OpenBLAS may stall for
seconds on a busy machine.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import probinfer

__all__ = ["environment", "figure", "parser", "print_table", "read_results", "save_figure", "write_results"]

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("probinfer", "jax", "jaxlib", "numpy", "scipy", "blackjax", "numpyro", "optax")


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser whose help is the docstring, with the option ``--small``."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument(
        "--small", action="store_true", help="a quick run, to see that it works; writes nothing"
    )
    return result


def environment(packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return versions, device, precision and threads, on which the measurements depend."""
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "x64": bool(jax.config.jax_enable_x64),
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS"),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS"),
        "load": os.getloadavg()[1] if hasattr(os, "getloadavg") else None,
        "commit": _commit(),
        "versions": {name: _version(name) for name in (*_PACKAGES, *packages)},
    }


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table at its full width."""
    table = Table(title=title)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    wide = Console(width=max(console.width, 200)) if not console.is_terminal else console
    wide.print(table)


def write_results(name: str, body: dict[str, Any], packages: tuple[str, ...] = ()) -> None:
    """Write ``results/NAME.json``: the body and the environment."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"environment": environment(packages), **body}, indent=1, default=_plain)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def read_results(name: str) -> dict[str, Any]:
    """Return what ``write_results`` wrote; an empty dictionary if there is no file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(rows, columns, figsize=(width, height))
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return fig, axes


def save_figure(fig: Any, name: str) -> None:
    """Write ``results/NAME.png``."""
    RESULTS.mkdir(exist_ok=True)
    fig.tight_layout()
    fig.savefig(RESULTS / f"{name}.png", dpi=130)


def _plain(value):
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return probinfer.__version__ if name == "probinfer" else None


def _commit():
    """Return the commit, with a plus if files have been changed; None outside a checkout."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if dirty.strip() else "")


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
