"""Which tokens may follow a prefix: regular expressions, JSON schemas, grammars, and tables.

A constraint is a function of the generated prefix alone: a row of booleans over the vocabulary for each particle. The
end token is allowed exactly where the text is complete; a prefix that no text of the language begins with has an
all-False row. Grammars are followed on the host by ``llguidance``; their states are kept there by prefix, so a forked
particle costs nothing, and a new token costs one step of the parser from a copy of its parent's state.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.errors import import_extra, shortened
from probinfer.lm.base import Context
from probinfer.lm.rewards.batching import flat
from probinfer.types import Array, ArrayTree, Bool, Int, field, pytree

__all__ = ["Allowed", "Grammar", "allowed", "grammar", "json_schema", "regex", "schema_text", "text_of"]

_OPTIONS = re.compile(r"^%llguidance\s*(\{.*\})\s*$", re.MULTILINE)


@pytree
class Allowed:
    """A constraint that is a finite automaton over tokens, inside JAX.

    Attributes:
        table: (S, V) bool, which tokens may follow in a state; the end token belongs to V.
        transitions: (S, V) int32, the state after a token.
    """

    table: Any
    transitions: Any

    def init(self, context: Context, num: int) -> Int[Array, " n"]:
        """State zero for each particle."""
        return jnp.zeros(num, jnp.int32)

    def mask(
        self, state: Int[Array, " n"], tokens: Int[Array, "n t"], length: Int[Array, " n"]
    ) -> Bool[Array, "n v"]:
        """The rows of the states."""
        return self.table[state]

    def advance(
        self, state: Int[Array, " n"], tokens: Int[Array, " n"], active: Bool[Array, " n"]
    ) -> Int[Array, " n"]:
        """Follow one token where ``active``."""
        return jnp.where(active, self.transitions[state, tokens], state)

    def gather(self, state: Int[Array, " n"], ancestors: Int[Array, " m"]) -> Int[Array, " m"]:
        """Fork the states."""
        return state[ancestors]


def allowed(table: Any, transitions: Any = None) -> Allowed:
    """A constraint from a table: state s allows token v where ``table[s, v]``, and passes to ``transitions[s, v]``.

    Args:
        table: (S, V), or (V,) for one state.
        transitions: (S, V) integers; without them every token leads back to its state.

    Raises:
        TypeError: the table is not boolean, or transitions are no integers.
        ValueError: shapes differ, or a state is out of range.
    """
    table = np.asarray(table)
    table = table[None] if table.ndim == 1 else table
    if table.dtype != bool:
        raise TypeError(
            f"a table of allowed tokens must be boolean, got {table.dtype}; write table > 0 for numbers"
        )
    if table.ndim != 2 or not table.size:
        raise ValueError(f"a table of allowed tokens must be (states, vocabulary), got shape {table.shape}")
    stay = np.broadcast_to(np.arange(len(table))[:, None], table.shape)
    following = stay if transitions is None else np.asarray(transitions)
    if not np.issubdtype(following.dtype, np.integer):
        raise TypeError(f"transitions must be integers, got {following.dtype}")
    if following.shape != table.shape:
        raise ValueError(f"transitions must have the shape {table.shape} of the table, got {following.shape}")
    if following.min() < 0 or following.max() >= len(table):
        raise ValueError(f"states are 0 ... {len(table) - 1}, got {following.min()} ... {following.max()}")
    return Allowed(jnp.asarray(table), jnp.asarray(following, jnp.int32))


@pytree
class Grammar:
    """A constraint that ``llguidance`` follows on the host; made by ``regex``, ``json_schema`` and ``grammar``."""

    host: Any = field(static=True)

    @property
    def problem(self) -> str:
        """The first limit of the parser that a prefix has met (its row is all False); empty if there was none."""
        return self.host.problem

    def init(self, context: Context, num: int) -> ArrayTree:
        """Nothing: the mask is a function of the tokens."""
        return ()

    def mask(
        self, state: ArrayTree, tokens: Int[Array, "n t"], length: Int[Array, " n"]
    ) -> Bool[Array, "n v"]:
        """What may follow the ``length`` first of ``tokens``."""
        shape = jax.ShapeDtypeStruct((tokens.shape[0], self.host.vocab_size), jnp.bool_)
        return jax.pure_callback(self.host.masks, shape, tokens, length, vmap_method="expand_dims")

    def advance(self, state: ArrayTree, tokens: Int[Array, " n"], active: Bool[Array, " n"]) -> ArrayTree:
        """Nothing to follow."""
        return state

    def gather(self, state: ArrayTree, ancestors: Int[Array, " m"]) -> ArrayTree:
        """Nothing to fork."""
        return state


def regex(pattern: Any, tokenizer: Any, *, memory: int = 4096) -> Grammar:
    r"""Texts that a regular expression matches from their first to their last character.

    Args:
        pattern: in the syntax of Rust's ``regex`` crate: as Python's without look-around and back-references.
        tokenizer: with ``token_bytes`` and ``eos_ids``.
        memory: for how many prefixes the state is kept; more than there are particles.

    Raises:
        TypeError: the pattern is no string.
        ValueError: the pattern does not parse; a tokenizer without bytes or without end token.
    """
    pattern = text_of("a regular expression", pattern)
    made = json.loads(_library().LLMatcher.grammar_from_regex(pattern))
    lark = made["grammars"][0]["lark_grammar"]
    return _grammar(lark, f"regular expression {pattern!r}", tokenizer, memory)


def json_schema(schema: Any, tokenizer: Any, *, whitespace: bool = True, memory: int = 4096) -> Grammar:
    """JSON texts that are valid under a schema; properties come in the order of the schema.

    Args:
        schema: a dictionary, or its JSON text.
        tokenizer: with ``token_bytes`` and ``eos_ids``.
        whitespace: allow spaces and line breaks between the parts.
        memory: for how many prefixes the state is kept; more than there are particles.

    Raises:
        TypeError: the schema is neither a dictionary nor a text.
        ValueError: it is no JSON, no schema, or uses what cannot be followed; a tokenizer without bytes or end token.
    """
    text = schema_text(schema, whitespace=whitespace)
    return _grammar(f"start: %json {text}", "JSON schema", tokenizer, memory)


def schema_text(schema: Any, *, whitespace: bool = True) -> str:
    """A JSON schema as the text that is followed.

    Raises:
        TypeError: the schema is neither a dictionary nor a text.
        ValueError: it is no JSON object.
    """
    if not isinstance(schema, (dict, str)):
        raise TypeError(f"a JSON schema is a dictionary or its text, got {shortened(schema)}")
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        return json.dumps({"x-guidance": {"whitespace_flexible": whitespace}, **parsed})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the JSON schema is no JSON object: {error}; got {shortened(schema)}") from error


def text_of(what: str, value: Any) -> str:
    """The value itself, if it is a string."""
    if not isinstance(value, str):
        raise TypeError(f"{what} is a string, got {shortened(value)}")
    return value


def grammar(lark: Any, tokenizer: Any, *, memory: int = 4096) -> Grammar:
    """Texts of a context-free grammar, written as Lark does, with the rule ``start``.

    Args:
        lark: rules and terminals, in the variant that ``llguidance`` documents.
        tokenizer: with ``token_bytes`` and ``eos_ids``.
        memory: for how many prefixes the state is kept; more than there are particles.

    Raises:
        TypeError: the grammar is no string.
        ValueError: the grammar does not parse; a tokenizer without bytes or without end token.
    """
    return _grammar(text_of("a grammar", lark), "grammar", tokenizer, memory)


def _library() -> Any:
    return import_extra("llguidance", "lm")


def _unforced(lark: str) -> str:
    """The grammar without forced tokens: the library would allow one spelling alone of a text that must follow."""
    found = _OPTIONS.search(lark)
    try:
        options = {**(json.loads(found[1]) if found else {}), "no_forcing": True}
    except ValueError:
        return lark  # the library says what is wrong with it
    return f"{_OPTIONS.sub('', lark)}\n%llguidance {json.dumps(options)}\n"


def _grammar(lark: str, name: str, tokenizer: Any, memory: int) -> Grammar:
    """A constraint from a grammar in the library's variant of Lark."""
    if memory < 1:
        raise ValueError(f"memory must be at least 1 prefix, got {memory}")
    vocabulary, text = _vocabulary(tokenizer), _library().LLMatcher.grammar_from_lark(_unforced(lark))
    complaint = _library().LLMatcher.validate_grammar(text, vocabulary)
    if complaint and not complaint.startswith("WARNING"):
        raise ValueError(f"the {name} cannot be followed: {complaint.strip()}")
    return Grammar(_Host(_library().LLMatcher(vocabulary, text, log_level=0), tokenizer, memory))


