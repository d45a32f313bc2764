r"""Who descends from whom: the particles of a run as a tree, its texts step by step, and how soon lines meet.

The text so far of particle n after step t is that of its parent and one more step,
:math:`x_{1:t}^n = (x_{1:t-1}^{a_t^n}, x_t^n)`. Of particles without descendants at the end only the parents are kept;
their texts are known where the events of the run were collected.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from probinfer.core.errors import shortened
from probinfer.lm.generation.events import Event

__all__ = ["Genealogy", "genealogy"]


class Genealogy(NamedTuple):
    """The particles of T steps, N a step.

    Attributes:
        parents: (T, N) particles of the step before; those of the first step are 0.
        rank: (T, N) places 0 ... N - 1, at which the lines of a drawing do not cross.
        took: (T, N) whether the particle took a step, or had ended before.
        weight: (T, N) share of the final weight that descends from the particle; 0 if nothing does.
        alive: (T, N) whether it has a descendant among the last particles.
        texts: (T, N) its text so far, None where that is not known.
        answers: (N,) of the last particles, None for no answer.
    """

    parents: np.ndarray
    rank: np.ndarray
    took: np.ndarray
    weight: np.ndarray
    alive: np.ndarray
    texts: np.ndarray
    answers: list[str | None]

    @property
    def coalescence(self) -> np.ndarray:
        """(T,) how many particles of each step have a descendant among the last ones."""
        return self.alive.sum(axis=1)

    def steps(self) -> np.ndarray:
        """(T, N) what each particle added to its parent's text; None where that is not known."""
        found = np.full(self.texts.shape, None, object)
        for (t, n), text in np.ndenumerate(self.texts):
            before = "" if t == 0 else self.texts[t - 1, self.parents[t, n]]
            if text is not None and before is not None:
                found[t, n] = text[len(before) :] if text.startswith(before) else text
        return found

    def leaves(self, t: int) -> np.ndarray:
        """(N,) the particle of step t that each of the last ones descends from."""
        index = np.arange(self.parents.shape[1])
        for later in range(len(self.parents) - 1, t, -1):
            index = self.parents[later, index]
        return index


def genealogy(answers: Any, events: Sequence[Any] = ()) -> Genealogy:
    """The tree of the particles of ``lm.infer``; of particle Gibbs, that of its last pass.

    Args:
        answers: an ``lm.Answers`` of a method that moves particles.
        events: those of the same run, by ``watch`` or ``lm.stream``: with them the texts of particles that died out
            are known too.

    Raises:
        TypeError: no ``lm.Answers``, or no events.
        ValueError: the method keeps no genealogy, or the events are of another run.
    """
    if not hasattr(answers, "ancestors"):
        raise TypeError(f"expected the lm.Answers of one prompt, got {shortened(answers)}")
    events = _checked(events)
    if answers.ancestors is None or answers.step_lengths is None:
        raise ValueError(f"{shortened(answers.method)} keeps no genealogy: use lm.ParticleFilter or the like")
    steps = answers.num_steps
    parents, lengths = (np.asarray(a)[:steps] for a in (answers.ancestors, answers.step_lengths))
    parents = np.concatenate([np.zeros_like(parents[:1]), parents[1:]])
    num = parents.shape[1]
    weights = np.exp(np.asarray(answers.log_weights, float)[-num:])
    weights = weights / weights.sum()
    alive, weight = _descent(parents, weights)
    texts = _texts_of_survivors(answers, parents, lengths)
    if len(events):
        texts = _texts_of_events(events, parents.shape)
    extracted = list(answers.extracted[-num:])
    return Genealogy(parents, _ranks(parents, alive, extracted), lengths > 0, weight, alive, texts, extracted)


def _checked(events: Any) -> list[Any]:
    """A list of events."""
    listed = list(events) if isinstance(events, Iterable) else [events]
    for event in listed:
        if not isinstance(event, Event):
            raise TypeError(
                f"events are lm.Event of watch or of lm.stream (without its last item), got {shortened(event)}"
            )
    return listed


def _descent(parents: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who has descendants, and their weight."""
    alive, weight = np.zeros(parents.shape, bool), np.zeros(parents.shape)
    alive[-1], weight[-1] = True, weights
    for t in range(len(parents) - 1, 0, -1):
        alive[t - 1, parents[t][alive[t]]] = True
        np.add.at(weight[t - 1], parents[t], weight[t])
    return alive, weight


def _ranks(parents: np.ndarray, alive: np.ndarray, answers: list[str | None]) -> np.ndarray:
    """Children stand in the order of their parents; lines with one answer stand together where they may."""
    num_steps, num = parents.shape
    names = {answer: i for i, answer in enumerate(dict.fromkeys(answers))}
    at = np.arange(num)
    first = np.full((num_steps, num), len(names))  # the first of the answers of the descendants
    first[-1] = [names[answer] for answer in answers]
    for t in range(num_steps - 1, 0, -1):
        np.minimum.at(first[t - 1], parents[t], first[t])
    rank = np.zeros((num_steps, num), int)
    for t in range(num_steps):
        above = rank[t - 1, parents[t]] if t else np.zeros(num, int)
        order = np.lexsort((at, first[t], above))
        rank[t, order] = at
    return rank


def _texts_of_survivors(answers: Any, parents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Prefixes of the final texts, by the lengths of their steps."""
    num_steps, num = parents.shape
    texts = np.full((num_steps, num), None, object)
    tokens, decode = answers.tokens[-num:], answers.decode
    for leaf in range(num):
        path = _path(parents, leaf)
        ends = np.cumsum(lengths[np.arange(num_steps), path])
        if ends[-1] != len(tokens[leaf]):
            raise ValueError(f"{shortened(answers.method)} keeps no genealogy: its texts have other parents")
        for t in range(num_steps):
            if texts[t, path[t]] is None and decode is not None:
                texts[t, path[t]] = decode(tokens[leaf][: ends[t]])
    return texts


def _path(parents: np.ndarray, leaf: int) -> np.ndarray:
    """The particles (T,) on the way to one of the last ones."""
    path = np.empty(len(parents), int)
    path[-1] = leaf
    for t in range(len(parents) - 1, 0, -1):
        path[t - 1] = parents[t, path[t]]
    return path


def _texts_of_events(events: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Every text so far."""
    rows = [event.texts for event in events if event.ancestors is not None]
    if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
        raise ValueError(
            f"the events are of another run: {len(rows)} steps, the answers have {shape[0]} of {shape[1]} particles"
        )
    texts = np.empty(shape, object)
    for t, row in enumerate(rows):
        texts[t] = row
    return texts
