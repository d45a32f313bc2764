r"""Delimiters in the text of tokens: does one of the strings end inside the bytes read so far?

A delimiter such as an empty line is rarely one token: many tokens contain it, and it may begin in one token and end in
the next. Aho and Corasick's automaton over *bytes* knows after each byte the longest prefix of a delimiter that ends
there; running every token through it from every state gives one table (states, V), and following a delimiter costs one
look-up a token, inside jit.

References:
    Aho and Corasick (1975), Efficient string matching: an aid to bibliographic search.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import shortened
from probinfer.core.types import Array, Bool, Int, pytree

__all__ = ["Automaton", "build"]


@pytree
class Automaton:
    """Which delimiters the bytes read so far contain, as a table over tokens.

    The last state says "found" and is never left by reading: a hit inside a token, or before it, stays a hit until the
    caller starts anew. Without strings there is no hit.

    Attributes:
        table: (states, V), the state after a token; the smallest unsigned integers that hold it.
        accepting: (states,), True in the state "found".
    """

    table: Any
    accepting: Any

    def start(self, *shape: int) -> Array:
        """The state before the first byte, in an array of this shape."""
        return jnp.zeros(shape, jnp.int32)

    def step(self, state: Int[Array, "*batch"], tokens: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """The states after one more token each."""
        return self.table[state, tokens].astype(jnp.int32)

    def hit(self, state: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
        """Whether a string has been found since the start."""
        return self.accepting[state]


def build(strings: Any, token_bytes: Sequence[bytes]) -> Automaton:
    """The automaton of delimiters over a vocabulary.

    Args:
        strings: the delimiters, a tuple of strings; none of them may be empty. No strings: never a hit.
        token_bytes: what each token adds to the text; nothing for special tokens.

    Returns:
        The automaton.

    Raises:
        TypeError: ``strings`` is one string, or holds something else than strings.
        ValueError: an empty delimiter, or an empty vocabulary.

    Example:
        >>> import jax.numpy as jnp
        >>> from probinfer.lm import tokens
        >>> automaton = tokens.build((";;",), [b"a;", b";b", b"c"])
        >>> state = automaton.step(automaton.start(2), jnp.array([0, 0]))
        >>> automaton.hit(automaton.step(state, jnp.array([1, 2]))).tolist()
        [True, False]
    """
    if not isinstance(strings, (tuple, list)) or not all(isinstance(s, str) for s in strings):
        raise TypeError(f"delimiters must be a tuple of strings, got {shortened(strings)}")
    if not all(strings):
        raise ValueError(
            f"a delimiter must not be empty, it would end every step at once; got {shortened(strings)}"
        )
    if not len(token_bytes):
        raise ValueError("the vocabulary is empty: token_bytes needs one entry a token")
    delta, found = byte_table(tuple(s.encode() for s in strings))
    table = token_table(delta, token_bytes)
    accepting = np.arange(len(delta)) == found
    return Automaton(jnp.asarray(table.astype(np.min_scalar_type(len(delta) - 1))), jnp.asarray(accepting))


def byte_table(strings: tuple[bytes, ...]) -> tuple[np.ndarray, int]:
    """Aho and Corasick's transitions (states, 256), and the state "found" (-1 if there is nothing to find).

    States are the prefixes of strings that contain no whole string; all others are one absorbing state, the last.
    """
    children: list[dict[int, int]] = [{}]
    whole = [False]
    for string in strings:
        node = 0
        for byte in string:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                whole.append(False)
            node = children[node][byte]
        whole[node] = True
    delta, ends = _complete(children, whole)
    kept = [node for node in range(len(children)) if not ends[node]]
    if len(kept) == len(children):
        return delta, -1
    renamed = np.full(len(children), len(kept))
    renamed[kept] = np.arange(len(kept))
    return np.vstack([renamed[delta[kept]], np.full((1, 256), len(kept))]), len(kept)


def _complete(children: list[dict[int, int]], whole: list[bool]) -> tuple[np.ndarray, list[bool]]:
    """Fill the missing transitions of a trie by its failure links, breadth first."""
    delta = np.zeros((len(children), 256), np.int64)
    ends, failure = list(whole), [0] * len(children)
    queue: deque[int] = deque([0])
    while queue:
        node = queue.popleft()
        ends[node] = ends[node] or (node != 0 and ends[failure[node]])
        delta[node] = delta[failure[node]]
        for byte, child in children[node].items():
            failure[child] = delta[failure[node], byte] if node else 0
            delta[node, byte] = child
            queue.append(child)
    return delta, ends


def token_table(delta: np.ndarray, token_bytes: Sequence[bytes]) -> np.ndarray:
    """Run every token from every state through a table of bytes (states, 256): (states, V)."""
    lengths = np.fromiter(map(len, token_bytes), np.int64, len(token_bytes))
    order = np.argsort(-lengths, kind="stable")
    letters = np.frombuffer(b"".join(token_bytes) or b"\0", np.uint8)
    first = np.cumsum(lengths) - lengths
    state = np.repeat(np.arange(len(delta))[:, None], len(token_bytes), axis=1)
    for position in range(int(lengths.max())):
        longer = order[: np.count_nonzero(lengths > position)]  # the tokens that have a byte here
        state[:, longer] = delta[state[:, longer], letters[first[longer] + position]]
    return state
