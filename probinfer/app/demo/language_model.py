"""The demo's language model: one problem solved live by particles, and how often that is right."""

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
from probinfer.app.commands.live import Screen, is_right
from probinfer.core.types import PRNGKey
from probinfer.lm.answers import selectors
from probinfer.lm.reasoner import Problem
from probinfer.plots.ancestry import GenealogyColors, draw, size_for
from probinfer.plots.style import Picture
from probinfer.plots.style import draw as draw_twice
from probinfer.report.html import Gallery, Paragraph, Section
from probinfer.report.tables import TextTable, seconds

__all__ = ["Method", "Solved", "lm_section", "lm_table", "solve"]

_WIDTH = 10.2  # inches of a page
_SETTINGS = {"answer": lm.reasoner.answer, "max_tokens": 64}


class Method(NamedTuple):
    """One way to answer all problems.

    Attributes:
        label: its name.
        right: one a problem.
        tokens: generated, on average over the problems.
        calls: of the reward model, likewise.
        seconds: wall time, compilation included; NaN where the texts were those of another one.
    """

    label: str
    right: Bool[np.ndarray, " problem"]
    tokens: float
    calls: float
    seconds: float


class Solved(NamedTuple):
    """What the journey found.

    Attributes:
        problem: the one that was solved live.
        answers: its answers.
        events: its steps.
        num_particles: N.
        num_parameters: of the network.
        methods: on all problems, the particle filter last.
    """

    problem: Problem
    answers: Any
    events: tuple[Any, ...]
    num_particles: int
    num_parameters: int
    methods: tuple[Method, ...]


def solve(
    key: PRNGKey,
    num_problems: int,
    *,
    seed: int,
    console: Console,
    num_particles: int = 16,
    model: lm.Model | None = None,
    progress: bool | None = None,
) -> Solved:
    """Solve one problem before the eyes of the reader, then many.

    Args:
        key: random key.
        num_problems: how many in the table.
        seed: of the problems, which the model has not seen.
        console: where the steps go.
        num_particles: N.
        model: None: ``lm.reasoner()``.
        progress: a bar; None means on a terminal.
    """
    model = lm.reasoner.model() if model is None else model
    key_live, key_many = jax.random.split(key)
    problem = lm.reasoner.problems(seed, 1, (6, 6))[0]
    answers, events = _live(key_live, model, problem, num_particles, console)
    problems = lm.reasoner.problems(seed + 1, num_problems)
    methods = _methods(key_many, model, problems, num_particles, progress)
    num_parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(model.network))
    return Solved(problem, answers, tuple(events), num_particles, num_parameters, methods)


def _live(
    key: PRNGKey, model: lm.Model, problem: Problem, num: int, console: Console
) -> tuple[Any, list[lm.Event]]:
    """One problem, its steps shown as they come."""
    events: list[lm.Event] = []
    console.print(f"  {problem.prompt.strip()}", highlight=False, markup=False)
    with Screen(console, partial(is_right, problem), redraw=False) as screen:

        def watch(event: lm.Event) -> bool:
            events.append(event)
            return screen(event)

        method = lm.ParticleFilter(num, step="\n")
        settings: dict[str, Any] = {**_SETTINGS, "progress": False, "watch": watch}
        found = lm.infer(key, model, problem.prompt, model.reward, method, **settings)
    return found, events


def _methods(
    key: PRNGKey, model: lm.Model, problems: list[Problem], num: int, progress: Any
) -> tuple[Method, ...]:
    """Greedy, votes over one pool of independent texts, and the particle filter."""
    right = [problem.answer for problem in problems]

    def run(method: Any) -> tuple[list, float]:
        start = time.perf_counter()
        prompts = [problem.prompt for problem in problems]
        settings: dict[str, Any] = {**_SETTINGS, "progress": progress}
        found: Any = lm.infer(key, model, prompts, model.reward, method, **settings)
        return found, time.perf_counter() - start

    greedy, spent_greedy = run(lm.Greedy(step="\n"))
    pool, spent_pool = run(lm.BestOfN(num, step="\n"))
    filtered, spent_filter = run(lm.ParticleFilter(num, step="\n"))
    majority = [selectors.majority(one.extracted).answer for one in pool]
    best = [selectors.argmax(one.extracted, one.log_scores).answer for one in pool]
    return (
        _method("greedy", right, [one.best for one in greedy], greedy, 0.0, spent_greedy),
        _method(f"majority of {num}", right, majority, pool, 0.0, spent_pool),
        # A choice among whole texts asks once for each of them.
        _method(f"best of {num}", right, best, pool, float(num), float("nan")),
        _method(
            f"particle filter, {num}", right, [one.best for one in filtered], filtered, None, spent_filter
        ),
    )


