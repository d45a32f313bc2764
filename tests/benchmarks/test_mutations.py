"""Some planted faults of the mutation table at a smaller size: each is detected, by the expected checks alone."""

import json
from pathlib import Path

import jax
import pytest
from scipy import stats

from benchmarks.mutations.checks import CHECKS, run_group
from benchmarks.mutations.faults import APPROXIMATIONS, FAULTS, NULLS, by_name
from benchmarks.mutations.settings import FULL, SMALL
from benchmarks.mutations.table import best_check, clopper_pearson, judge, markdown

# Of 60 keys each quick fault is caught at every one at level .001 too; at .05 a miss is rarer than 1e-4.
SIZE = FULL._replace(simulations=400, draws=31, num_states=7, sample=400)
PROCEDURES = (*NULLS, *APPROXIMATIONS, *FAULTS)


@pytest.mark.parametrize(
    ("name", "group", "caught", "blind"),
    [
        ("prior as posterior", "ranks", {"SBC, all", "TARP"}, {"SBC, parameters", "TARP, x-free"}),
        ("wrong correlation", "ranks", {"SBC, all"}, {"SBC, parameters", "VSBC"}),
        ("too wide", "ranks", {"SBC, parameters", "SBC, all", "TARP"}, {"VSBC"}),
        pytest.param(
            "missing Jacobian", "ranks", {"SBC, parameters", "SBC, all"}, set(), marks=pytest.mark.slow
        ),
        pytest.param(
            "too wide", "distances", {"KSD", "Stein identity", "MMD"}, set(), marks=pytest.mark.slow
        ),
        pytest.param("HMC without accept", "joint", {"joint, chain"}, set(), marks=pytest.mark.slow),
    ],
)
def test_faults_are_caught(key, name, group, caught, blind):
    rejections = run_group(group, key, by_name(name), SIZE)
    assert caught <= {check for check, rejected in rejections.items() if rejected}
    if blind:  # at a level that is the rate of false alarms
        rejections = run_group(group, key, by_name(name), SIZE._replace(level=1e-4))
        assert not any(rejections[check] for check in blind)


def test_without_a_fault_nothing_is_said(key):
    """One of eleven checks at level .002 says something at two keys at a rate of 4e-5."""
    for group in ("ranks", "distances"):
        one, other = (
            run_group(group, k, by_name("none, gaussian"), SIZE._replace(level=0.002))
            for k in jax.random.split(key)
        )
        assert not any(one[check] and other[check] for check in one)


def test_names_are_distinct():
    assert len({one.name for one in PROCEDURES}) == len(PROCEDURES)
    assert len(FAULTS) >= 12
    assert set(SMALL._fields) == set(FULL._fields)


@pytest.mark.parametrize(("rejected", "total"), [(0, 60), (60, 60), (17, 300)])
def test_intervals(rejected, total):
    wanted = stats.binomtest(rejected, total).proportion_ci(0.95, method="exact")
    assert clopper_pearson(rejected, total, 0.95) == pytest.approx((wanted.low, wanted.high), rel=1e-9)


def test_what_is_asked_is_judged():
    counts = {one.name: dict.fromkeys(CHECKS, (3, 60)) for one in PROCEDURES}
    for one in FAULTS:
        counts[one.name] = counts[one.name] | {"TARP": (60, 60)}
    counts["none, HMC"] = counts["none, HMC"] | {"KSD": (300, 2000)}
    counts["too wide"] = dict.fromkeys(CHECKS, (58, 60))
    judgment = judge(counts, 0.05)
    assert judgment["sizes above the level"] == ["KSD (none, HMC): 300 of 2000"]
    assert judgment["not caught"] == ["too wide"]  # 58 of 60: the lower end is 0.885
    assert best_check(counts["sign flip"]) == ("TARP", pytest.approx(0.025 ** (1 / 60)))
    table = markdown(counts).splitlines()
    assert len(table) == 2 + len(PROCEDURES)
    assert "**100**" in next(line for line in table if line.startswith("| sign flip |"))


def test_the_readme_shows_the_table_of_the_results():
    root = Path(__file__).parents[2]
    results = json.loads((root / "benchmarks/results/check_mutations.json").read_text(encoding="utf-8"))
    shown = (root / "README.md").read_text(encoding="utf-8").split("<!-- mutation table -->\n")[1]
    assert shown.split("<!-- end of")[0].strip() == markdown(results["rejected, of"])
    assert judge(results["rejected, of"], 0.05) == results["verdict"]
    assert not results["verdict"]["not caught"]
    assert not results["verdict"]["sizes above the level"]
