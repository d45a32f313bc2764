"""Benchmarks from the command line: list the scripts of a ``benchmarks/`` folder and run one of them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

__all__ = ["benchmark_folder", "benchmarks", "run_benchmark"]


def benchmark_folder() -> Path:
    """The folder ``benchmarks`` of the current directory, else of the checkout that this package stands in.

    Raises:
        FileNotFoundError: neither is there.
    """
    for parent in (Path.cwd(), Path(__file__).parents[3]):
        if (parent / "benchmarks").is_dir():
            return parent / "benchmarks"
    raise FileNotFoundError(
        "there is no folder benchmarks/ here; the benchmarks come with a checkout of the repository: run this "
        "inside one"
    )


def benchmarks(folder: Path) -> dict[str, str]:
    """Names of the scripts, and the question that the first line of each docstring asks."""
    return {path.stem: _question(path) for path in sorted(folder.glob("*.py")) if _runs(path)}


def run_benchmark(folder: Path, name: str, arguments: list[str]) -> int:
    """Run a script in a process of its own, with one thread in OpenBLAS.

    Args:
        folder: where the scripts are.
        name: which; must be one of ``benchmarks(folder)``.
        arguments: passed on.

    Returns:
        The exit code.

    Raises:
        ValueError: there is no such script; the message lists those that there are.
    """
    known = benchmarks(folder)
    if name not in known:
        raise ValueError(f"no benchmark is called {name!r}; there is {', '.join(known) or 'none yet'}")
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(folder / f"{name}.py"), *arguments], env=environment
    ).returncode


def _runs(path):
    """Whether a file is a script, not a module that scripts share."""
    return "__main__" in path.read_text(encoding="utf-8")


def _question(path):
    try:
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except SyntaxError:
        return "(cannot be read)"
    return doc.splitlines()[0] if doc else ""