def _method(
    label: str, truth: list[str], found: list, results: list, calls: float | None, spent: float
) -> Method:
    right = np.array([answer == one for answer, one in zip(found, truth, strict=True)])
    tokens = float(np.mean([one.ledger.generated for one in results]))
    asked = float(np.mean([one.ledger.reward_calls for one in results])) if calls is None else calls
    return Method(label, right, tokens, asked, spent)


def _interval(right: np.ndarray) -> tuple[float, float]:
    """Wilson's interval of the probability of a right answer."""
    found = stats.binomtest(int(right.sum()), len(right)).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def lm_table(found: Solved) -> TextTable:
    """One row a method."""
    rows = []
    for method in found.methods:
        low, high = _interval(method.right)
        rows.append(
            (
                method.label,
                f"{method.right.mean():.0%}",
                f"{low:.0%} to {high:.0%}",
                f"{method.tokens:.0f}",
                f"{method.calls:.0f}",
                "same texts" if np.isnan(method.seconds) else seconds(method.seconds),
            )
        )
    columns = ("method", "right", "95 % interval", "tokens a problem", "reward calls a problem", "time")
    title = f"Chained arithmetic: {len(found.methods[0].right)} unseen problems"
    return TextTable(title, columns, tuple(rows), finding(found))


def finding(found: Solved) -> str:
    """What the comparison says: the problems on which one of two methods is right and the other is not decide."""
    *others, filtered = found.methods
    parts = []
    for other in others:
        ours, theirs = int((filtered.right & ~other.right).sum()), int((other.right & ~filtered.right).sum())
        pvalue = stats.binomtest(ours, ours + theirs).pvalue if ours + theirs else 1.0
        verdict = "a difference" if pvalue < 0.05 else "too close to call"
        parts.append(f"{other.label}: {ours} to {theirs} ({verdict})")
    return (
        "Problems that only the particle filter answers right, to those that only the other method does: "
        + "; ".join(parts)
        + "."
    )


def lm_section(found: Solved, scores: TextTable) -> Section:
    """The story, the picture, the table."""
    truth = found.problem.answer
    share = dict(found.answers.answers).get(truth, 0.0)
    chosen = found.answers.best
    story = (
        f"A transformer of {found.num_parameters / 1e6:.1f} million parameters that comes with the library was trained "
        "on arithmetic from left to right modulo 11, and stopped while it still errs. Every line that it writes can be "
        "checked, but the methods never see the checker: they see a reward model that learned to guess it. Here "
        f"{found.num_particles} particles write a line each, are weighed by the odds of the reward model, and those of "
        "little weight are replaced by copies of better ones."
    )
    outcome = (
        f"{found.problem.prompt.strip()}: the right answer is {truth}; the particles give it {share:.0%}, and their "
        f"likeliest answer, {chosen or 'none'}, is {'right' if chosen == truth else 'wrong'}. They are "
        f"{found.answers.target}."
    )
    blocks = (
        Paragraph(story),
        Paragraph(outcome, "finding"),
        Gallery((_picture(found),)),
        Paragraph(scores.note, "finding"),
        scores._replace(title="", note=""),
    )
    return Section("A language model in particles", blocks)


def _picture(found: Solved) -> Picture:
    tree = lm.genealogy(found.answers, found.events)
    judge = partial(is_right, found.problem)

    def fn(axes: Any, theme: Any) -> None:
        look = GenealogyColors((*theme.series[:4], *theme.series[5:]), theme.ink, theme.muted)
        draw(axes, tree, look, judge)

    caption = (
        "A line is a particle, as wide as it weighs at the end and coloured by the answer it leads to; thin grey lines "
        "were given up. Dots are right so far, crosses are not: the checker's word, which the particles never heard."
    )
    height = size_for(tree)[1]
    return draw_twice("Who descends from whom", caption, fn, width=_WIDTH, height=height)
