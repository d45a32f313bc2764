r"""Find delimiters in the text of tokens: does one of the strings occur in the bytes read so far?

A delimiter such as an empty line is rarely one token: many tokens contain it, and it may begin in one token and end in
the next. The state of Aho and Corasick's automaton over *bytes* is the longest prefix of a delimiter that ends at the
current byte; running every token through it from every state gives one table (states, V), and following a delimiter
costs one look-up for each token, inside jit.

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

    The last state means "found" and is absorbing: a hit inside a token, or before it, stays a hit until the caller
    starts again. Without strings there is no hit.

    Attributes:
        table: (states, V) the state after a token; the smallest unsigned integers that hold it.
        accepting: (states,) True in the state "found".
    """

    table: Any
    accepting: Any

    def start(self, *shape: int) -> Array:
        """Return the state before the first byte, in an array of this shape."""
        return jnp.zeros(shape, jnp.int32)

    def step(self, state: Int[Array, "*batch"], tokens: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """Return the states after one more token each."""
        return self.table[state, tokens].astype(jnp.int32)

    def hit(self, state: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
        """Return whether a string has been found since the start."""
        return self.accepting[state]


def build(strings: Any, token_bytes: Sequence[bytes]) -> Automaton:
    """Build the automaton of delimiters over a vocabulary.

    Args:
        strings: the delimiters, a tuple of strings, none of them empty; without strings there is never a hit.
        token_bytes: the bytes that each token adds to the text; empty for special tokens.

    Returns:
        The automaton.

    Raises:
        TypeError: ``strings`` is one string, or contains something other than strings.
        ValueError: a delimiter or the vocabulary is empty.

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
        raise ValueError("the vocabulary is empty: token_bytes needs one entry for each token")
    transitions, found_state = byte_table(tuple(s.encode() for s in strings))
    table = token_table(transitions, token_bytes)
    accepting = np.arange(len(transitions)) == found_state
    dtype = np.min_scalar_type(len(transitions) - 1)
    return Automaton(jnp.asarray(table.astype(dtype)), jnp.asarray(accepting))


def byte_table(strings: tuple[bytes, ...]) -> tuple[np.ndarray, int]:
    """Return Aho and Corasick's transitions (states, 256), and the state "found" (-1 if there are no strings).

    States are the prefixes of strings that contain no complete string; all others are one absorbing state, the last.
    """
    children: list[dict[int, int]] = [{}]
    is_string = [False]
    for string in strings:
        node = 0
        for byte in string:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                is_string.append(False)
            node = children[node][byte]
        is_string[node] = True
    transitions, has_match = _complete(children, is_string)
    open_nodes = [node for node in range(len(children)) if not has_match[node]]
    num_open = len(open_nodes)
    if num_open == len(children):
        return transitions, -1
    state_of = np.full(len(children), num_open)
    state_of[open_nodes] = np.arange(num_open)
    return np.vstack([state_of[transitions[open_nodes]], np.full((1, 256), num_open)]), num_open


def _complete(children: list[dict[int, int]], is_string: list[bool]) -> tuple[np.ndarray, list[bool]]:
    """Fill the missing transitions of a trie by its failure links, breadth first.

    Returns:
        Transitions (nodes, 256), and whether a string ends at each node.
    """
    transitions = np.zeros((len(children), 256), np.int64)
    has_match, failure = list(is_string), [0] * len(children)
    queue: deque[int] = deque([0])
    while queue:
        node = queue.popleft()
        has_match[node] = has_match[node] or (node != 0 and has_match[failure[node]])
        transitions[node] = transitions[failure[node]]
        for byte, child in children[node].items():
            failure[child] = transitions[failure[node], byte] if node else 0
            transitions[node, byte] = child
            queue.append(child)
    return transitions, has_match


def token_table(transitions: np.ndarray, token_bytes: Sequence[bytes]) -> np.ndarray:
    """Run every token from every state through transitions (states, 256) of bytes; return (states, V)."""
    lengths = np.fromiter(map(len, token_bytes), np.int64, len(token_bytes))
    order = np.argsort(-lengths, kind="stable")
    all_bytes = np.frombuffer(b"".join(token_bytes) or b"\0", np.uint8)
    first = np.cumsum(lengths) - lengths
    state = np.repeat(np.arange(len(transitions))[:, None], len(token_bytes), axis=1)
    for position in range(int(lengths.max())):
        longer = order[: np.count_nonzero(lengths > position)]  # the tokens that have a byte at this position
        state[:, longer] = transitions[state[:, longer], all_bytes[first[longer] + position]]
    return state
