"""What ``lm.infer`` returns: weighted texts, the posterior of their answers, the evidence, and the cost of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from probinfer.core.errors import shortened
from probinfer.core.status import Status
from probinfer.core.types import PRNGKey
from probinfer.lm.answers import selectors
from probinfer.lm.answers.ancestry import genealogy
from probinfer.lm.generation.texts import End
from probinfer.plots import ancestry as picture

__all__ = ["Answers", "Cost"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run cost.

    Attributes:
        samples: number of texts sampled side by side, summed over all passes: the budget as the papers count it.
        generated: number of tokens drawn.
        masked: number of tokens computed for texts that waited for others or had ended.
        prompt: number of tokens of the prompt, which is read once.
        reward_calls: number of texts that were scored.
        rescored: number of tokens read again to weigh ancestors (particle Gibbs).
        forked: number of texts that were copied.
        bytes_copied: bytes of caches that these copies took.
        seconds: wall time, compilation included.
    """

    samples: int
    generated: int
    masked: int
    prompt: int
    reward_calls: int
    rescored: int
    forked: int
    bytes_copied: int
    seconds: float

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of two runs with the same prompt, which is counted once."""
        names = [f.name for f in dataclasses.fields(self)]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Cost(**{**sums, "prompt": self.prompt})


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """Weighted texts of one prompt; two of them are equal only if they are the same object.

    Arrays over steps have T rows, the maximum number of steps of the run, of which the first ``num_steps`` ran. In the
    others ``ess`` repeats its last value (0 from a step in which all died), ``ancestors`` are 0 ... N - 1, lengths are
    0.

    Attributes:
        prompt: the prompt as text.
        texts: M texts.
        extracted: the answer of each text, or None.
        log_weights: (M,) normalized log weights; if every text died, those before that step, and ``status`` says so.
        log_scores: (M,) log score of each text, by which searches choose.
        log_prior: (M,) log probability of each text under the prior.
        log_potential: (M,) sum of the log potentials of all steps of each text.
        ended: (M,) an ``lm.End`` for each text.
        log_evidence: log evidence of this prompt, or None if the method estimates none.
        ess: (T,) effective sample size after each step.
        ancestors: (T, N) parents of the particles, or None.
        step_lengths: (T, N) number of tokens of each step, or None.
        num_steps: number of steps that ran, at most T.
        status: a ``probinfer.Status``.
        target: one sentence: what the weighted texts are draws from.
        ledger: what the run cost.
        faults: faults of Python rewards in the whole call, for all its prompts together; "" if there were none.
        tokens: M arrays of tokens.
        method: the method.
        decode: tokens -> text.
    """

    prompt: str
    texts: list[str]
    extracted: list[str | None]
    log_weights: np.ndarray
    log_scores: np.ndarray
    log_prior: np.ndarray
    log_potential: np.ndarray
    ended: np.ndarray
    log_evidence: float | None
    ess: np.ndarray
    ancestors: np.ndarray | None
    step_lengths: np.ndarray | None
    num_steps: int
    status: Status
    target: str
    ledger: Cost
    faults: str
    tokens: list[np.ndarray]
    method: Any
    decode: Any = dataclasses.field(default=None, repr=False)

    @property
    def answers(self) -> list[tuple[str | None, float]]:
        """Pairs of an answer and its posterior probability, likeliest first; None (no answer) comes last."""
        vote = selectors.posterior_vote(self.extracted, self.log_weights)
        unanswered = [(None, vote.unanswered)] if vote.unanswered > 0 else []
        return [*vote.ranking, *unanswered]

    @property
    def best(self) -> str | None:
        """The likeliest answer; None if no text has one."""
        return next((answer for answer, _ in self.answers if answer is not None), None)

    @property
    def text(self) -> str:
        """The text with the largest weight."""
        return self.texts[int(np.argmax(self.log_weights))]

    def sample(self, key: PRNGKey) -> str:
        """Draw one text in proportion to the weights.

        Raises:
            ValueError: every weight is zero, or one is NaN: there is no distribution to draw from.
        """
        chosen = selectors.sample(key, self.texts, self.log_weights).particle
        if chosen < 0:
            raise ValueError(
                f"all {len(self.texts)} texts have weight zero, so none can be drawn: look at .texts and "
                ".log_potential, and use more particles or a softer reward (reward * 0.5)"
            )
        return self.texts[chosen]

    def plot_genealogy(
        self,
        axes: Any = None,
        *,
        events: Sequence[Any] = (),
        judge: Callable[[str], bool | None] | None = None,
    ) -> Any:
        """Draw which texts descend from which: steps from left to right, colored by the final answer.

        Args:
            axes: matplotlib axes; None: those of a new figure, ``axes.figure``.
            events: events of the same run (``watch``, ``lm.stream``): with them dead ends are labeled too.
            judge: text so far -> whether it is right so far; wrong steps get crosses.

        Returns:
            The axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
            TypeError: ``axes`` are not axes, ``events`` not events, or ``judge`` is not a function.
            ValueError: the method keeps no genealogy.
        """
        if axes is not None and not hasattr(axes, "annotate"):
            raise TypeError(
                f"axes must be matplotlib axes, such as figure.subplots() returns, or None; got {shortened(axes)}"
            )
        if judge is not None and not callable(judge):
            raise TypeError(
                f"judge is a function of a text so far: right, wrong, or None; got {shortened(judge)}"
            )
        tree = genealogy(self, events)
        axes = picture.axes_for(tree) if axes is None else axes
        picture.draw(axes, tree, judge=judge)
        return axes

    def summary(self) -> str:
        """Return a short report: target, answers, evidence, cost, and why texts ended."""
        failed = [] if self.status == Status.OK else [f"status: {self.status.name}"]
        dead = bool(failed) and (self.log_evidence is None or not np.isfinite(self.log_evidence))
        lines = [*failed, f"target: {self.target}"]
        lines += [] if dead else [f"  {p:6.1%}  {_in_one_line(a)}" for a, p in self.answers[:8]]
        if self.status == Status.DEGENERATE_WEIGHTS:
            lines.append("every weight is zero: effective sample size 0")
        elif self.log_evidence is not None:
            ess = np.exp(-np.logaddexp.reduce(2 * self.log_weights))
            lines.append(f"log evidence {self.log_evidence:.3f}, effective sample size {ess:.1f}")
        cost = self.ledger
        lines.append(
            f"{len(self.texts)} texts, {cost.generated} tokens generated ({cost.masked} masked), {cost.reward_calls} "
            f"reward calls, {cost.seconds:.1f} s"
        )
        ends = {End(code).name.lower(): int(np.sum(self.ended == code)) for code in np.unique(self.ended)}
        lines.append("ends: " + ", ".join(f"{name} {number}" for name, number in ends.items()))
        return "\n".join(lines + ([self.faults] if self.faults else []))

    def __repr__(self) -> str:
        return self.summary()


def _in_one_line(answer: str | None, max_length: int = 80) -> str:
    line = "no answer" if answer is None else " ".join(answer.split())
    return line if len(line) <= max_length else f"{line[: max_length - 3]}..."
