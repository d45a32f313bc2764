"""The demo's section on the language model: a problem solved live by particles, and accuracies on many problems."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool
from rich.console import Console
from scipy import stats

from probinfer import lm
from probinfer.app.commands.live import StepDisplay, is_correct_so_far
from probinfer.core.types import PRNGKey
from probinfer.lm.answers import selectors
from probinfer.lm.reasoner import Problem
from probinfer.plots.ancestry import GenealogyColors, draw, size_for
from probinfer.plots.style import Picture
from probinfer.plots.style import draw as draw_picture
from probinfer.report.html import Gallery, Paragraph, Section
from probinfer.report.tables import TextTable, seconds

__all__ = ["MethodAccuracy", "ReasonerResults", "lm_section", "lm_table", "solve_problems"]

_WIDTH = 10.2  # inches of a page
_SETTINGS = {"answer": lm.reasoner.answer, "max_tokens": 64}


class MethodAccuracy(NamedTuple):
    """The answers of one method to all problems.

    Attributes:
        label: name of the method.
        is_correct: whether the answer to each problem is correct.
        num_tokens: number of generated tokens, averaged over the problems.
        num_calls: number of calls of the reward model, averaged over the problems.
        seconds: wall time, including compilation; NaN if the method uses the texts of another one.
    """

    label: str
    is_correct: Bool[np.ndarray, " problem"]
    num_tokens: float
    num_calls: float
    seconds: float


class ReasonerResults(NamedTuple):
    """The results of the section.

    Attributes:
        problem: the problem that was solved live.
        answers: its answers.
        events: its steps.
        num_particles: number of particles N.
        num_parameters: number of parameters of the network.
        methods: the methods on all problems, the particle filter last.
    """

    problem: Problem
    answers: lm.Answers
    events: tuple[lm.Event, ...]
    num_particles: int
    num_parameters: int
    methods: tuple[MethodAccuracy, ...]


def solve_problems(
    key: PRNGKey,
    num_problems: int,
    *,
    seed: int,
    console: Console,
    num_particles: int = 16,
    model: lm.Model | None = None,
    progress: bool | None = None,
) -> ReasonerResults:
    """Solve one problem and show its steps, then solve many problems by several methods.

    Args:
        key: random key.
        num_problems: number of problems in the table.
        seed: seed of the problems, which the model was not trained on.
        console: console of the steps.
        num_particles: number of particles N.
        model: the language model; None loads ``lm.reasoner.model()``.
        progress: whether to show progress; None shows it on a terminal.
    """
    model = lm.reasoner.model() if model is None else model
    key_live, key_many = jax.random.split(key)
    problem = lm.reasoner.problems(seed, 1, (6, 6))[0]
    answers, events = _solve_live(key_live, model, problem, num_particles, console)
    problems = lm.reasoner.problems(seed + 1, num_problems)
    methods = _compare_methods(key_many, model, problems, num_particles, progress)
    num_parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(model.network))
    return ReasonerResults(
        problem=problem,
        answers=answers,
        events=tuple(events),
        num_particles=num_particles,
        num_parameters=num_parameters,
        methods=methods,
    )


def _solve_live(
    key: PRNGKey, model: lm.Model, problem: Problem, num: int, console: Console
) -> tuple[Any, list[lm.Event]]:
    """Solve one problem, and show each step."""
    events: list[lm.Event] = []
    console.print(f"  {problem.prompt.strip()}", highlight=False, markup=False)
    with StepDisplay(console, partial(is_correct_so_far, problem), redraw=False) as display:

        def watch(event: lm.Event) -> bool:
            events.append(event)
            return display(event)

        method = lm.ParticleFilter(num, step="\n")
        settings: dict[str, Any] = {**_SETTINGS, "progress": False, "watch": watch}
        answers: Any = lm.infer(key, model, problem.prompt, model.reward, method, **settings)
    return answers, events


def _compare_methods(
    key: PRNGKey, model: lm.Model, problems: list[Problem], num: int, progress: Any
) -> tuple[MethodAccuracy, ...]:
    """Compare greedy decoding, votes over one pool of independent texts, and the particle filter."""
    truth = [problem.answer for problem in problems]

    def run(method: Any) -> tuple[list, float]:
        start = time.perf_counter()
        prompts = [problem.prompt for problem in problems]
        settings: dict[str, Any] = {**_SETTINGS, "progress": progress}
        results: Any = lm.infer(key, model, prompts, model.reward, method, **settings)
        return results, time.perf_counter() - start

    greedy, seconds_greedy = run(lm.Greedy(step="\n"))
    pool, seconds_pool = run(lm.BestOfN(num, step="\n"))
    filtered, seconds_filter = run(lm.ParticleFilter(num, step="\n"))
    majority = [selectors.majority(result.extracted).answer for result in pool]
    best = [selectors.argmax(result.extracted, result.log_scores).answer for result in pool]
    return (
        _accuracy("greedy", truth, [result.best for result in greedy], greedy, 0.0, seconds_greedy),
        _accuracy(f"majority of {num}", truth, majority, pool, 0.0, seconds_pool),
        # A choice among complete texts calls the reward model once for each text.
        _accuracy(f"best of {num}", truth, best, pool, float(num), float("nan")),
        _accuracy(
            f"particle filter, {num}",
            truth,
            [result.best for result in filtered],
            filtered,
            None,
            seconds_filter,
        ),
    )


def _accuracy(
    label: str,
    truth: list[str],
    answers: list,
    results: list,
    num_calls: float | None,
    elapsed: float,
) -> MethodAccuracy:
    if num_calls is None:
        num_calls = float(np.mean([result.ledger.reward_calls for result in results]))
    return MethodAccuracy(
        label=label,
        is_correct=np.array([answer == correct for answer, correct in zip(answers, truth, strict=True)]),
        num_tokens=float(np.mean([result.ledger.generated for result in results])),
        num_calls=num_calls,
        seconds=elapsed,
    )


def _interval(is_correct: np.ndarray) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the probability of a correct answer."""
    interval = stats.binomtest(int(is_correct.sum()), len(is_correct)).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def lm_table(results: ReasonerResults) -> TextTable:
    """Return one row for each method."""
    rows = []
    for method in results.methods:
        low, high = _interval(method.is_correct)
        rows.append(
            (
                method.label,
                f"{method.is_correct.mean():.0%}",
                f"{low:.0%} to {high:.0%}",
                f"{method.num_tokens:.0f}",
                f"{method.num_calls:.0f}",
                "same texts" if np.isnan(method.seconds) else seconds(method.seconds),
            )
        )
    columns = (
        "method",
        "accuracy",
        "95 % interval",
        "tokens per problem",
        "reward calls per problem",
        "time",
    )
    title = f"Chained arithmetic: {len(results.methods[0].is_correct)} new problems"
    return TextTable(title, columns, tuple(rows), conclusion(results))


