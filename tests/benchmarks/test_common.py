"""The shared code of the benchmark scripts."""

import importlib.util
from pathlib import Path

import probinfer

FILE = Path(__file__).parents[2] / "benchmarks" / "common.py"


def test_results_say_which_version_was_measured(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmarks_common", FILE)
    common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)

    def missing(name):
        raise common.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(common.importlib.metadata, "version", missing)
    facts = common.environment()
    assert facts["versions"]["probinfer"] == probinfer.__version__
    assert facts["versions"]["scipy"] is None
    assert "commit" in facts