class _Words:
    """A vocabulary as the library wants to see it."""

    bos_token_id = None

    def __init__(self, tokenizer: Any):
        self.tokens = list(tokenizer.token_bytes)
        self.eos_token_id = tokenizer.eos_ids[0]
        self.special_token_ids = [i for i, token in enumerate(self.tokens) if not token]

    def __call__(self, text: Any) -> list[int]:
        """Spell a text; the library only tries it, as nothing is forced."""
        return []


_VOCABULARIES: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _vocabulary(tokenizer: Any) -> Any:
    """The library's tables of a tokenizer, made once.

    Raises:
        TypeError: the tokenizer does not say the bytes of its tokens.
        ValueError: none adds anything to a text, or none ends it.
    """
    if not hasattr(tokenizer, "token_bytes") or not hasattr(tokenizer, "eos_ids"):
        raise TypeError(
            "a constraint needs a tokenizer with token_bytes and eos_ids, such as lm.tokens.Tokenizer; "
            f"got {shortened(tokenizer)}"
        )
    if not any(tokenizer.token_bytes):
        raise ValueError(
            "the tokenizer has no bytes: every token adds nothing to the text, so none can be allowed"
        )
    if not tokenizer.eos_ids:
        raise ValueError(
            "the tokenizer has no end token, so no text could end where the constraint is met; give eos="
        )
    if tokenizer not in _VOCABULARIES:
        words = _library().TokenizerWrapper(_Words(tokenizer))
        size, ends = len(tokenizer.token_bytes), list(tokenizer.eos_ids)
        _VOCABULARIES[tokenizer] = _library().LLTokenizer(words, n_vocab=size, eos_token=ends)
    return _VOCABULARIES[tokenizer]


