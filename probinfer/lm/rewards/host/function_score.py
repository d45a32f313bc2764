"""A Python function as a score: called on the host in worker processes, so that its faults do not stop the run.

The compiled program passes tokens by ``jax.pure_callback``, for all prompts and particles at once; texts are decoded,
equal texts are scored once, and earlier replies are cached. If a call raises, hangs, dies or returns something other
than a valid number, its particle gets the score of probability zero, the run goes on, and ``faults`` counts it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from threading import Lock
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import import_extra, shortened
from probinfer.core.types import Array, ArrayTree, field, pytree
from probinfer.lm.models.base import Context
from probinfer.lm.rewards.base import View
from probinfer.lm.rewards.host import registry
from probinfer.lm.rewards.host.batching import flatten_leading_axes
from probinfer.lm.rewards.host.worker import call_function
from probinfer.lm.rewards.host.workers import Pool, Reply
from probinfer.lm.rewards.meanings import Score
from probinfer.lm.tokens.texts import continuation

__all__ = ["Faults", "HostScore", "check_settings"]

_SCALES = ("probability", "logit", "log")
_TAKES = ("text", "steps")
_SETTINGS: dict[str, Any] = {  # names to choose from, or the minimum
    "takes": _TAKES,
    "scale": _SCALES,
    "timeout": 0,
    "workers": 0,
    "memory": 0,
    "max_steps": 1,
}


class Faults(NamedTuple):
    """The faults so far.

    Attributes:
        counts: number of particles that lost their weight, by kind of fault: "exception", "time-out", "crash", "not
            loaded", "not a number", "NaN", "out of range".
        first: traceback of the first fault, or what happened; "" if there was none.
        num_scored: number of particles that were scored.
        num_calls: number of calls of the function; equal and cached texts need none.
    """

    counts: dict[str, int]
    first: str
    num_scored: int
    num_calls: int

    def __str__(self) -> str:
        """A report; if every score was lost, the cause comes first."""
        if not self.counts:
            return f"no faults in {self.num_scored} scores ({self.num_calls} calls)"
        kinds = ", ".join(f"{number} by {kind}" for kind, number in self.counts.items())
        lost = sum(self.counts.values())
        cause = self.first.strip().rpartition("\n")[2]
        prefix = f"{cause}: " if lost == self.num_scored else ""
        return f"{prefix}{lost} of {self.num_scored} scores lost: {kinds}; the first:\n{self.first}"


@pytree
class HostScore(registry.HostBacked, Score):
    """The score ``fn(prompt, text)`` of a Python function.

    The function runs in worker processes: fresh interpreters, to which it is sent by value (functions of notebooks and
    scripts) or by name (functions of modules, which the worker imports). What it prints appears on standard error. The
    first call of each worker waits for its start, which does not count towards the time limit.

    Args:
        fn: ``fn(prompt, text) -> number``, or ``fn(prompt, [step, ...]) -> number`` with ``takes="steps"``. It gets
            strings, never arrays; ``text`` is all that was generated, without the prompt and without special tokens.
        tokenizer: decodes the tokens.
        takes: "text" or "steps".
        scale: what the number is: a "probability" between 0 and 1, a "logit", or the "log" of a potential.
        timeout: seconds that a call may take; None: no limit.
        workers: number of processes; None: one for each core, at most 4; 0: call in this process, without a time limit
            and without protection from crashes.
        memory: number of replies that are cached.
        max_steps: with ``takes="steps"``, steps beyond this number are joined to the last one.

    Raises:
        TypeError: ``fn`` cannot be called, or cannot be sent to another process.
        ValueError: a setting is out of range.
    """

    number: Any
    attached: Any = field(static=True)
    scale: str = field(static=True)
    max_steps: int = field(static=True)

    def __init__(
        self,
        fn: Any,
        tokenizer: Any,
        *,
        takes: str = "text",
        scale: str = "probability",
        timeout: Any = 30.0,
        workers: int | None = None,
        memory: int = 65536,
        max_steps: int = 256,
    ):
        if not callable(fn):
            raise TypeError(f"a host score needs a function of (prompt, text), got {shortened(fn)}")
        check_settings(
            takes=takes, scale=scale, timeout=timeout, workers=workers, memory=memory, max_steps=max_steps
        )
        workers = min(_num_cores(), 4) if workers is None else workers
        pool = Pool(_pickled(fn), workers, None if timeout is None else float(timeout)) if workers else None
        host = _FunctionHost(fn, pool, tokenizer, scale, memory)
        object.__setattr__(self, "number", registry.register(host))
        object.__setattr__(self, "attached", host)
        object.__setattr__(self, "scale", "log" if scale == "log" else "logit")
        object.__setattr__(self, "max_steps", max_steps if takes == "steps" else 0)

    @property
    def source(self) -> str:
        """The name of the function."""
        name = getattr(self.host.fn, "__name__", type(self.host.fn).__name__)
        return "a function without name" if name == "<lambda>" else f"the function {name}"

    @property
    def faults(self) -> Faults:
        """The faults since the start, or since ``reset``."""
        return self.host.faults()

    def reset(self) -> None:
        """Count faults from zero again; cached replies remain."""
        self.host.reset()

    def close(self) -> None:
        """End the worker processes; this also happens when the score is garbage-collected and when Python ends."""
        if self.host.pool is not None:
            self.host.pool.close()

    def init(self, context: Context, num: int) -> ArrayTree:
        """Return the ends of steps, (num, max_steps), and their number (num,); nothing if whole texts are scored."""
        if not self.max_steps:
            return ()
        return jnp.zeros((num, self.max_steps), jnp.int32), jnp.zeros(num, jnp.int32)

    def step(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """Call the host for the scores of the active particles; those of the others are zero."""
        if self.max_steps:
            state = _append_ends(state, view.length, view.active)
        arguments = (*view.context, view.tokens, view.length, view.active, *state)
        shape = jax.ShapeDtypeStruct(view.length.shape, view.step_log_prob.dtype)
        return state, registry.call_host("scores", shape, self.number, *arguments)


def _append_ends(state: ArrayTree, length: Array, active: Array) -> tuple[Array, Array]:
    """Store that a step of the active particles has ended at ``length``; at the limit, overwrite the last end."""
    ends, count = state
    rows, max_steps = jnp.arange(ends.shape[0]), ends.shape[1]
    column = jnp.where(active, jnp.minimum(count, max_steps - 1), max_steps)
    ends = ends.at[rows, column].set(length, mode="drop")
    return ends, jnp.where(active, jnp.minimum(count + 1, max_steps), count)


class _FunctionHost:
    """What a score holds on the host: the function, its workers, cached replies, and the counts of faults."""

    def __init__(self, fn: Callable[..., Any], pool: Pool | None, tokenizer: Any, scale: str, memory: int):
        self.fn, self.pool, self.tokenizer, self.scale = fn, pool, tokenizer, scale
        self._memory = memory
        self._cache: OrderedDict[bytes, Reply] = OrderedDict()
        self._lock = Lock()
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self._counts: Counter[str] = Counter()
        self._first, self._num_scored, self._num_calls = "", 0, 0

    def faults(self) -> Faults:
        """Return the counts so far."""
        return Faults(dict(self._counts), self._first, self._num_scored, self._num_calls)

    def scores(self, *arguments: Any) -> np.ndarray:
        """Return scores (..., N) for the arguments of ``HostScore.step``, whose leading axes are those of ``vmap``."""
        lead, (prompts, sizes, tokens, lengths, active, *ends) = flatten_leading_axes(arguments, _RANKS)
        has_active = np.flatnonzero(active.any(axis=1))
        prompt_texts = {q: self.tokenizer.decode(prompts[q, : sizes[q]]) for q in has_active}
        calls = []
        for q, n in np.argwhere(active):
            row = tokens[q, n, : lengths[q, n]]
            text = self._steps(row, ends[0][q, n, : ends[1][q, n]]) if ends else self._text(row)
            calls.append((prompt_texts[q], text))
        with self._lock:
            replies = self._replies(calls)
        values = np.zeros(active.shape)
        values[active] = [-math.inf if reply.kind else reply.value for reply in replies]
        return values.reshape(*lead, active.shape[1])

    def _text(self, tokens: np.ndarray) -> str:
        return continuation(self.tokenizer, tokens)

    def _steps(self, tokens: np.ndarray, ends: np.ndarray) -> tuple[str, ...]:
        """Return the text of each step; joined, they are the text of all tokens (tokens may share a character)."""
        texts = ["", *(continuation(self.tokenizer, tokens[:end]) for end in ends)]
        return tuple(text[len(before) :] for before, text in pairwise(texts))

    def _replies(self, calls: Sequence[tuple]) -> list[Reply]:
        """Return the replies to all calls; equal calls are made once, and cached ones not at all."""
        keys = [_digest(arguments) for arguments in calls]
        new = {key: arguments for key, arguments in zip(keys, calls, strict=True) if key not in self._cache}
        arguments = [
            (prompt, list(text) if isinstance(text, tuple) else text) for prompt, text in new.values()
        ]
        if self.pool:
            raw = self.pool.map(arguments)
        else:
            raw = [Reply(*call_function(self.fn, each)) for each in arguments]
        computed = {key: _to_scale(reply, self.scale) for key, reply in zip(new, raw, strict=True)}
        replies = [computed[key] if key in computed else self._cache[key] for key in keys]
        self._store(keys, replies)
        self._count(replies, len(new))
        return replies

    def _store(self, keys: list[bytes], replies: list[Reply]) -> None:
        for key, reply in zip(keys, replies, strict=True):
            if reply.kind == "interrupted":
                continue
            self._cache[key] = reply
            self._cache.move_to_end(key)
        while len(self._cache) > self._memory:
            self._cache.popitem(last=False)

    def _count(self, replies: list[Reply], num_calls: int) -> None:
        self._num_scored += len(replies)
        self._num_calls += num_calls
        lost = [reply for reply in replies if reply.kind]
        self._counts.update(reply.kind for reply in lost)
        self._first = self._first or next((reply.message for reply in lost), "")


# axes of the arguments of ``scores``: prompts, their lengths, tokens, lengths, active; ends of steps, their number
_RANKS = (1, 0, 2, 1, 1, 2, 1)


def _digest(arguments: tuple) -> bytes:
    """Return a hash of a prompt and a text, so that the cache of replies takes little memory."""
    prompt, text = arguments
    parts = [prompt, *text] if isinstance(text, tuple) else [prompt, text]
    sizes = ",".join(str(len(part)) for part in parts)
    return hashlib.blake2b(
        "".join([sizes, ";", *parts]).encode(errors="surrogatepass"), digest_size=16
    ).digest()


def _to_scale(reply: Reply, scale: str) -> Reply:
    """Return the number on the scale of the score, or a fault if it is outside the range of the scale."""
    value = reply.value
    if reply.kind:
        return reply
    if scale == "probability":
        if not 0 <= value <= 1:
            message = f"the function returned {value:g}, and a probability lies between 0 and 1; see scale="
            return Reply("out of range", math.nan, message)
        logit = -math.inf if value == 0 else math.inf if value == 1 else math.log(value) - math.log1p(-value)
        return Reply("", logit, "")
    if scale == "log" and value == math.inf:
        return Reply("out of range", math.nan, "the function returned a log potential of plus infinity")
    return reply


def _pickled(fn: Any) -> bytes:
    """Return a function as bytes that another process can load."""
    try:
        return import_extra("cloudpickle", "lm").dumps(fn)
    except ImportError:
        raise
    except Exception as error:
        raise TypeError(
            f"{shortened(fn)} cannot be sent to a worker process ({type(error).__name__}: {error}); create the objects "
            "that it uses (locks, connections, models) inside the function, or use workers=0"
        ) from error


def _num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_settings(**settings: Any) -> None:
    """Refuse settings of a ``HostScore`` that are unknown or invalid.

    Raises:
        TypeError: an unknown name, or a value of the wrong kind.
        ValueError: a value out of range.
    """
    unknown = [name for name in settings if name not in _SETTINGS]
    if unknown:
        raise TypeError(
            f"a Python function as a reward has no setting {unknown[0]!r}: there are {', '.join(_SETTINGS)}"
        )
    for name, value in settings.items():
        _check(name, value)


def _check(name: str, value: Any) -> None:
    allowed = _SETTINGS[name]
    if isinstance(allowed, tuple):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    elif name == "timeout":
        if value is not None and (isinstance(value, (bool, str)) or not 0 < value < math.inf):
            raise ValueError(f"timeout must be positive seconds, or None for no limit; got {value!r}")
    elif value is None and name == "workers":
        return
    elif isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int of at least {allowed}, got {shortened(value)}")
    elif value < allowed:
        raise ValueError(f"{name} must be at least {allowed}, got {value}")
