"""What went wrong in a run that went on: answers that could not be read, rewards that failed, particles that died."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from probinfer.core.errors import ConvergenceWarning, advice, shortened
from probinfer.core.status import Status
from probinfer.lm.rewards.algebra import Nothing, Potential
from probinfer.lm.rewards.host.function_score import Faults, HostScore

__all__ = ["Reader", "faults_of", "faults_since", "let_workers", "warn"]

_DIED = (
    "every particle died: no text that was tried has a positive weight. The texts are those before the last step; use "
    "more particles, a softer reward (reward * 0.5), or look at one text's rewards"
)
_BOUND = (
    ". A text that max_tokens or max_steps cuts does not match a pattern, schema or grammar: raise them if none can "
    "match within"
)
_BROKEN = "a reward became NaN or plus infinity: the texts are those before that step; clip the reward"
_DAMAGED = (
    "the model's weights are suspect: they or what they compute is NaN or infinite. Copy the checkpoint again, or load "
    "it with dtype=jnp.float32"
)


class Reader:
    """A function that reads answers, whose faults cost one answer and not the run.

    Args:
        answer: text -> answer or None.
    """

    def __init__(self, answer: Callable[[str], Any]):
        self._answer = answer
        self._known: dict[str, str | None] = {}
        self.failed: dict[str, str] = {}

    def __call__(self, text: str) -> str | None:
        """The answer of a text; None where the function fails."""
        if text not in self._known:
            self._known[text] = self._read(text)
        return self._known[text]

    def _read(self, text: str) -> str | None:
        try:
            found = self._answer(text)
        except Exception as error:
            self.failed[text] = f"{type(error).__name__}: {error}"
            return None
        if found is None or isinstance(found, str):
            return found
        self.failed[text] = f"it returned {shortened(found)}, and must return a string or None"
        return None


def faults_of(potential: Potential) -> list[Faults]:
    """What went wrong so far in the Python functions of a reward."""
    leaves = jax.tree.leaves(potential, is_leaf=lambda leaf: isinstance(leaf, HostScore))
    return [leaf.faults for leaf in leaves if isinstance(leaf, HostScore)]


def let_workers(run: bool, potential: Potential) -> None:
    """Let the Python functions of a reward run, or end their processes at once, even in a call.

    Args:
        run: which of the two.
        potential: the reward.
    """
    for leaf in jax.tree.leaves(potential, is_leaf=lambda leaf: isinstance(leaf, HostScore)):
        if isinstance(leaf, HostScore) and leaf.host.pool is not None:
            leaf.host.pool.let(run)


def faults_since(before: Sequence[Faults], potential: Potential) -> str:
    """What went wrong since ``before``, in words; "" if nothing.

    Args:
        before: of ``faults_of``.
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
    """Warn once for each kind of trouble, and name the prompts.

    Args:
        results: ``Answers`` of all prompts.
        potential: the reward.
        reader: has read the answers.
    """
    whole = " (all prompts together)" if len(results) > 1 else ""
    faults = f"rewards failed{whole}: {results[0].faults}" if results[0].faults else ""
    messages = []
    for status in sorted({result.status for result in results} - {Status.OK}):
        which = [i for i, result in enumerate(results) if result.status == status]
        cause = (
            f"{faults}\n" if faults and status == Status.DEGENERATE_WEIGHTS else ""
        )  # one cause, one warning
        faults = "" if cause else faults
        messages.append(cause + _named(which, len(results)) + _words(status, potential))
    messages = [*([faults] if faults else []), *messages]
    messages += _unread(results, reader)
    for message in messages:
        warnings.warn(message, ConvergenceWarning, stacklevel=3)


def _named(which: list[int], num: int, most: int = 12) -> str:
    """``"prompts 1, 3 of 5 (counted from 0): "``; nothing where there is one prompt."""
    if num == 1:
        return ""
    more = f" and {len(which) - most} more" if len(which) > most else ""
    listed = ", ".join(map(str, which[:most]))
    return f"prompt{'s' if len(which) > 1 else ''} {listed}{more} of {num} (counted from 0): "


def _words(status: Status, potential: Potential) -> str:
    if status == Status.DEGENERATE_WEIGHTS:
        return _DIED + (_BOUND if potential.per_token else "")
    if status != Status.NON_FINITE:
        return advice(status)
    return _DAMAGED if isinstance(potential, Nothing) else f"{_BROKEN}. If the reward is finite, {_DAMAGED}"


def _unread(results: Sequence[Any], reader: Reader) -> list[str]:
    texts = [text for result in results for text in result.texts]
    failed = [text for text in texts if text in reader.failed]
    if not failed:
        return []
    return [
        f"the answer function failed for {len(failed)} of {len(texts)} texts, which count as texts without an answer; "
        f"the first: {reader.failed[failed[0]]}"
    ]
