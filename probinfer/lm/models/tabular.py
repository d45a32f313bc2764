r"""A language model that is a table: the oracle of tests, since its texts can be enumerated.

A finite automaton over tokens: state s gives the logits ``logits[s]`` of the next token v and goes to
``transitions[s, v]``. Every chain of finite order, every tree of bounded depth and every hidden position counter is of
this form. Like a transformer it has a cache, one state for each token, so that code that forks caches wrongly fails
here.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import shortened
from probinfer.core.types import Array, Float, Int, PRNGKey, Shaped, field, pytree

__all__ = ["Tabular"]


@pytree
class Tabular:
    """A language model with S states.

    Attributes:
        logits: (S, V) logits of the next token; minus infinity for tokens that cannot follow.
        transitions: (S, V) int32, the next state.
        start: () the state before the first token of the prompt.
        max_context: maximum number of tokens of prompt and continuation; static.

    Example:
        >>> import jax
        >>> from probinfer import lm
        >>> network = lm.Tabular.random(jax.random.key(0), vocab_size=4, order=2)
        >>> network.logits.shape
        (21, 4)
    """

    logits: Any
    transitions: Any
    start: Any
    max_context: int = field(static=True)

    def __init__(self, logits: Any, transitions: Any, start: Any = 0, max_context: int = 4096):
        logits, transitions = np.asarray(logits), np.asarray(transitions)
        if logits.ndim != 2 or logits.shape != transitions.shape:
            raise ValueError(
                f"logits and transitions must both be (states, vocabulary), got {logits.shape} and {transitions.shape}"
            )
        if not np.issubdtype(transitions.dtype, np.integer):
            raise TypeError(f"transitions must be integers, got {transitions.dtype}")
        inside = (transitions >= 0) & (transitions < len(logits))
        if not inside.all() or not 0 <= int(start) < len(logits):
            bad = f"{shortened(transitions[~inside])}, start {start}"
            raise ValueError(f"states are 0 ... {len(logits) - 1}; got {bad}")
        if np.isnan(logits).any() or np.isposinf(logits).any() or np.isneginf(logits).all(axis=1).any():
            raise ValueError(
                "logits must be finite or minus infinity, and each state needs a token that can follow"
            )
        object.__setattr__(self, "logits", jnp.asarray(logits, jnp.result_type(float)))
        object.__setattr__(self, "transitions", jnp.asarray(transitions, jnp.int32))
        object.__setattr__(self, "start", jnp.asarray(start, jnp.int32))
        object.__setattr__(self, "max_context", int(max_context))

    @classmethod
    def random(
        cls, key: PRNGKey, vocab_size: int, order: int = 1, scale: Any = 1.0, max_context: int = 4096
    ) -> Tabular:
        """Return a Markov chain of finite order with normal logits.

        Args:
            key: random key.
            vocab_size: V.
            order: number of last tokens that the distribution of the next token depends on.
            scale: standard deviation of the logits.
            max_context: see the class.
        """
        contexts = [c for length in range(order + 1) for c in product(range(vocab_size), repeat=length)]
        index = {c: i for i, c in enumerate(contexts)}
        following = [[index[(*c, v)[-order:] if order else ()] for v in range(vocab_size)] for c in contexts]
        logits = scale * jax.random.normal(key, (len(contexts), vocab_size))
        return cls(np.asarray(logits), np.asarray(following), 0, max_context)

    def __repr__(self) -> str:
        shape = np.shape(self.logits)
        return f"Tabular({shape[0]} states, {shape[1]} tokens)" if len(shape) == 2 else "Tabular(...)"

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.logits.shape[1]

    def prefill(self, tokens: Int[Array, " s"], length: Int[Array, ""]) -> tuple[Array, Array]:
        """Run the automaton over the prompt; the particles share its last state."""

        def read(state: Array, xs: tuple) -> tuple[Array, None]:
            token, position = xs
            return jnp.where(position < length, self.transitions[state, token], state), None

        state, _ = jax.lax.scan(read, self.start, (tokens, jnp.arange(tokens.shape[0])))
        return state[None], state

    def init_cache(self, num: int, max_len: int) -> Int[Array, "n t"]:
        """Return room for the states after each private token."""
        return jnp.zeros((num, max_len), jnp.int32)

    def extend(
        self,
        prompt: Int[Array, ""],
        cache: Int[Array, "n t"],
        tokens: Int[Array, "n s"],
        start: Int[Array, " n"],
    ) -> tuple[Int[Array, "n s 1"], Int[Array, "n t"]]:
        """Follow the tokens from the state before position ``start``."""
        rows = jnp.arange(tokens.shape[0])
        before = cache[rows, jnp.maximum(start - 1, 0)]
        state = jnp.where(start > 0, before, prompt)

        def follow(state: Array, token: Array) -> tuple[Array, Array]:
            state = self.transitions[state, token]
            return state, state

        _, states = jax.lax.scan(follow, state, tokens.T)
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        return states.T[..., None], cache.at[rows[:, None], positions].set(states.T, mode="drop")

    def head(self, hidden: Int[Array, "*batch 1"]) -> Float[Array, "*batch v"]:
        """Return the logits of the states."""
        return self.logits[hidden[..., 0]]

    def gather(self, cache: Shaped[Array, "n t"], ancestors: Int[Array, " m"]) -> Shaped[Array, "m t"]:
        """Copy the rows of the ancestors."""
        return cache[ancestors]

    def cache_bytes(self, num: int, max_len: int) -> int:
        """Return four bytes for each token."""
        return 4 * num * max_len

    def prompt_bytes(self, length: int) -> int:
        """Return the four bytes of one state."""
        return 4
