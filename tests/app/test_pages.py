"""Pages of check reports, and ``probinfer check``: the page shows the results, the exit code reports failures."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from probinfer import checks, report
from probinfer.app.command_line import app
from probinfer.app.commands import check as check_module
from probinfer.app.pages import engines
from probinfer.app.pages.engines import ENGINES
from probinfer.app.suite import suite
from probinfer.app.suite.suite import Subject, SuiteSize
from probinfer.inference.posterior import Posterior
from probinfer.report import check_pages
from tests.app.test_regression_report import check_page


@pytest.fixture(scope="module")
def reports():
    keys = jax.random.split(jax.random.key(0), 6)
    theta = jax.random.normal(keys[0], (300, 2))
    x = theta + jax.random.normal(keys[1], theta.shape)
    draws = x[:, None] / 2 + np.sqrt(0.5) * jax.random.normal(keys[2], (300, 50, 2))
    a, b = jax.random.normal(keys[3], (2, 100, 2))
    return {
        "ranks": checks.uniformity(checks.rank_table(keys[4], draws, theta, x)),
        "TARP <& others>": checks.tarp(keys[5], 1.5 * draws, theta, x),
        "identity": checks.stein_identity(a, lambda u: -0.5 * u @ u),
        "distance": checks.mmd(a, b, num_permutations=99, key=keys[0]),
        "no p-value": checks.mmd(a, b),
        "bounds": checks.evidence_sandwich(np.zeros(5), np.ones(5)),
    }


@pytest.mark.slow
def test_page_of_any_reports(tmp_path, reports):
    path = report.check_page(reports, tmp_path / "sub" / "checks.html", title="Mine", facts={"seed": "7"})
    assert path == tmp_path / "sub" / "checks.html"
    text = path.read_text(encoding="utf-8")
    page = check_page(text)
    assert len(page.images) == 2 * len(reports)
    assert page.cells[-2:] == ["seed", "7"]
    assert re.search("Failed: TARP &lt;&amp; others&gt;", text)
    assert "No verdict from: no p-value, bounds" in text
    for one in reports.values():
        assert one.verdict[1:40] in text.replace("&lt;", "<")
    assert f"bias {reports['ranks'].power.bias:.2f} sd" in text
    assert report.check_page({"one": reports["ranks"]}, tmp_path).name == "index.html"


def test_numbers_are_those_of_the_report(reports):
    ranked = check_pages.numbers(reports["ranks"])[0]
    smallest = min(reports["ranks"].raw_pvalues.values())
    assert float(ranked.rows[0][1]) == pytest.approx(smallest, rel=0.05)
    assert len(ranked.rows) == 12
    assert ranked.note == f"and {len(reports['ranks'].pvalues) - 12} more"
    identity = check_pages.numbers(reports["identity"])
    assert [float(row[1]) for row in identity[1].rows] == pytest.approx(
        reports["identity"].location, rel=0.01
    )
    scalars = dict(check_pages.numbers(reports["bounds"])[0].rows)
    assert float(scalars["gap"]) == pytest.approx(1.0)
    assert check_pages.numbers(object()) == []


def test_what_could_have_been_seen(reports):
    seen = {name: check_pages.could_have_seen(one) for name, one in reports.items()}
    assert seen["identity"].startswith(f"bias {reports['identity'].power.bias:.2f} sd, width times 0.")
    assert seen["distance"].startswith(f"bias {reports['distance'].power.bias:.2f} sd, width times ")
    assert seen["no p-value"] == ""
    assert "nats" in seen["bounds"]
    nothing = reports["ranks"].power._replace(bias=np.inf)
    blind = dataclasses.replace(reports["ranks"], yardstick=lambda num, level: (nothing, None))
    assert check_pages.could_have_seen(blind) == "nothing: too few simulations"


@pytest.mark.parametrize(
    ("given", "path", "match"),
    [
        ({}, "out", "nothing to show"),
        ({"mine": 3}, "out", "'mine' must be a report of probinfer.checks"),
        ({"mine": type("R", (), {"verdict": "fine"})()}, "file/below", "is a file"),
    ],
)
def test_bad_input(tmp_path, given, path, match):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=match):
        report.check_page(given, tmp_path / path)


# The command

EFFORT = check_module.Effort(
    size=SuiteSize(
        num_exact=200, num_simulations=0, num_engine_simulations=0, num_lanes=0, discrepancies=("Stein",)
    ),
    num_draws=50,
    is_complete=False,
    num_warmup=20,
    num_sampler_draws=20,
    transitions=(),
)


def normal(key, target, shift=0.0):
    """Exact for the normal target; a normal at the mode, which is wrong, for the skewed one."""
    precision = -jax.hessian(target.logdensity_fn)(jnp.zeros(3))
    covariance = jnp.linalg.inv(precision)
    root = jnp.linalg.cholesky(covariance)
    draws = (shift + jax.random.normal(key, (200, 3))) @ root.T
    return Posterior(draws[None], unconstrained=draws[None])


def run_command(monkeypatch, tmp_path, sample_fn):
    monkeypatch.setattr(check_module, "QUICK", EFFORT)
    monkeypatch.setattr(check_module, "subjects", lambda entries, effort: [Subject("mine", sample_fn)])
    monkeypatch.setattr(suite.known_targets, "skewed", suite.known_targets.correlated_normal)
    return CliRunner().invoke(app, ["check", "--quick", "--out", str(tmp_path)], env={"COLUMNS": "120"})


@pytest.mark.slow
def test_check_reports_its_results(monkeypatch, tmp_path):
    good = run_command(monkeypatch, tmp_path, normal)
    assert good.exit_code == 0, good.output
    assert "Nothing unexpected in 2 results" in good.output
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert len(check_page(text).images) == 4
    assert "mine: correlated normal" in text
    assert "Could have seen: bias" in text
    assert "left out by --quick" in text
    bad = run_command(monkeypatch, tmp_path, lambda key, target: normal(key, target, 1.0))
    assert bad.exit_code == 1
    assert "2 of 2 results are unexpected: mine on correlated normal fails Stein" in " ".join(
        bad.output.split()
    )


def test_check_refuses_before_it_works(monkeypatch, tmp_path):
    def never(*arguments, **settings):
        raise AssertionError("the suite was started")

    monkeypatch.setattr(check_module, "run_suite", never)
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["check", "--quick", "--out", str(tmp_path / "file")])
    assert result.exit_code == 2
    assert "is a file; pass a folder" in result.output
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    result = CliRunner().invoke(app, ["check", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "probinfer[plots]" in result.output
    assert CliRunner().invoke(app, ["check", "--seed", "-1"]).exit_code == 2


def test_every_engine_with_a_posterior_is_tested():
    names = [subject.name for subject in check_module.subjects(ENGINES, check_module.FULL)]
    assert names == [entry.label for entry in ENGINES if entry.any_target and not entry.is_point]
    by_name = {subject.name: subject for subject in check_module.subjects(ENGINES, check_module.QUICK)}
    assert "HMC" not in by_name
    assert by_name["NUTS"].limitations == {}
    assert (
        by_name["mean-field VI"]
        .limitations[suite.known_targets.CORRELATED]
        .startswith("ignores correlations")
    )
    assert not by_name["NUTS"].quick
    assert by_name["full-rank VI"].bounds_fn is not None
    tempered = next(
        one for one in check_module.subjects(ENGINES, check_module.FULL) if one.name == "tempered SMC"
    )
    assert tempered.bounds_fn is tempered.evidence_fn is not None
    assert "tempered SMC" not in by_name  # its programs take half a minute to compile
    assert by_name["NUTS"].bounds_fn is None


def test_ranks_are_not_used_for_particles_that_repel():
    subjects = {s.name: s for s in check_module.subjects(engines.ENGINES, check_module.FULL)}
    assert [name for name, s in subjects.items() if not s.quick] == ["coin SVGD", "KSD descent"]
