"""The texts of N particles: tokens, their caches, and why they ended."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax.numpy as jnp

from probinfer.core.types import Array, Int

__all__ = ["End", "Record", "Rules", "Text", "append", "fork", "start", "stop_hit"]


class End(enum.IntEnum):
    """Why a text ended."""

    RUNNING = 0
    FINISHED = 1  # the end token, or a stop string
    MAX_TOKENS = 2
    MAX_STEPS = 3
    DEAD = 4  # no token may follow: weight zero


class Record(NamedTuple):
    """What one step adds to a path: tokens (N, K), and how many of them count (N,)."""

    tokens: Array
    length: Array


class Text(NamedTuple):
    """N texts.

    Attributes:
        cache: of the network.
        logits: (N, V) of the next token.
        tokens: (N, M).
        length: (N,).
        ended: (N,) an ``End``.
        stop: (N,) state of the automaton of the stop strings.
    """

    cache: Any
    logits: Array
    tokens: Array
    length: Array
    ended: Array
    stop: Array


class Rules(NamedTuple):
    """Where steps and texts end.

    Attributes:
        step: a ``steps.Rule``.
        stop: automaton of the stop strings, or None.
        eos: (E,) tokens that end a text; empty: none does.
    """

    step: Any
    stop: Any
    eos: Array


def start(network: Any, logits: Array, rules: Rules, num: int, max_tokens: int) -> Text:
    """N texts without tokens after a prompt whose next token has ``logits`` (V,)."""
    none = jnp.zeros(num, jnp.int32)
    stop = none if rules.stop is None else jnp.broadcast_to(rules.stop.start().astype(jnp.int32), (num,))
    return Text(
        network.init_cache(num, max_tokens),
        jnp.broadcast_to(logits, (num, *logits.shape)),
        jnp.zeros((num, max_tokens), jnp.int32),
        none,
        none,
        stop,
    )


def fork(network: Any, text: Text, ancestors: Int[Array, " m"]) -> Text:
    """Row j of the result is row ``ancestors[j]``."""
    rest = (leaf[ancestors] for leaf in text[1:])
    return Text(network.gather(text.cache, ancestors), *rest)


def stop_hit(rules: Rules, text: Text, token: Array, active: Array) -> tuple[Array, Array]:
    """State of the stop automaton after one token, and whether the text ends with it."""
    ends = jnp.any(token[:, None] == rules.eos, axis=1)
    if rules.stop is None:
        return text.stop, ends & active
    state = jnp.where(active, rules.stop.step(text.stop, token).astype(jnp.int32), text.stop)
    return state, (ends | rules.stop.hit(state)) & active


def append(text: Text, token: Array, active: Array) -> tuple[Array, Array]:
    """Tokens and lengths after one more token where ``active``."""
    rows, size = jnp.arange(token.shape[0]), text.tokens.shape[1]
    place = jnp.where(active, text.length, size)
    return text.tokens.at[rows, place].set(token, mode="drop"), text.length + active
