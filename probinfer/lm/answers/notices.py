"""Warnings of a run that did not stop: answers that could not be read, rewards that failed, particles that died."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from probinfer.core.errors import ConvergenceWarning, advice, shortened
from probinfer.core.status import Status
from probinfer.lm.rewards.algebra import Potential, UnitPotential
from probinfer.lm.rewards.host.function_score import Faults, HostScore

__all__ = ["Reader", "allow_workers", "faults_of", "faults_since", "warn"]

_DIED = (
    "every particle died: no sampled text has a positive weight. The texts are those before the last step; use more "
    "particles or a softer reward (reward * 0.5), or look at the rewards of one text"
)
_BOUND = (
    ". A text that is cut by max_tokens or max_steps does not match a pattern, schema or grammar: raise these limits "
    "if no text can match within them"
)
_NON_FINITE_REWARD = (
    "a reward became NaN or plus infinity: the texts are those before that step; clip the reward"
)
_NON_FINITE_MODEL = (
    "the weights of the model, or what is computed from them, are NaN or infinite. Copy the checkpoint again, or load "
    "it with dtype=jnp.float32"
)


class Reader:
    """A function that reads answers; an exception in it costs one answer and not the run.

    Args:
        answer: text -> answer or None.
    """

    def __init__(self, answer: Callable[[str], Any]):
        self._answer = answer
        self._answers: dict[str, str | None] = {}
        self.failed: dict[str, str] = {}

    def __call__(self, text: str) -> str | None:
        """Return the answer of a text; None if the function fails."""
        if text not in self._answers:
            self._answers[text] = self._read(text)
        return self._answers[text]

    def _read(self, text: str) -> str | None:
        try:
            answer = self._answer(text)
        except Exception as error:
            self.failed[text] = f"{type(error).__name__}: {error}"
            return None
        if answer is None or isinstance(answer, str):
            return answer
        self.failed[text] = f"it returned {shortened(answer)}, and must return a string or None"
        return None


def _host_scores(potential: Potential) -> list[HostScore]:
    leaves = jax.tree.leaves(potential, is_leaf=lambda leaf: isinstance(leaf, HostScore))
    return [leaf for leaf in leaves if isinstance(leaf, HostScore)]


def faults_of(potential: Potential) -> list[Faults]:
    """Return the faults so far of the Python functions of a reward."""
    return [score.faults for score in _host_scores(potential)]


def allow_workers(run: bool, potential: Potential) -> None:
    """Let the Python functions of a reward run, or end their processes at once, even during a call.

    Args:
        run: which of the two.
        potential: the reward.
    """
    for score in _host_scores(potential):
        if score.host.pool is not None:
            score.host.pool.allow(run)


def faults_since(before: Sequence[Faults], potential: Potential) -> str:
    """Describe the faults since ``before``; "" if there was none.

    Args:
        before: return value of ``faults_of``.
        potential: the same reward.
    """
    pairs = zip(before, faults_of(potential), strict=True)
    return "\n".join(str(new) for new in (_difference(*pair) for pair in pairs) if new.counts)


def _difference(old: Faults, new: Faults) -> Faults:
    counts = {kind: number - old.counts.get(kind, 0) for kind, number in new.counts.items()}
    first = f"(of an earlier run) {new.first}" if old.counts else new.first
    lost = {kind: number for kind, number in counts.items() if number > 0}
    return Faults(lost, first, new.num_scored - old.num_scored, new.num_calls - old.num_calls)


def warn(results: Sequence[Any], potential: Potential, reader: Reader) -> None:
    """Warn once for each kind of problem, and name the prompts.

    Args:
        results: ``Answers`` of all prompts.
        potential: the reward.
        reader: the function that has read the answers.
    """
    scope = " (all prompts together)" if len(results) > 1 else ""
    faults = f"rewards failed{scope}: {results[0].faults}" if results[0].faults else ""
    messages = []
    for status in sorted({result.status for result in results} - {Status.OK}):
        prompts = [i for i, result in enumerate(results) if result.status == status]
        # particles that died of the faults: one cause, one warning
        cause = f"{faults}\n" if faults and status == Status.DEGENERATE_WEIGHTS else ""
        faults = "" if cause else faults
        messages.append(cause + _prompt_names(prompts, len(results)) + _status_message(status, potential))
    messages = [*([faults] if faults else []), *messages]
    messages += _unread(results, reader)
    for message in messages:
        warnings.warn(message, ConvergenceWarning, stacklevel=3)


def _prompt_names(prompts: list[int], num: int, max_names: int = 12) -> str:
    """Return ``"prompts 1, 3 of 5 (counted from 0): "``; nothing if there is one prompt."""
    if num == 1:
        return ""
    more = f" and {len(prompts) - max_names} more" if len(prompts) > max_names else ""
    listed = ", ".join(map(str, prompts[:max_names]))
    return f"prompt{'s' if len(prompts) > 1 else ''} {listed}{more} of {num} (counted from 0): "


def _status_message(status: Status, potential: Potential) -> str:
    if status == Status.DEGENERATE_WEIGHTS:
        return _DIED + (_BOUND if potential.per_token else "")
    if status != Status.NON_FINITE:
        return advice(status)
    if isinstance(potential, UnitPotential):
        return _NON_FINITE_MODEL
    return f"{_NON_FINITE_REWARD}. If the reward is finite, {_NON_FINITE_MODEL}"


def _unread(results: Sequence[Any], reader: Reader) -> list[str]:
    texts = [text for result in results for text in result.texts]
    failed = [text for text in texts if text in reader.failed]
    if not failed:
        return []
    return [
        f"the answer function failed for {len(failed)} of {len(texts)} texts, which count as texts without an answer; "
        f"the first: {reader.failed[failed[0]]}"
    ]