def conclusion(results: ReasonerResults) -> str:
    """Return the conclusion: a sign test on the problems that only one of two methods answers correctly."""
    *others, filtered = results.methods
    parts = []
    for other in others:
        num_filter = int((filtered.is_correct & ~other.is_correct).sum())
        num_other = int((other.is_correct & ~filtered.is_correct).sum())
        total = num_filter + num_other
        pvalue = stats.binomtest(num_filter, total).pvalue if total else 1.0
        verdict = "significant" if pvalue < 0.05 else "not significant"
        parts.append(f"{other.label}: {num_filter} to {num_other} ({verdict})")
    return (
        "Numbers of problems that only the particle filter, or only the other method, answers correctly: "
        + "; ".join(parts)
        + "."
    )


def lm_section(results: ReasonerResults, scores: TextTable) -> Section:
    """Return the section: introduction, conclusion, plot and table."""
    truth = results.problem.answer
    probability = dict(results.answers.answers).get(truth, 0.0)
    best = results.answers.best
    introduction = (
        f"The library includes a transformer with {results.num_parameters / 1e6:.1f} million parameters, trained on "
        "arithmetic from left to right modulo 11 and stopped before it is perfect. Each line that it generates can be "
        "checked, but the methods do not use the checker: they use a reward model that was trained to predict it. "
        f"Each of {results.num_particles} particles generates one line per step and is weighted by the odds of the "
        "reward model; particles of small weight are replaced by copies of particles of large weight."
    )
    outcome = (
        f"{results.problem.prompt.strip()}: the correct answer is {truth}. The particles give it probability "
        f"{probability:.0%}; their most probable answer, {best or 'none'}, is "
        f"{'correct' if best == truth else 'wrong'}. The texts are {results.answers.target}."
    )
    blocks = (
        Paragraph(introduction),
        Paragraph(outcome, "finding"),
        Gallery((_picture(results),)),
        Paragraph(scores.note, "finding"),
        scores._replace(title="", note=""),
    )
    return Section("Sampling from a language model", blocks)


def _picture(results: ReasonerResults) -> Picture:
    tree = lm.genealogy(results.answers, results.events)
    is_correct_fn = partial(is_correct_so_far, results.problem)

    def fn(axes: Any, theme: Any) -> None:
        palette = GenealogyColors((*theme.series[:4], *theme.series[5:]), theme.ink, theme.muted)
        draw(axes, tree, palette, is_correct_fn)

    caption = (
        "Each line is a particle; its width is the final weight, its color the final answer. Thin gray lines have no "
        "descendants. Dots mark steps that are correct so far, crosses wrong ones, according to the checker, which the "
        "method does not use."
    )
    height = size_for(tree)[1]
    return draw_picture("Genealogy of the particles", caption, fn, width=_WIDTH, height=height)
