"""Tokens that may follow a prefix: regular expressions, JSON schemas and grammars.

A constraint is a function of the generated prefix alone: a row of booleans over the vocabulary for each particle. The
end token is allowed exactly where the text is complete; a prefix that no text of the language begins with has an
all-False row. Grammars are parsed on the host by ``llguidance``; parser states are stored there by prefix, so a forked
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

from probinfer.core.errors import import_extra, shortened
from probinfer.core.types import Array, ArrayTree, Bool, Int, field, pytree
from probinfer.lm.models.base import Context
from probinfer.lm.rewards.host import registry
from probinfer.lm.rewards.host.batching import flatten_leading_axes

__all__ = ["Grammar", "Language", "grammar", "json_schema", "regex"]

_OPTIONS = re.compile(r"^%llguidance\s*(\{.*\})\s*$", re.MULTILINE)


@pytree
class Grammar(registry.HostBacked):
    """A constraint that ``llguidance`` parses on the host; made by ``Language.follow``.

    Attributes:
        number: number of the host object that parses texts.
        attached: that object; static.
        vocab_size: V; static.
    """

    number: Any
    attached: Any = field(static=True)
    vocab_size: int = field(static=True)

    @property
    def problem(self) -> str:
        """The first limit of the parser that a prefix has reached (its row is all False); empty if there was none."""
        return self.host.problem

    def init(self, context: Context, num: int) -> ArrayTree:
        """Return no state: the mask is a function of the tokens."""
        return ()

    def mask(
        self, state: ArrayTree, tokens: Int[Array, "n t"], length: Int[Array, " n"]
    ) -> Bool[Array, "n v"]:
        """Return whether each token may follow the ``length`` first of ``tokens``."""
        shape = jax.ShapeDtypeStruct((tokens.shape[0], self.vocab_size), jnp.bool_)
        return registry.call_host("masks", shape, self.number, tokens, length)

    def advance(self, state: ArrayTree, tokens: Int[Array, " n"], active: Bool[Array, " n"]) -> ArrayTree:
        """Return the empty state."""
        return state

    def gather(self, state: ArrayTree, ancestors: Int[Array, " m"]) -> ArrayTree:
        """Return the empty state."""
        return state


class Language(NamedTuple):
    """A set of texts that ``llguidance`` can parse, with any tokenizer.

    Attributes:
        text: the grammar in the notation of ``llguidance``.
        name: what the grammar is, in words.
    """

    text: str
    name: str

    def follow(self, tokenizer: Any, memory: int = 4096) -> Grammar:
        """Return the constraint for a tokenizer.

        Args:
            tokenizer: an object with ``token_bytes`` and ``eos_ids``.
            memory: number of prefixes whose parser state is stored; should exceed the number of particles.

        Raises:
            TypeError: the tokenizer does not give the bytes of its tokens.
            ValueError: it has no bytes or no end token, or the grammar cannot be parsed with it.
        """
        if memory < 1:
            raise ValueError(f"memory must be at least 1 prefix, got {memory}")
        vocabulary = _vocabulary(tokenizer)
        _check(self, vocabulary)
        host = _GrammarHost(_library().LLMatcher(vocabulary, self.text, log_level=0), tokenizer, memory)
        return Grammar(registry.register(host), host, host.vocab_size)


def regex(pattern: Any) -> Language:
    r"""Return the texts that a regular expression matches from their first to their last character.

    Args:
        pattern: in the syntax of Rust's ``regex`` crate: that of Python without look-around and back-references.

    Raises:
        TypeError: the pattern is not a string.
        ValueError: the pattern does not parse.
    """
    pattern = _as_text("a regular expression", pattern)
    parsed = json.loads(_library().LLMatcher.grammar_from_regex(pattern))
    return _language(parsed["grammars"][0]["lark_grammar"], f"regular expression {pattern!r}")


def json_schema(schema: Any, *, whitespace: bool = True) -> Language:
    """Return the JSON texts that are valid under a schema; properties come in the order of the schema.

    Args:
        schema: a dictionary, or its JSON text.
        whitespace: allow spaces and line breaks between the parts.

    Raises:
        TypeError: the schema is neither a dictionary nor a text.
        ValueError: it is not a JSON object, not a schema, or has features that are not supported.
    """
    return _language(f"start: %json {_schema_text(schema, whitespace=whitespace)}", "JSON schema")


def _schema_text(schema: Any, *, whitespace: bool) -> str:
    """Return the text of a JSON schema, with the options of ``llguidance`` in it."""
    if not isinstance(schema, (dict, str)):
        raise TypeError(f"a JSON schema is a dictionary or its text, got {shortened(schema)}")
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        return json.dumps({"x-guidance": {"whitespace_flexible": whitespace}, **parsed})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the JSON schema is not a JSON object: {error}; got {shortened(schema)}") from error


def _as_text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a string, got {shortened(value)}")
    return value


def grammar(lark: Any) -> Language:
    """Return the texts of a context-free grammar in the notation of Lark, with the rule ``start``.

    Args:
        lark: rules and terminals, in the variant that ``llguidance`` documents.

    Raises:
        TypeError: the grammar is not a string.
        ValueError: the grammar does not parse.
    """
    return _language(_as_text("a grammar", lark), "grammar")


def _library() -> Any:
    return import_extra("llguidance", "lm")


def _unforced(lark: str) -> str:
    """Switch off forced tokens, by which the library would allow a single tokenization of a text that must follow."""
    match = _OPTIONS.search(lark)
    try:
        options = {**(json.loads(match[1]) if match else {}), "no_forcing": True}
    except ValueError:
        return lark  # the library reports what is wrong with it
    return f"{_OPTIONS.sub('', lark)}\n%llguidance {json.dumps(options)}\n"


def _language(lark: str, name: str) -> Language:
    """Return the texts of a grammar in the library's variant of Lark, or refuse one that cannot be parsed."""
    language = Language(_library().LLMatcher.grammar_from_lark(_unforced(lark)), name)
    _check(language, None)
    return language


