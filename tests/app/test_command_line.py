"""The command line: each user error is one clear line, each output exists and has the numbers of the library."""

import csv
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from probinfer import gp
from probinfer.app.command_line import app
from probinfer.app.commands import regression
from probinfer.app.commands.regression import choose_engine
from probinfer.app.demo import demo as demo_module
from probinfer.app.pages import engines
from probinfer.lm.reasoner import load as reasoner_load
from probinfer.report.html import Section
from probinfer.report.tables import TextTable
from tests.lm import folders
from tests.quick_engine import Cloud, CloudInfo

runner = CliRunner()
TABLE = TextTable("left out", ("name", "value"), ())


def run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


def write_table(path, rows=24, columns=("time", "idle", "height")):
    rng = np.random.default_rng(0)
    X = rng.uniform(0, 10, (rows, 2))
    y = 20 + 5 * np.sin(X[:, 0]) + 0.3 * rng.normal(size=rows)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(np.column_stack([X, y]).tolist())
    return path


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One complete run: a table, new rows of which one lies outside, a folder of results."""
    folder = tmp_path_factory.mktemp("gp")
    table = write_table(folder / "table.csv")
    (folder / "new.csv").write_text("idle,comment,time\n5,a,5\n5,b,500\n")
    options = (
        "--engine",
        "map",
        "--folds",
        3,
        "--predict",
        folder / "new.csv",
        "--out",
        folder / "out",
        "--seed",
        3,
    )
    return run("gp", table, "--target", "height", *options), folder


def test_gp_writes_everything(finished):
    result, folder = finished
    assert result.exit_code == 0, result.output
    assert "24 rows, 2 inputs; MAP" in result.output
    assert "1 of 2 rows to predict lie outside the range of the data in time" in " ".join(
        result.output.split()
    )
    assert "report: " in result.output
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {"index.html", "fit.npz", "cross-validation.csv", "predictions.csv"}


def test_gp_predictions_are_those_of_the_saved_fit(finished):
    _, folder = finished
    fit = gp.load(folder / "out/fit.npz")
    rows = read(folder / "out/predictions.csv")
    assert list(rows[0]) == ["time", "idle", "mean", "sd", "q05", "q50", "q95"]
    assert [float(row["time"]) for row in rows] == [5.0, 500.0]
    predictive = fit.predict_y(np.array([[5.0, 5.0], [500.0, 5.0]]))
    np.testing.assert_allclose([float(row["mean"]) for row in rows], predictive.mean, rtol=1e-6)
    np.testing.assert_allclose([float(row["q95"]) for row in rows], predictive.quantile(0.95), rtol=1e-6)


def test_gp_score_is_that_of_the_folds(finished):
    result, folder = finished
    rows = read(folder / "out/cross-validation.csv")
    assert [int(row["row"]) for row in rows] == list(range(1, 25))
    observed = [float(row["height"]) for row in read(folder / "table.csv")]
    np.testing.assert_allclose([float(row["observed"]) for row in rows], observed, rtol=1e-9)
    log_densities = np.array([float(row["log_density"]) for row in rows])
    from probinfer.report.scoring import Estimate
    from probinfer.report.tables import with_error

    cell = with_error(Estimate(-log_densities.mean(), log_densities.std(ddof=1) / np.sqrt(24)))
    assert cell in result.output
    assert cell in (folder / "out/index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_gp_draws_a_posterior(tmp_path, monkeypatch):
    quick = engines.find_engine("nuts")._replace(make=lambda draws: Cloud())
    monkeypatch.setattr(regression, "find_engine", lambda name: quick)
    table = write_table(tmp_path / "t.csv", rows=12)
    result = run("gp", table, "--target", "height", "--folds", 0, "--drop", "idle", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "95 %" in result.output  # an interval for what was learned
    assert "these are prior draws" in result.output
    fit = gp.load(tmp_path / "out/fit.npz", classes=[CloudInfo])
    assert not fit.is_point
    assert fit.X.shape == (12, 1)


def fails(*arguments, match):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: "), result.output
    assert len(result.output.strip().splitlines()) == 1
    assert match in result.output


@pytest.mark.parametrize(
    ("text", "options", "match"),
    [
        ("a,y\n1,2\n", ("--target", "z"), "no column 'z'"),
        ("a,y\n1,2\n3,\n", ("--target", "y"), "missing values: y in line 3"),
        ("a,c,y\n1,red,2\n3,blue,4\n", ("--target", "y"), "--drop c"),
        ("y\n1\n2\n", ("--target", "y"), "only column"),
        ("a,y\n1,2\n2,3\n3,4\n", ("--target", "y"), "at least 5"),
        ("a,y\n1,2\n2,2\n3,2\n4,2\n5,2\n", ("--target", "y"), "the same in every row"),
        ("a,y\n1,2\n1,3\n1,4\n1,5\n1,6\n", ("--target", "y"), "every input column is constant"),
        ("a,y\n1,2\n2,3\n3,4\n4,5\n5,6\n", ("--target", "y", "--folds", "1"), "--folds must be"),
        ("a,y\n1,2\n2,3\n3,4\n4,5\n5,6\n", ("--target", "y", "--folds", "9"), "--folds must be"),
        ("a,y\n1,2\n2,3\n3,4\n4,5\n5,6\n", ("--target", "y", "--draws", "2"), "--draws must be"),
        (
            "a,y\n1,2\n2,3\n3,4\n4,5\n5,6\n",
            ("--target", "y", "--engine", "gibbs"),
            "no engine is called 'gibbs'",
        ),
        ("a,y\n1,2\n2,3\n3,4\n4,5\n5,6\n", ("--target", "y", "--kernel", "rbff"), "choose one of matern12"),
        (
            "a,y\n1,2\n2,3\n3,4\n4,5\n5,6\n",
            ("--target", "y", "--predict", "none.csv"),
            "there is no file none.csv",
        ),
    ],
)
def test_mistakes_in_one_line(tmp_path, text, options, match):
    path = tmp_path / "table.csv"
    path.write_text(text)
    fails("gp", path, "--out", tmp_path / "out", *options, match=match)
    assert not (tmp_path / "out").exists()


def test_errors_are_raised_before_the_fit(tmp_path, monkeypatch):
    table = write_table(tmp_path / "t.csv")
    (tmp_path / "file").write_text("")

    def never(*arguments):
        raise AssertionError("the fit was started")

    monkeypatch.setattr(regression, "_fit", never)
    monkeypatch.setattr(demo_module, "run_methods", never)
    for out in (tmp_path / "file", tmp_path / "file/below"):
        fails("gp", table, "--target", "height", "--out", out, match="is a file; pass a folder")
        fails("demo", "--small", "--out", out, match="is a file; pass a folder")
    fails("gp", table, "--target", "height", "--drop", "height", match="--drop height leaves out the column")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails("gp", table, "--target", "height", "--out", tmp_path / "out", match="probinfer[plots]")
    fails("demo", "--small", "--out", tmp_path / "out", match="probinfer[plots]")
    assert not (tmp_path / "out").exists()


def test_gains_in_the_means_alone_are_distinguished():
    """Good means with calibrated bands, with bands that are far too narrow, and bad means."""
    from probinfer.report.scoring import normal_baseline

    rng = np.random.default_rng(0)
    y = rng.normal(size=200)
    baseline = normal_baseline(y, y)

    def verdict(error, sd):
        mean = y + error * rng.normal(size=200)
        log_density = -0.5 * ((y - mean) / sd) ** 2 - np.log(sd * np.sqrt(2 * np.pi))
        quantiles = dict.fromkeys(baseline.quantiles, mean)
        predicted = baseline._replace(mean=mean, sd=sd + 0 * y, quantiles=quantiles, log_density=log_density)
        return regression._usefulness(predicted, baseline)

    assert verdict(0.3, 0.3).startswith("The inputs help")
    assert "RMSE 0." in verdict(0.3, 0.01)
    assert "do not rely on the bands" in verdict(0.3, 0.01)
    assert "worse than those without inputs" in verdict(3.0, 0.3)
    assert verdict(0.95, 0.95).startswith("No clear gain")


def test_more_mistakes(tmp_path):
    fails("gp", tmp_path / "none.csv", "--target", "y", match="there is no file")
    table = write_table(tmp_path / "t.csv")
    (tmp_path / "new.csv").write_text("time,other\n1,2\n")
    fails("gp", table, "--target", "height", "--predict", tmp_path / "new.csv", match="no column 'idle'")
    assert run("gp", table).exit_code == 2  # no target: typer's own message
    assert run("nonsense").exit_code == 2


def test_debug_shows_the_traceback(tmp_path):
    result = run("gp", tmp_path / "none.csv", "--target", "y", "--debug")
    assert isinstance(result.exception, ValueError)


def test_help_and_version():
    text = run("--help").output
    assert all(word in text for word in ("demo", "gp", "generate", "bench"))
    assert run().exit_code in (0, 2)
    assert run("--version").output.startswith("probinfer ")
    help_text = run("gp", "--help").output
    assert all(word in help_text for word in ("--target", "twenty seconds with map", "'probinfer[plots]'"))
    done = subprocess.run(
        [sys.executable, "-m", "probinfer", "--version"], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout.startswith("probinfer ")


def test_auto_engine_depends_on_the_rows():
    assert choose_engine("auto", 100).name == "nuts"
    assert choose_engine("auto", 2000).name == "map"
    assert choose_engine("full-rank", 2000).name == "full-rank"


def test_bench_lists_and_runs(tmp_path, monkeypatch):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    main = "if __name__ == '__main__':\n"
    (folder / "fast.py").write_text(
        f'"""How fast?\n\nMore."""\nimport os, sys\n{main}    open("out", "w").write(str(sys.argv[1:]) + os.environ'
        '["OPENBLAS_NUM_THREADS"])\n    sys.exit(3)\n'
    )
    (folder / "shared.py").write_text('"""A module."""\n')
    monkeypatch.chdir(tmp_path)
    listed = run("bench")
    assert listed.exit_code == 0
    assert "fast" in listed.output
    assert "How fast?" in listed.output
    assert "shared" not in listed.output
    assert run("bench", "fast", "--rows", "7").exit_code == 3
    assert (tmp_path / "out").read_text() == "['--rows', '7']1"
    fails("bench", "slow", match="no benchmark is called 'slow'; choose one of: fast")


def test_bench_without_a_checkout(tmp_path, monkeypatch):
    from probinfer.app.commands import bench

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "a/b/bench.py"))
    fails("bench", match="there is no folder benchmarks/ here")


@pytest.mark.parametrize("is_complete", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_demo_end_to_end(is_complete, tmp_path, monkeypatch):
    """All sections of the demo, with a quick engine, few rows and untrained weights.

    The fast version keeps the classification only: other tests cover three sections (``test_kernel_choice``,
    ``test_demo_particles``, ``test_demo_language_model``) and the command ``gp``, which shares the regression pages.
    """
    stored = folders.reasoner(tmp_path / "weights")
    monkeypatch.setattr(reasoner_load, "folder", lambda: stored)
    if not is_complete:
        monkeypatch.setattr(demo_module, "_regressions", lambda *_: {})
        monkeypatch.setattr(demo_module, "_calibration", lambda *_: (Section("Calibration", ()), TABLE))
        monkeypatch.setattr(demo_module, "_kernels", lambda *_: (Section("Kernels", ()), TABLE, "a river"))
        monkeypatch.setattr(demo_module, "_particles", lambda *_: (Section("Particles", ()), TABLE))
        monkeypatch.setattr(demo_module, "_language", lambda *_: (Section("Language", ()), []))
    monkeypatch.setattr(
        demo_module,
        "SMALL",
        demo_module.DemoSize(
            num_draws=8,
            num_patients=20,
            co2_stride=24,
            num_tumors=40,
            num_simulations=20,
            num_particles=32,
            num_years=16,
            max_steps=16,
            num_problems=2,
        ),
    )
    monkeypatch.setattr(demo_module, "KERNELS", demo_module.KERNELS[:1])
    methods = [method for method in demo_module.CLASSIFICATION_METHODS if method.label == "Laplace"]
    monkeypatch.setattr(demo_module, "CLASSIFICATION_METHODS", methods)
    monkeypatch.setattr(
        demo_module, "ENGINES", (engines.find_engine("ml2")._replace(make=lambda draws: Cloud()),)
    )
    result = run("demo", "--small", "--out", tmp_path, "--seed", 1)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for text in (result.output, page):
        assert ("Diabetes" in text) == is_complete
        assert ("CO2" in text) == is_complete
        assert "Breast cancer" in text
        assert "Laplace" in text
        assert ("squared exponential" in text) == is_complete
        assert ("smallest detectable error" in " ".join(text.split())) == is_complete
        assert ("these are prior draws" in text) == is_complete
        assert ("particle filter, 16" in text) == is_complete
    assert ("ML-II" in result.output) == is_complete
    assert ("Genealogy of the particles" in page) == is_complete
    assert f"jax {jax.__version__}" in page
    assert ("Keeling and Whorf" in page) == is_complete
