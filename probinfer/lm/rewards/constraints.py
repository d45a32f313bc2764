"""Which tokens may follow a prefix: regular expressions, JSON schemas and grammars.

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

from probinfer.core.errors import import_extra, shortened
from probinfer.core.types import Array, ArrayTree, Bool, Int, field, pytree
from probinfer.lm.models.base import Context
from probinfer.lm.rewards.host import registry
from probinfer.lm.rewards.host.batching import flat

__all__ = ["Grammar", "Language", "grammar", "json_schema", "regex"]

_OPTIONS = re.compile(r"^%llguidance\s*(\{.*\})\s*$", re.MULTILINE)


@pytree
class Grammar(registry.OnHost):
    """A constraint that ``llguidance`` follows on the host; made by ``Language.follow``.

    Attributes:
        number: of the object that follows texts.
        owned: that object; static.
        vocab_size: V; static.
    """

    number: Any
    owned: Any = field(static=True)
    vocab_size: int = field(static=True)

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
        shape = jax.ShapeDtypeStruct((tokens.shape[0], self.vocab_size), jnp.bool_)
        return registry.call("masks", shape, self.number, tokens, length)

    def advance(self, state: ArrayTree, tokens: Int[Array, " n"], active: Bool[Array, " n"]) -> ArrayTree:
        """Nothing to follow."""
        return state

    def gather(self, state: ArrayTree, ancestors: Int[Array, " m"]) -> ArrayTree:
        """Nothing to fork."""
        return state


class Language(NamedTuple):
    """A set of texts that the library can follow, whatever the tokenizer.

    Attributes:
        text: the grammar as the library reads it.
        name: in words.
    """

    text: str
    name: str

    def follow(self, tokenizer: Any, memory: int = 4096) -> Grammar:
        """The constraint for a tokenizer.

        Args:
            tokenizer: with ``token_bytes`` and ``eos_ids``.
            memory: for how many prefixes the state is kept; more than there are particles.

        Raises:
            TypeError: the tokenizer does not say the bytes of its tokens.
            ValueError: it has no bytes or no end token, or the grammar cannot be followed with it.
        """
        if memory < 1:
            raise ValueError(f"memory must be at least 1 prefix, got {memory}")
        vocabulary = _vocabulary(tokenizer)
        _check(self, vocabulary)
        host = _Host(_library().LLMatcher(vocabulary, self.text, log_level=0), tokenizer, memory)
        return Grammar(registry.enlist(host), host, host.vocab_size)


def regex(pattern: Any) -> Language:
    r"""Texts that a regular expression matches from their first to their last character.

    Args:
        pattern: in the syntax of Rust's ``regex`` crate: as Python's without look-around and back-references.

    Raises:
        TypeError: the pattern is no string.
        ValueError: the pattern does not parse.
    """
    pattern = _text_of("a regular expression", pattern)
    made = json.loads(_library().LLMatcher.grammar_from_regex(pattern))
    return _language(made["grammars"][0]["lark_grammar"], f"regular expression {pattern!r}")


def json_schema(schema: Any, *, whitespace: bool = True) -> Language:
    """JSON texts that are valid under a schema; properties come in the order of the schema.

    Args:
        schema: a dictionary, or its JSON text.
        whitespace: allow spaces and line breaks between the parts.

    Raises:
        TypeError: the schema is neither a dictionary nor a text.
        ValueError: it is no JSON object, no schema, or uses what cannot be followed.
    """
    return _language(f"start: %json {_schema_text(schema, whitespace=whitespace)}", "JSON schema")


def _schema_text(schema: Any, *, whitespace: bool) -> str:
    """A JSON schema as the text that is followed."""
    if not isinstance(schema, (dict, str)):
        raise TypeError(f"a JSON schema is a dictionary or its text, got {shortened(schema)}")
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        return json.dumps({"x-guidance": {"whitespace_flexible": whitespace}, **parsed})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the JSON schema is no JSON object: {error}; got {shortened(schema)}") from error


def _text_of(what: str, value: Any) -> str:
    """The value itself, if it is a string."""
    if not isinstance(value, str):
        raise TypeError(f"{what} is a string, got {shortened(value)}")
    return value


def grammar(lark: Any) -> Language:
    """Texts of a context-free grammar, written as Lark does, with the rule ``start``.

    Args:
        lark: rules and terminals, in the variant that ``llguidance`` documents.

    Raises:
        TypeError: the grammar is no string.
        ValueError: the grammar does not parse.
    """
    return _language(_text_of("a grammar", lark), "grammar")


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


def _language(lark: str, name: str) -> Language:
    """A set of texts from a grammar in the library's variant of Lark, refused here if it cannot be followed."""
    language = Language(_library().LLMatcher.grammar_from_lark(_unforced(lark)), name)
    _check(language, None)
    return language


def _check(language: Language, vocabulary: Any) -> None:
    """Refuse what the library cannot follow; without a vocabulary only what does not depend on it."""
    complaint = _library().LLMatcher.validate_grammar(language.text, vocabulary)
    if complaint and not complaint.startswith("WARNING"):
        raise ValueError(f"the {language.name} cannot be followed: {complaint.strip()}")


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
