"""The report of lm_scaling: budgets at equal accuracy, and the table of the README."""

import json
from pathlib import Path

import lm_scaling_report as report
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def test_budgets_are_read_off_a_line_in_log_n():
    ladder, curve = (1, 4, 16), np.array([[0.2, 0.4, 0.3]])
    level = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    budgets = report._budget(level, ladder, np.repeat(curve, 5, axis=0))
    np.testing.assert_allclose(budgets, [1, 1, 2, 4, np.inf])


def test_ratios_and_intervals_of_curves_that_are_known():
    """The other method needs four times as many texts as the filter for the same accuracy, on each problem."""
    rng = np.random.default_rng(0)
    level = rng.uniform(size=400)
    ladder, share = (1, 4, 16), {1: 0.2, 4: 0.5, 16: 0.8}

    def rows(p):
        return [{"right": bool(u < p), "samples": 1, "tokens": 1, "calls": 1, "score": 0.5} for u in level]

    results = {
        "pool-0": {
            "rows": {str(n): {"majority": rows(share[max(n // 4, 1)])} for n in ladder},
            "seconds": 1.0,
        }
    }
    results |= {f"{report.CHIEF}-{n}-0": {"rows": rows(share[n]), "seconds": 1.0} for n in ladder}
    gathered = report.gather(results, ladder, 1)
    [ratio] = gathered["ratios"]
    assert ratio["for the filter at 4"] == pytest.approx(4)
    assert ratio["budget ratio"] == pytest.approx(4)
    assert ratio["interval"] == pytest.approx([4, 4])
    four = next(c for c in gathered["curves"] if c["method"] == "majority" and c["N"] == 4)
    assert four["filter less this"] == pytest.approx(np.mean(level < 0.5) - np.mean(level < 0.2))
    low, high = four["its interval"]
    assert low < four["filter less this"] < high
    assert report.finite({"a": [float("inf"), 1.0]}) == {"a": [None, 1.0]}


def test_the_readme_shows_the_table_of_the_results():
    results = json.loads((ROOT / "benchmarks/results/lm_scaling.json").read_text(encoding="utf-8"))
    shown = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- lm scaling table -->\n")[1]
    assert shown.split("<!-- end of")[0].strip() == report.markdown(results)
