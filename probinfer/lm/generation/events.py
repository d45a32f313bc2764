"""Steps as they happen: an event after each, for a live view, a log, or to end a run early."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from probinfer.lm.methods.base import Draws
from probinfer.lm.tokens.texts import continuation
from probinfer.smc.filtering.single_steps import StepSnapshot

__all__ = ["Event", "make_step_callback", "stream"]


@dataclasses.dataclass(frozen=True)
class Event:
    """N texts after a step (of particle Gibbs: after an iteration).

    Attributes:
        step: its number, from 0.
        texts: N, whole.
        weights: (N,) normalised.
        log_scores: (N,) log factors of the texts so far.
        ended: (N,) an ``lm.End`` each.
        ancestors: (N,) whose continuation each text is, or None.
        resampled: whether the step began with resampling.
        ess: effective sample size.
        log_evidence: so far.
        prompt: index of the prompt in a list of prompts, else 0.
    """

    step: int
    texts: list[str]
    weights: np.ndarray
    log_scores: np.ndarray
    ended: np.ndarray
    ancestors: np.ndarray | None
    resampled: bool
    ess: float
    log_evidence: float
    prompt: int = 0


def make_step_callback(
    tokenizer: Any, watch: Callable[[Event], Any] | None, line: Any, prompt: int = 0
) -> Callable[[Any], Any]:
    """What a method calls after each step: moves the bar, and tells ``watch``.

    Args:
        tokenizer: decodes.
        watch: called with an ``Event``, or None.
        line: a ``progress.Task``.
        prompt: its index.
    """

    def step_callback(snapshot: Any) -> Any:
        step = snapshot.t if isinstance(snapshot, StepSnapshot) else snapshot[0]
        line.update(step + 1)
        if watch is None:
            return False
        if isinstance(snapshot, StepSnapshot):
            event = _of_step(tokenizer, snapshot)
        else:
            event = _of_draws(tokenizer, *snapshot)
        return watch(dataclasses.replace(event, prompt=prompt))

    return step_callback


def _of_step(tokenizer: Any, snapshot: StepSnapshot) -> Event:
    text = snapshot.particles.text
    return Event(
        step=snapshot.t,
        texts=_decoded(tokenizer, text.tokens, text.length),
        weights=_weights(snapshot.log_weights),
        log_scores=np.asarray(snapshot.particles.log_potential, float),
        ended=np.asarray(text.ended),
        ancestors=np.asarray(snapshot.ancestors),
        resampled=bool(snapshot.resampled),
        ess=float(snapshot.ess),
        log_evidence=float(snapshot.log_evidence),
    )


def _of_draws(tokenizer: Any, iteration: int, draws: Draws) -> Event:
    if draws.tokens.ndim == 3:  # the first of several chains
        draws = jax.tree.map(lambda leaf: leaf[0], draws)
    return Event(
        step=iteration,
        texts=_decoded(tokenizer, draws.tokens, draws.length),
        weights=_weights(draws.log_weights),
        log_scores=np.asarray(draws.log_potential, float),
        ended=np.asarray(draws.ended),
        ancestors=None,
        resampled=True,
        ess=float(draws.ess[int(draws.num_steps) - 1]),
        log_evidence=float(draws.log_evidence),
    )


def _decoded(tokenizer: Any, tokens: Any, length: Any) -> list[str]:
    pairs = zip(np.asarray(tokens), np.asarray(length), strict=True)
    return [continuation(tokenizer, row[:size]) for row, size in pairs]


def _weights(log_weights: Any) -> np.ndarray:
    log_weights = np.asarray(log_weights, float)
    largest = np.max(log_weights)
    if not np.isfinite(largest):
        return np.full(len(log_weights), 1 / len(log_weights))
    weights = np.exp(log_weights - largest)
    return weights / weights.sum()


def stream(run: Callable[..., Any], *args: Any, **settings: Any) -> Iterator[Any]:
    """Yield the events of ``run(..., watch=...)`` as they happen, and its result last.

    The run goes on in a thread of its own; closing the iterator ends it after the step that it is at.

    Args:
        run: ``lm.infer``.
        *args: its arguments.
        **settings: its settings, without ``watch``.
    """
    if "watch" in settings:
        raise TypeError("a stream yields what watch would see: pass one or the other")
    events: queue.Queue = queue.Queue()
    closed = threading.Event()

    def watch(event: Event) -> bool:
        events.put(("event", event))
        return closed.is_set()

    def work() -> None:
        try:
            events.put(("result", run(*args, **settings, watch=watch)))
        except BaseException as error:
            events.put(("error", error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = events.get()
            if kind == "error":
                raise value
            yield value
            if kind == "result":
                return
    finally:
        closed.set()
