"""The texts of N particles: tokens, their caches, and why they ended."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax.numpy as jnp

from probinfer.core.types import Array, ArrayTree, Float, Int

__all__ = ["End", "Record", "Rules", "TextState", "advance_stop", "append_token", "fork", "init_texts"]


class End(enum.IntEnum):
    """Why a text ended."""

    RUNNING = 0
    FINISHED = 1  # the end token, or a stop string
    MAX_TOKENS = 2
    MAX_STEPS = 3
    DEAD = 4  # no token may follow: weight zero


class Record(NamedTuple):
    """What one step adds to the path of each particle.

    Attributes:
        tokens: (N, K) tokens of the step, padded on the right.
        length: (N,) number of tokens that count.
    """

    tokens: Int[Array, "*N K"]
    length: Int[Array, "*N"]


class TextState(NamedTuple):
    """N texts, of at most M tokens each.

    Attributes:
        cache: private suffixes of the network.
        logits: (N, V) logits of the next token.
        tokens: (N, M) tokens so far, padded on the right.
        length: (N,) number of tokens so far.
        ended: (N,) an ``End`` for each text.
        stop: (N,) state of the automaton of the stop strings.
    """

    cache: ArrayTree
    logits: Float[Array, "N V"]
    tokens: Int[Array, "N M"]
    length: Int[Array, " N"]
    ended: Int[Array, " N"]
    stop: Int[Array, " N"]


class Rules(NamedTuple):
    """Where steps and texts end.

    Attributes:
        step: a ``StepDetector``.
        stop: automaton of the stop strings, or None.
        eos: (E,) tokens that end a text; empty if there is no such token.
    """

    step: Any
    stop: Any
    eos: Int[Array, " E"]


def init_texts(network: Any, logits: Array, rules: Rules, num: int, max_tokens: int) -> TextState:
    """Return N texts without tokens, after a prompt whose next token has ``logits`` (V,)."""
    zeros = jnp.zeros(num, jnp.int32)
    stop = zeros if rules.stop is None else jnp.broadcast_to(rules.stop.start().astype(jnp.int32), (num,))
    return TextState(
        cache=network.init_cache(num, max_tokens),
        logits=jnp.broadcast_to(logits, (num, *logits.shape)),
        tokens=jnp.zeros((num, max_tokens), jnp.int32),
        length=zeros,
        ended=zeros,
        stop=stop,
    )


def fork(network: Any, text: TextState, ancestors: Int[Array, " m"]) -> TextState:
    """Row j of the result is row ``ancestors[j]``."""
    rows = {name: leaf[ancestors] for name, leaf in text._asdict().items() if name != "cache"}
    return TextState(cache=network.gather(text.cache, ancestors), **rows)


def advance_stop(rules: Rules, text: TextState, token: Array, active: Array) -> tuple[Array, Array]:
    """Return the state of the stop automaton after one token, and whether the text ends with this token."""
    ends = jnp.any(token[:, None] == rules.eos, axis=1)
    if rules.stop is None:
        return text.stop, ends & active
    state = jnp.where(active, rules.stop.step(text.stop, token).astype(jnp.int32), text.stop)
    return state, (ends | rules.stop.hit(state)) & active


def append_token(tokens: Array, length: Array, token: Array, active: Array) -> tuple[Array, Array]:
    """Write one more token (N,) behind each active row, and return tokens (N, M) and lengths (N,).

    A row that is not active gets a column outside the array, and ``mode="drop"`` discards what is written there.
    """
    rows, size = jnp.arange(token.shape[0]), tokens.shape[1]
    column = jnp.where(active, length, size)
    return tokens.at[rows, column].set(token, mode="drop"), length + active
