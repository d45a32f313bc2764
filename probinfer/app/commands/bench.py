"""Benchmarks from the command line: list the scripts of a ``benchmarks/`` folder and run one of them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

__all__ = ["benchmark_folder", "benchmarks", "run_benchmark"]


def benchmark_folder() -> Path:
    """Return the folder ``benchmarks`` of the current directory, else of the checkout that contains this package.

    Raises:
        FileNotFoundError: neither exists.
    """
    for parent in (Path.cwd(), Path(__file__).parents[3]):
        if (parent / "benchmarks").is_dir():
            return parent / "benchmarks"
    raise FileNotFoundError(
        "there is no folder benchmarks/ here; the benchmarks are part of a checkout of the repository: run this "
        "command inside one"
    )


def benchmarks(folder: Path) -> dict[str, str]:
    """Return the names of the scripts, each with the question that its docstring asks first."""
    return {path.stem: _question(path) for path in sorted(folder.glob("*.py")) if _is_script(path)}


def run_benchmark(folder: Path, name: str, arguments: list[str]) -> int:
    """Run a script in a separate process, with one OpenBLAS thread.

    Args:
        folder: folder of the scripts.
        name: one of ``benchmarks(folder)``.
        arguments: command-line arguments of the script.

    Returns:
        The exit code.

    Raises:
        ValueError: no script has this name; the message lists the names.
    """
    names = benchmarks(folder)
    if name not in names:
        raise ValueError(
            f"no benchmark is called {name!r}; choose one of: {', '.join(names) or '(none exist)'}"
        )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(folder / f"{name}.py"), *arguments], env=environment
    ).returncode


def _is_script(path):
    """Whether a file is a script, not a module shared by scripts."""
    return "__main__" in path.read_text(encoding="utf-8")


def _question(path):
    try:
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except SyntaxError:
        return "(cannot be read)"
    return doc.splitlines()[0] if doc else ""
