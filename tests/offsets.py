"""Do the stochastic tests hold over keys? Each at other key offsets, the compiled programs shared between them.

    python -m tests.offsets                                  ten offsets, all files, both precisions
    python -m tests.offsets --files tests/smc --offsets 7    some of them
    python -m tests.offsets --list                           what failed so far

One process takes one file through all offsets: only data change, so a further offset costs a fraction of the first.
Compiled programs are kept on disk meanwhile, because a test that is imported again makes functions of its own.

It resumes: a file is run again at the offsets that are not in the report, and at all of them when it has changed. It is
no change that a test became slow, but it is one that a test is no longer slow.
"""

import argparse
import ast
import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tests import keys

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "tests" / "offsets.json"
OFFSETS = tuple(range(1000, 11000, 1000))
STAYS = {"tests", "tests.conftest", "tests.keys"}  # modules that all offsets share
_TURN = threading.Lock()


def main() -> int:
    """Run what is missing and say what failed; the exit code is 1 if anything did."""
    options = _options()
    if options.one:
        print(json.dumps([_at_offset(options.one, offset) for offset in options.offsets]))
        return 0
    report = json.loads(options.report.read_text()) if options.report.is_file() else {}
    files = [file for file in _files(options.files) if _is_stochastic(file)]
    tasks = [(file, wide) for wide in (True, False) for file in files]
    if not options.list:
        with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(lambda task: _run(*task, options, report), tasks))
    return _conclude([_name(*task) for task in tasks], report)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.offsets", description=__doc__.partition("\n")[0])
    parser.add_argument("--offsets", type=int, nargs="+", default=OFFSETS, metavar="N")
    parser.add_argument("--files", type=Path, nargs="+", default=[ROOT / "tests"], help="files or folders")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--report", type=Path, default=REPORT, help="where results are kept (JSON)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def _files(paths: list[Path]) -> list[str]:
    found = [file for path in paths for file in ([path] if path.is_file() else path.rglob("test_*.py"))]
    return sorted(str(file.resolve().relative_to(ROOT)) for file in found if file.stem != "test_notebooks")


def _is_stochastic(file: str) -> bool:
    return any(name.startswith("test") for name in keys.leading_to_keys(ROOT / file))


def _name(file: str, wide: bool) -> str:
    return f"{file} {'float64' if wide else 'float32'}"


def _run(file: str, wide: bool, options: argparse.Namespace, report: dict) -> None:
    """Take a file through the offsets that are missing, in a process of its own."""
    source = (ROOT / file).read_text()
    if not wide and "mark.f32" not in source:
        return
    name, (digest, slow) = _name(file, wide), _digest(source)
    known = report.get(name, {})
    if known.get("digest") != digest or not slow >= set(known["slow"]):
        known = {"digest": digest, "slow": sorted(slow), "offsets": {}}
    missing = [offset for offset in options.offsets if str(offset) not in known["offsets"]]
    if not missing:
        return
    settings = {"JAX_ENABLE_X64": str(int(wide)), "OPENBLAS_NUM_THREADS": "1"}
    settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    command = [sys.executable, "-m", "tests.offsets", "--one", file, "--offsets", *map(str, missing)]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as programs:
        settings["JAX_COMPILATION_CACHE_DIR"] = programs
        done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    try:
        results = json.loads(done.stdout.strip().splitlines()[-1])
    except (json.JSONDecodeError, IndexError):
        results = [
            {"passed": 0, "failed": [f"the process ended with {done.returncode}"], "seconds": 0.0}
        ] * len(missing)
    with _TURN:
        known["offsets"] |= dict(zip(map(str, missing), results, strict=True))
        report[name] = known
        options.report.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
        failed = sorted({test for result in results for test in result["failed"]})
        tests = max(result["passed"] + len(result["failed"]) for result in results)
        print(f"{time.perf_counter() - started:6.0f} s {tests:4} tests {name} {failed or ''}", flush=True)


def _digest(source: str) -> tuple[str, set[str]]:
    """A digest of the code without the marks of slow tests, and what they are on."""
    marks = _SlowMarks()
    code = ast.unparse(marks.visit(ast.parse(source)))
    return hashlib.sha256(code.encode()).hexdigest()[:16], marks.on


_SLOW = ("pytest.mark.slow", "pytest.mark.f32(slow=True)")


class _SlowMarks(ast.NodeTransformer):
    """Take the marks of functions and of single parameters away."""

    def __init__(self) -> None:
        self.on: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        marks = list(map(ast.unparse, node.decorator_list))
        self.on |= {f"{node.name} {mark}" for mark in marks if mark in _SLOW}
        narrow = ast.parse("pytest.mark.f32", mode="eval").body
        node.decorator_list = [
            narrow if mark == _SLOW[1] else decorator
            for mark, decorator in zip(marks, node.decorator_list, strict=True)
            if mark != _SLOW[0]
        ]
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if ast.unparse(node.func) != "pytest.param" or len(node.keywords) != 1:
            return node
        if ast.unparse(node.keywords[0]) != "marks=pytest.mark.slow":
            return node
        value = node.args[0] if len(node.args) == 1 else ast.Tuple(node.args, ast.Load())
        self.on.add(ast.unparse(value))
        return value


class _Outcomes:
    """A plugin of pytest that counts."""

    def __init__(self) -> None:
        self.passed, self.failed = 0, []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        if report.failed:
            self.failed.append(report.nodeid.partition("::")[2])


def _at_offset(file: str, offset: int) -> dict:
    for module in [name for name in sys.modules if name.startswith("tests.") and name not in STAYS]:
        source = getattr(sys.modules[module], "__file__", None)
        if source is None or not keys.makes_no_key(Path(source)):
            del sys.modules[module]  # what they keep of the offset before
    outcomes, started = _Outcomes(), time.perf_counter()
    marks = "not slow" if os.environ["JAX_ENABLE_X64"] == "1" else "f32 and not slow"
    chosen = ["-m", marks, "--only-stochastic", "--key-offset", str(offset), "--keep-programs"]
    out = os.dup(1)
    os.dup2(2, 1)  # the report goes elsewhere, the last line of the output is ours
    try:
        pytest.main([file, *chosen, "-q", "-n", "0", "-p", "no:cacheprovider"], plugins=[outcomes])
    finally:
        os.dup2(out, 1)
    seconds = round(time.perf_counter() - started, 1)
    return {"passed": outcomes.passed, "failed": outcomes.failed, "seconds": seconds}


def _conclude(names: list[str], report: dict) -> int:
    failed: dict[str, list[str]] = {}
    for name in names:
        for offset, result in report.get(name, {"offsets": {}})["offsets"].items():
            for test in result["failed"]:
                failed.setdefault(f"{name}::{test}", []).append(offset)
    for test, offsets in sorted(failed.items()):
        print(f"failed at {', '.join(sorted(offsets, key=int))}: {test}")
    known = [result for name in names for result in report.get(name, {"offsets": {}})["offsets"].values()]
    print(f"{sum(result['passed'] for result in known)} passed, {sum(map(len, failed.values()))} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
