"""Plant one fault at a time, run the nearest tests, and report which faults they let through.

    python -m tests.mutations                      all mutants that the report does not know yet
    python -m tests.mutations --only smc/forward   those whose file or text contains this
    python -m tests.mutations --list               without running anything

It works in a copy of the repository, so other work goes on beside it, and it resumes: a mutant is run again only when
its file or its tests have changed since. Tests whose name ends with ``[f32]`` run without 64-bit mode.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.mutations.table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "tests" / "mutations" / "report.json"
COPIED = ("probinfer", "tests", "benchmarks", "pyproject.toml", "Makefile", "README.md", "docs", "notebooks")
TIMEOUT = 1200


def main() -> int:
    """Run what is asked for; the exit code is the number of survivors, at most 1."""
    options = _options()
    chosen = [m for m in MUTANTS if options.only in f"{m.file} {m.old}"]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.file}: {mutant.old!r} -> {mutant.new!r}  [{' '.join(mutant.tests)}]")
        return 0
    report = json.loads(options.report.read_text()) if options.report.is_file() else {}
    todo = [m for m in chosen if not _is_known(m, report)]
    print(f"{len(chosen)} mutants, {len(chosen) - len(todo)} known already", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        _copy(copy)
        for number, mutant in enumerate(todo, 1):
            found = _run(mutant, copy)
            report[_name(mutant)] = {"digest": _digest(mutant), **found}
            options.report.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
            print(
                f"{number}/{len(todo)} {found['outcome']:9} {found['seconds']:6.0f} s  {_name(mutant)}",
                flush=True,
            )
    return _conclude(chosen, report)


def _is_known(mutant: Mutant, report: dict) -> bool:
    found = report.get(_name(mutant), {})
    return found.get("digest") == _digest(mutant) and found["outcome"] in ("killed", "survived")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="a piece of the file name or of the text")
    parser.add_argument("--list", action="store_true", help="say what would be planted")
    parser.add_argument("--report", type=Path, default=REPORT, help="where results are kept (JSON)")
    return parser.parse_args()


def _name(mutant: Mutant) -> str:
    return f"{mutant.file}: {mutant.old.strip()} -> {mutant.new.strip()}"


def _digest(mutant: Mutant) -> str:
    """Of the mutant, its file and its tests: what a result depends on most."""
    state = hashlib.sha256(repr(mutant).encode())
    for file in (ROOT / "probinfer" / mutant.file, *(_file_of(test, ROOT) for test in mutant.tests)):
        state.update(file.read_bytes())
    return state.hexdigest()[:16]


def _file_of(test: str, root: Path) -> Path:
    return root / "tests" / test.removesuffix("[f32]").partition("::")[0]


def _copy(folder: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        elif source.is_file():
            shutil.copy(source, folder / name)


def _run(mutant: Mutant, copy: Path) -> dict:
    """Plant, test, restore."""
    file = copy / "probinfer" / mutant.file
    sound = file.read_text(encoding="utf-8")
    if sound.count(mutant.old) != 1:
        return {"outcome": "no anchor", "seconds": 0.0, "by": ""}
    started = time.perf_counter()
    try:
        file.write_text(sound.replace(mutant.old, mutant.new), encoding="utf-8")
        outcome, by = _tested(mutant, copy)
    finally:
        file.write_text(sound, encoding="utf-8")
    return {"outcome": outcome, "seconds": round(time.perf_counter() - started, 1), "by": by}


def _tested(mutant: Mutant, copy: Path) -> tuple[str, str]:
    """``"killed"`` and by which test, or ``"survived"``."""
    for wide in (True, False):
        tests = [test.removesuffix("[f32]") for test in mutant.tests if test.endswith("[f32]") != wide]
        if not tests:
            continue
        marks = "not slow" if wide else "f32 and not slow"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "-m",
            marks,
        ]
        settings = {
            "JAX_ENABLE_X64": "1" if wide else "0",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": str(copy),
            "JAX_COMPILATION_CACHE_DIR": str(copy / "programs"),  # most are those of the mutant before
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        try:
            done = subprocess.run(
                command + [f"tests/{test}" for test in tests],
                cwd=copy,
                env=os.environ | settings,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return "killed", "time-out"
        if done.returncode == 1:
            failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            return "killed", failed[0].split(" - ")[0] if failed else "a failure"
        last = done.stdout.strip().splitlines()[-1:] or ["nothing was printed"]
        if done.returncode in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
            return "no test", last[0]
        if done.returncode:  # it could not even be imported
            return "killed", last[0]
    return "survived", ""


def _conclude(chosen: list[Mutant], report: dict) -> int:
    outcomes = [report.get(_name(mutant), {}).get("outcome", "not run") for mutant in chosen]
    print(", ".join(f"{outcomes.count(kind)} {kind}" for kind in sorted(set(outcomes))))
    for mutant, outcome in zip(chosen, outcomes, strict=True):
        if outcome != "killed":
            print(f"  {outcome}: {_name(mutant)}")
    return int(any(outcome != "killed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