def _check(language: Language, vocabulary: Any) -> None:
    """Refuse a grammar that the library cannot parse; without a vocabulary, only for reasons independent of it."""
    complaint = _library().LLMatcher.validate_grammar(language.text, vocabulary)
    if complaint and not complaint.startswith("WARNING"):
        raise ValueError(f"the {language.name} cannot be followed: {complaint.strip()}")


class _LibraryVocabulary:
    """A vocabulary with the interface that the library expects."""

    bos_token_id = None

    def __init__(self, tokenizer: Any):
        self.tokens = list(tokenizer.token_bytes)
        self.eos_token_id = tokenizer.eos_ids[0]
        self.special_token_ids = [i for i, token in enumerate(self.tokens) if not token]

    def __call__(self, text: Any) -> list[int]:
        """Tokenize a text; the library calls this only as a test, since no token is forced."""
        return []


_VOCABULARIES: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _vocabulary(tokenizer: Any) -> Any:
    """Return the library's tables of a tokenizer, which are built once.

    Raises:
        TypeError: the tokenizer does not give the bytes of its tokens.
        ValueError: no token adds anything to a text, or none ends it.
    """
    if not hasattr(tokenizer, "token_bytes") or not hasattr(tokenizer, "eos_ids"):
        raise TypeError(
            "a constraint needs a tokenizer with token_bytes and eos_ids, such as lm.tokens.Tokenizer; "
            f"got {shortened(tokenizer)}"
        )
    if not any(tokenizer.token_bytes):
        raise ValueError(
            "the tokenizer has no bytes: no token adds anything to the text, so none can be allowed"
        )
    if not tokenizer.eos_ids:
        raise ValueError(
            "the tokenizer has no end token, so no text could end where the constraint is met; give eos="
        )
    if tokenizer not in _VOCABULARIES:
        wrapper = _library().TokenizerWrapper(_LibraryVocabulary(tokenizer))
        size, end_ids = len(tokenizer.token_bytes), list(tokenizer.eos_ids)
        _VOCABULARIES[tokenizer] = _library().LLTokenizer(wrapper, n_vocab=size, eos_token=end_ids)
    return _VOCABULARIES[tokenizer]


class _Node(NamedTuple):
    """A prefix.

    Attributes:
        matcher: state of the parser after the prefix; None if it is dead or has ended.
        bits: mask of the tokens that may follow, packed.
    """

    matcher: Any
    bits: np.ndarray


class _GrammarHost:
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
        """Return masks (..., N, V) for prefixes (..., N, T) of given lengths (..., N)."""
        lead, (tokens, lengths) = flatten_leading_axes((tokens, lengths), (2, 1))
        rows = zip(tokens.reshape(-1, tokens.shape[-1]), lengths.ravel(), strict=True)
        prefixes = [np.ascontiguousarray(row[:size], np.int32) for row, size in rows]
        with self._lock:
            bits = np.stack([self._node_of(prefix).bits for prefix in prefixes])
        masks = np.unpackbits(bits, axis=1, count=self.vocab_size).astype(bool)
        return masks.reshape(*lead, -1, self.vocab_size)

    def _node_of(self, prefix: np.ndarray) -> _Node:
        """Return the node of a prefix, starting from the longest prefix of it that is stored."""
        key = prefix.tobytes()
        if key in self._nodes:
            self._nodes.move_to_end(key)
            return self._nodes[key]
        stored = next((n for n in range(len(prefix) - 1, 0, -1) if prefix[:n].tobytes() in self._nodes), 0)
        node = self._nodes[prefix[:stored].tobytes()] if stored else self._root
        if stored < len(prefix):
            node = self._extend(node, prefix[stored:])
        self._nodes[key] = node
        if len(self._nodes) > self._memory:
            self._nodes.popitem(last=False)
        return node

    def _extend(self, node: _Node, tokens: np.ndarray) -> _Node:
        """Return the node after more tokens; the state of ``node`` is copied."""
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
        """Return the node of a parser state; if the parser has given up, it is dead, and the reason is stored."""
        ends = matcher.is_accepting()
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            self.problem = self.problem or matcher.get_error()
            return self._dead
        row = np.unpackbits(bits, count=self.vocab_size, bitorder="little").astype(bool) & self._visible
        return _Node(matcher, np.packbits(row | (self._ends & ends)))
