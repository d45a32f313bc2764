"""Events: what a run reports after every step, for a live view or a log, or to end the run early."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from probinfer.lm.methods.base import WeightedTexts
from probinfer.lm.tokens.texts import continuation
from probinfer.smc.filtering.single_steps import StepSnapshot

__all__ = ["Event", "step_callback", "stream"]


@dataclasses.dataclass(frozen=True)
class Event:
    """N texts after a step (of particle Gibbs: after an iteration).

    Attributes:
        step: number of the step, from 0.
        texts: N texts so far.
        weights: (N,) normalized weights.
        log_scores: (N,) sum of the log potentials of each text so far.
        ended: (N,) an ``lm.End`` for each text.
        ancestors: (N,) index of the text that each text continues, or None.
        resampled: whether the step began with resampling.
        ess: effective sample size.
        log_evidence: estimate so far.
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


def step_callback(
    tokenizer: Any, watch: Callable[[Event], Any] | None, bar: Any, prompt: int = 0
) -> Callable[[Any], Any]:
    """Return the function that a method calls after each step: it moves the progress bar and calls ``watch``.

    Args:
        tokenizer: decodes the texts.
        watch: called with an ``Event``, or None.
        bar: a ``progress.Task``.
        prompt: index of the prompt.
    """

    def callback(snapshot: Any) -> Any:
        is_step = isinstance(snapshot, StepSnapshot)
        bar.update((snapshot.t if is_step else snapshot[0]) + 1)
        if watch is None:
            return False
        event = _event_of_step(tokenizer, snapshot) if is_step else _event_of_pass(tokenizer, *snapshot)
        return watch(dataclasses.replace(event, prompt=prompt))

    return callback


def _event_of_step(tokenizer: Any, snapshot: Any) -> Event:
    text = snapshot.particles.text
    return Event(
        step=snapshot.t,
        texts=_decode(tokenizer, text.tokens, text.length),
        weights=_normalize(snapshot.log_weights),
        log_scores=np.asarray(snapshot.particles.log_potential, float),
        ended=np.asarray(text.ended),
        ancestors=np.asarray(snapshot.ancestors),
        resampled=bool(snapshot.resampled),
        ess=float(snapshot.ess),
        log_evidence=float(snapshot.log_evidence),
    )


def _event_of_pass(tokenizer: Any, iteration: int, draws: WeightedTexts) -> Event:
    if draws.tokens.ndim == 3:  # several chains: the first one samples the target itself
        draws = jax.tree.map(lambda leaf: leaf[0], draws)
    return Event(
        step=iteration,
        texts=_decode(tokenizer, draws.tokens, draws.length),
        weights=_normalize(draws.log_weights),
        log_scores=np.asarray(draws.log_potential, float),
        ended=np.asarray(draws.ended),
        ancestors=None,
        resampled=True,
        ess=float(draws.ess[int(draws.num_steps) - 1]),
        log_evidence=float(draws.log_evidence),
    )


def _decode(tokenizer: Any, tokens: Any, length: Any) -> list[str]:
    pairs = zip(np.asarray(tokens), np.asarray(length), strict=True)
    return [continuation(tokenizer, row[:size]) for row, size in pairs]


def _normalize(log_weights: Any) -> np.ndarray:
    """Return weights (N,) that sum to one; equal ones if no log weight is finite."""
    log_weights = np.asarray(log_weights, float)
    largest = np.max(log_weights)
    if not np.isfinite(largest):
        return np.full(len(log_weights), 1 / len(log_weights))
    weights = np.exp(log_weights - largest)
    return weights / weights.sum()


def stream(run: Callable[..., Any], *args: Any, **settings: Any) -> Iterator[Any]:
    """Yield the events of ``run(..., watch=...)`` as they happen, and its result last.

    The run has a thread of its own; closing the iterator ends the run after its current step.

    Args:
        run: ``lm.infer``.
        *args: its arguments.
        **settings: its settings, without ``watch``.

    Raises:
        TypeError: ``watch`` is among the settings.
    """
    if "watch" in settings:
        raise TypeError("a stream yields what watch would see: use stream, or infer with watch, not both")
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
