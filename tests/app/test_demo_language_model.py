"""The demo's section on the language model: accuracies are computed from the texts and reported on the page."""

import io
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import rich.console
from scipy import stats

from probinfer import lm
from probinfer.app.commands.live import is_correct_so_far
from probinfer.app.demo import demo, language_model
from probinfer.app.demo.language_model import (
    MethodAccuracy,
    ReasonerResults,
    lm_section,
    lm_table,
    solve_problems,
)
from probinfer.core.errors import MissingExtraError
from tests.lm import tables

CONSOLE = rich.console.Console(file=io.StringIO(), width=120)


def answers(extracted, log_scores=None, **others):
    """Stand-in for the answers to one prompt, with the fields that the section reads."""
    num = len(extracted)
    ledger = SimpleNamespace(generated=10 * num, reward_calls=7)
    best = max(dict.fromkeys(extracted), key=extracted.count)
    fields = {"extracted": extracted, "log_scores": np.asarray(log_scores or [0.0] * num), "best": best}
    return SimpleNamespace(**fields, ledger=ledger, **others)


def live(problem, events):
    """Two particles of two steps, one right and one wrong."""
    right, wrong = problem.solution, problem.solution.replace(" = ", " = 1", 1)
    cut = [text.index("\n") + 1 for text in (right, wrong)]
    for step, texts in enumerate(([right[: cut[0]], wrong[: cut[1]]], [right, wrong])):
        weights = np.array([0.75, 0.25])
        events.append(
            lm.Event(
                step, texts, weights, np.log(weights), np.full(2, step), np.arange(2), step > 0, 1.6, 0.0
            )
        )
    return answers(
        [problem.answer, "none"],
        answers=[(problem.answer, 0.75), ("none", 0.25)],
        ancestors=np.tile(np.arange(2), (2, 1)),
        step_lengths=np.array([cut, [len(right) - cut[0], len(wrong) - cut[1]]]),
        num_steps=2,
        log_weights=np.log([0.75, 0.25]),
        tokens=[np.frombuffer(text.encode(), np.uint8) for text in (right, wrong)],
        decode=lambda ids: bytes(ids).decode(),
        target="weighted draws from a test",
        method=None,
    )


@pytest.fixture
def solved(monkeypatch):
    """Results with known answers: all methods but best-of-N solve problem 0, only the filter solves problem 1."""

    def infer(key, model, prompt, reward, method, *, watch=None, **settings):
        if watch is not None:
            events = []
            results = live(lm.reasoner.parse(prompt), events)
            assert not any(watch(event) for event in events)
            return results
        first, second = (lm.reasoner.parse(one).answer for one in prompt)
        if isinstance(method, lm.Greedy):
            return [answers([first]), answers(["none"])]
        if isinstance(method, lm.BestOfN):
            return [answers([first, first, "none"], [0.0, -1.0, 1.0]), answers(["none", "none", second])]
        return [answers([first, first]), answers([second, second])]

    monkeypatch.setattr(language_model.lm, "infer", infer)
    settings = {"seed": 4, "console": CONSOLE, "num_particles": 3, "model": tables.model()}
    return solve_problems(jax.random.key(0), 2, **settings)


def test_accuracies_are_counted_from_the_texts(solved):
    right = {method.label: method.is_correct.tolist() for method in solved.methods}
    assert right == {
        "greedy": [True, False],
        "majority of 3": [True, False],
        "best of 3": [False, False],
        "particle filter, 3": [True, True],
    }
    assert [method.num_calls for method in solved.methods] == [0, 0, 3, 7]
    assert [method.num_tokens for method in solved.methods] == [10, 30, 30, 20]
    assert "✓" in CONSOLE.file.getvalue()
    assert "✗" in CONSOLE.file.getvalue()


def test_table_and_page(solved):
    table = lm_table(solved)
    assert [row[1] for row in table.rows] == ["50%", "50%", "0%", "100%"]
    assert [row[-1] == "same texts" for row in table.rows] == [False, False, True, False]
    assert solved.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(tables.model().network))
    text = str(lm_section(solved._replace(num_parameters=1_234_567), table))
    assert "1.2 million parameters" in text
    assert f"the correct answer is {solved.problem.answer}. The particles give it probability 75%" in text
    assert "is correct. The texts are weighted draws from a test" in text
    assert "Genealogy of the particles" in text


def test_intervals_are_wilsons():
    low, high = language_model._interval(np.arange(40) < 10)
    z, p, n = stats.norm.ppf(0.975), 0.25, 40
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert low == pytest.approx((middle - half) / (1 + z**2 / n))
    assert high == pytest.approx((middle + half) / (1 + z**2 / n))


def test_the_empty_text_is_correct_so_far():
    problem = lm.reasoner.problems(0, 1)[0]
    for text, right in (("", True), (problem.solution, True), (problem.solution[:3] + "x", False)):
        assert is_correct_so_far(problem, text) == right


def test_only_clear_differences_are_significant():
    right = np.arange(40)
    methods = [("greedy", right < 20), ("majority", right < 30), ("filter", (right >= 5) & (right < 36))]
    accuracies = tuple(
        MethodAccuracy(label=name, is_correct=is_correct, num_tokens=1.0, num_calls=1.0, seconds=1.0)
        for name, is_correct in methods
    )
    results = ReasonerResults(
        problem=None, answers=None, events=(), num_particles=16, num_parameters=1, methods=accuracies
    )
    text = language_model.conclusion(results)
    assert "greedy: 16 to 5 (significant)" in text  # binomial, p = 0.027
    assert "majority: 6 to 5 (not significant)" in text


@pytest.mark.parametrize(
    "error", [MissingExtraError("pip install 'probinfer[lm]'"), FileNotFoundError("no weights")]
)
def test_without_weights_the_section_is_left_out(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(demo.lm.reasoner, "model", fail)
    section, tables = demo._language(jax.random.key(0), demo.SMALL, 0, CONSOLE)
    assert tables == []
    assert f"Left out: {error}" in str(section)
