r"""The genealogy of a run: its particles as a tree, its texts step by step, and how soon lineages coalesce.

The text so far of particle n after step t is that of its parent and one more step,
:math:`x_{1:t}^n = (x_{1:t-1}^{a_t^n}, x_t^n)`. Of particles without descendants at the end only the parents are stored;
their texts are known if the events of the run were collected.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from probinfer.core.errors import shortened
from probinfer.lm.generation.events import Event

__all__ = ["Genealogy", "genealogy"]


class Genealogy(NamedTuple):
    """The particles of T steps, N in each step.

    Attributes:
        parents: (T, N) index of the parent among the particles of the step before; 0 in the first step.
        rank: (T, N) vertical position 0 ... N - 1 at which the lines of a drawing do not cross.
        took: (T, N) whether the particle took this step; False if its text had ended before.
        weight: (T, N) share of the final weight that descends from the particle; 0 if it has no descendants.
        alive: (T, N) whether it has a descendant among the last particles.
        texts: (T, N) its text so far, None if that is not known.
        answers: N answers of the last particles, None for no answer.
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
        """(T,) number of particles of each step that have a descendant among the last ones."""
        return self.alive.sum(axis=1)

    def steps(self) -> np.ndarray:
        """(T, N) what each particle added to its parent's text; None if that is not known."""
        steps = np.full(self.texts.shape, None, object)
        for (t, n), text in np.ndenumerate(self.texts):
            before = "" if t == 0 else self.texts[t - 1, self.parents[t, n]]
            if text is not None and before is not None:
                steps[t, n] = text[len(before) :] if text.startswith(before) else text
        return steps

    def leaves(self, t: int) -> np.ndarray:
        """(N,) index of the particle of step t that each of the last ones descends from."""
        index = np.arange(self.parents.shape[1])
        for later in range(len(self.parents) - 1, t, -1):
            index = self.parents[later, index]
        return index


def genealogy(answers: Any, events: Sequence[Any] = ()) -> Genealogy:
    """Return the tree of the particles of ``lm.infer``; of particle Gibbs, that of its last pass.

    Args:
        answers: an ``lm.Answers`` of a method that stores its ancestors.
        events: events of the same run, from ``watch`` or ``lm.stream``: with them the texts of particles that died out
            are known too.

    Raises:
        TypeError: ``answers`` is not an ``lm.Answers``, or ``events`` are not events.
        ValueError: the method keeps no genealogy, or the events are of another run.
    """
    if not hasattr(answers, "ancestors"):
        raise TypeError(f"expected the lm.Answers of one prompt, got {shortened(answers)}")
    events = _as_events(events)
    if answers.ancestors is None or answers.step_lengths is None:
        raise ValueError(f"{shortened(answers.method)} keeps no genealogy: use lm.ParticleFilter or the like")
    num_steps = answers.num_steps
    parents, lengths = (np.asarray(a)[:num_steps] for a in (answers.ancestors, answers.step_lengths))
    parents = np.concatenate([np.zeros_like(parents[:1]), parents[1:]])
    num = parents.shape[1]
    weights = np.exp(np.asarray(answers.log_weights, float)[-num:])
    weights = weights / weights.sum()
    alive, weight = _descent(parents, weights)
    texts = _texts_of_survivors(answers, parents, lengths)
    if len(events):
        texts = _texts_of_events(events, parents.shape)
    extracted = list(answers.extracted[-num:])
    return Genealogy(
        parents=parents,
        rank=_ranks(parents, extracted),
        took=lengths > 0,
        weight=weight,
        alive=alive,
        texts=texts,
        answers=extracted,
    )


def _as_events(events: Any) -> list[Any]:
    events = list(events) if isinstance(events, Iterable) else [events]
    for event in events:
        if not isinstance(event, Event):
            raise TypeError(
                "events must be lm.Event objects from watch or from lm.stream (without its last item), got "
                f"{shortened(event)}"
            )
    return events


def _descent(parents: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each particle (T, N) has descendants at the end, and the final weight (T, N) of these."""
    alive, weight = np.zeros(parents.shape, bool), np.zeros(parents.shape)
    alive[-1], weight[-1] = True, weights
    for t in range(len(parents) - 1, 0, -1):
        alive[t - 1, parents[t][alive[t]]] = True
        np.add.at(weight[t - 1], parents[t], weight[t])
    return alive, weight


def _ranks(parents: np.ndarray, answers: list[str | None]) -> np.ndarray:
    """Order children (T, N) like their parents, and children of one parent by the answers of their descendants."""
    num_steps, num = parents.shape
    numbers = {answer: i for i, answer in enumerate(dict.fromkeys(answers))}
    index = np.arange(num)
    first_answer = np.full((num_steps, num), len(numbers))  # the first of the answers of the descendants
    first_answer[-1] = [numbers[answer] for answer in answers]
    for t in range(num_steps - 1, 0, -1):
        np.minimum.at(first_answer[t - 1], parents[t], first_answer[t])
    rank = np.zeros((num_steps, num), int)
    for t in range(num_steps):
        parent_rank = rank[t - 1, parents[t]] if t else np.zeros(num, int)
        order = np.lexsort((index, first_answer[t], parent_rank))
        rank[t, order] = index
    return rank


def _texts_of_survivors(answers: Any, parents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return prefixes (T, N) of the final texts, by the lengths of their steps."""
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
    """Return the indices (T,) of the ancestors of one of the last particles."""
    path = np.empty(len(parents), int)
    path[-1] = leaf
    for t in range(len(parents) - 1, 0, -1):
        path[t - 1] = parents[t, path[t]]
    return path


def _texts_of_events(events: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Return the texts (T, N) so far of all particles, from the events of their run."""
    rows = [event.texts for event in events if event.ancestors is not None]
    if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
        raise ValueError(
            f"the events are of another run: {len(rows)} steps, the answers have {shape[0]} of {shape[1]} particles"
        )
    texts = np.empty(shape, object)
    for t, row in enumerate(rows):
        texts[t] = row
    return texts