class _Node(NamedTuple):
    """A prefix: the state of the parser after it (None where it is dead or ended), and its mask as bits."""

    matcher: Any
    bits: np.ndarray


class _Host:
    """States of the parser by prefix."""

    def __init__(self, root: Any, tokenizer: Any, memory: int):
        self.vocab_size = len(tokenizer.token_bytes)
        self.num_consumed = 0
        self.problem = ""
        self._ends = np.zeros(self.vocab_size, bool)
        self._ends[list(tokenizer.eos_ids)] = True
        self._visible = np.array([bool(token) for token in tokenizer.token_bytes]) & ~self._ends
        self._dead = _Node(None, np.packbits(np.zeros_like(self._ends)))
        self._ended = _Node(None, np.packbits(self._ends))
        self._memory, self._lock = memory, Lock()
        self._root = self._node(root)
        self._nodes: OrderedDict[bytes, _Node] = OrderedDict()

    def masks(self, tokens: Any, lengths: Any) -> np.ndarray:
        """Rows (..., N, V) for prefixes (..., N, T) of given lengths (..., N)."""
        lead, (tokens, lengths) = flat((tokens, lengths), (2, 1))
        prefixes = [
            row[:size]
            for row, size in zip(tokens.reshape(-1, tokens.shape[-1]), lengths.ravel(), strict=True)
        ]
        with self._lock:
            rows = np.stack([self._find(np.ascontiguousarray(prefix, np.int32)).bits for prefix in prefixes])
        return (
            np.unpackbits(rows, axis=1, count=self.vocab_size)
            .astype(bool)
            .reshape(*lead, -1, self.vocab_size)
        )

    def _find(self, prefix: np.ndarray) -> _Node:
        """The node of a prefix, from the longest beginning of it that is known."""
        key = prefix.tobytes()
        if key in self._nodes:
            self._nodes.move_to_end(key)
            return self._nodes[key]
        known = next((n for n in range(len(prefix) - 1, 0, -1) if prefix[:n].tobytes() in self._nodes), 0)
        node = self._nodes[prefix[:known].tobytes()] if known else self._root
        if known < len(prefix):
            node = self._grow(node, prefix[known:])
        self._nodes[key] = node
        if len(self._nodes) > self._memory:
            self._nodes.popitem(last=False)
        return node

    def _grow(self, node: _Node, tokens: np.ndarray) -> _Node:
        """The node after more tokens, on a copy of the state."""
        if node.matcher is None:
            return self._dead
        matcher = node.matcher.deep_copy()
        for i, token in enumerate(tokens):
            if not 0 <= token < self.vocab_size:
                return self._dead
            if self._ends[token]:
                return self._ended if i == len(tokens) - 1 and matcher.is_accepting() else self._dead
            self.num_consumed += 1
            if not self._visible[token] or matcher.try_consume_tokens([int(token)]) != 1:
                return self._dead
        return self._node(matcher)

    def _node(self, matcher: Any) -> _Node:
        """The mask of a state; a state that the parser gave up is dead, and the reason is kept."""
        ends = matcher.is_accepting()
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            self.problem = self.problem or matcher.get_error()
            return self._dead
        row = np.unpackbits(bits, count=self.vocab_size, bitorder="little").astype(bool) & self._visible
        return _Node(matcher, np.packbits(row | (self._ends & ends)))
