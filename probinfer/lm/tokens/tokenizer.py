r"""The tokenizer of a checkpoint: a ``tokenizer.json``, and the bytes that each of its tokens adds to a text.

Three spellings of bytes as tokens are in use. *Byte-level* BPE spells every byte as a printable character (a fixed
table of GPT-2). *Sentencepiece* writes a space as ``▁`` and falls back to tokens ``<0x0A>``. For other tokenizers
(words, word pieces) the bytes of a token are what the decoder appends for it to the text of another token.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from probinfer.core.errors import import_extra, reading, shortened
from probinfer.lm.tokens.chat import ChatTemplate

__all__ = ["Tokenizer"]

_MAX_TOKENS = 2**24
_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_USUAL_END_TOKENS = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<eos>",
    "<end_of_turn>",
)


class Tokenizer:
    """From text to ids and back, as defined by a ``tokenizer.json``.

    Args:
        source: the path of a ``tokenizer.json``, its text, or a ``tokenizers.Tokenizer``.
        eos: the tokens that end a text, by name or id; None: those of the usual names that the vocabulary has.
        chat_template: the Jinja template of chats.
        variables: variables of the template, such as ``bos_token``.
        vocab_size: V of the model, if its logits are padded beyond the vocabulary; the additional ids add no text.

    Raises:
        TypeError: ``source`` is none of these.
        FileNotFoundError: there is no such file.
        ValueError: the source is not a tokenizer, ``eos`` is not in the vocabulary, or ``vocab_size`` is too small.

    Example:
        >>> from probinfer.lm import tokens
        >>> source = '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "unk_token": ".",'
        >>> source += ' "vocab": {"one": 0, "two": 1, ".": 2}}, "pre_tokenizer": {"type": "WhitespaceSplit"}}'
        >>> tokenizer = tokens.Tokenizer(source, eos=".")
        >>> tokenizer.encode("two one").tolist(), tokenizer.decode([1, 0, 2]), tokenizer.token_bytes
        ([1, 0], 'two one', [b' one', b' two', b''])
    """

    def __init__(
        self,
        source: Any,
        eos: Any = None,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
    ):
        self._tokenizer = _read(source)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = self._tokenizer.get_added_tokens_decoder()
        size = 1 + max([*self._tokenizer.get_vocab(with_added_tokens=True).values(), *added], default=-1)
        if size > _MAX_TOKENS:
            raise ValueError(
                f"the tokenizer has a token of number {size - 1}, which no model has; copy it again"
            )
        if vocab_size is not None and vocab_size < size:
            raise ValueError(
                f"the tokenizer has {size} tokens and the model only {vocab_size}: they do not belong together; "
                "use the tokenizer.json of the same checkpoint"
            )
        self.vocab_size = size if vocab_size is None else vocab_size
        self.eos_ids = _end_ids(self._tokenizer, eos, self.vocab_size)
        self.special_ids = tuple(
            sorted({i for i, token in added.items() if token.special} | set(self.eos_ids))
        )
        self._added = {i: token.content for i, token in added.items()}
        self.special_tokens = {name: i for i in self.special_ids if (name := self._tokenizer.id_to_token(i))}
        self._spelling = _spelling(json.loads(self._tokenizer.to_str()))
        self._chat = None if chat_template is None else ChatTemplate(chat_template, variables)

    @classmethod
    def from_folder(cls, folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
        """Return the tokenizer of a checkpoint folder, with its end tokens and its chat template.

        Args:
            folder: a folder with ``tokenizer.json``; ``tokenizer_config.json``, ``special_tokens_map.json``,
                ``generation_config.json``, ``config.json`` and ``chat_template.jinja`` are read if they exist.
            vocab_size: V of the model.

        Raises:
            FileNotFoundError: there is no ``tokenizer.json``.
            ValueError: see the class.
        """
        folder = Path(folder)
        settings = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
        names = {
            k: _content(v) for k, v in settings.items() if k.endswith("_token") and _content(v) is not None
        }
        eos: list[str | int] = []
        for file in ("generation_config.json", "config.json"):
            entry = _json(folder / file).get("eos_token_id")
            ids = [] if entry is None else entry if isinstance(entry, list) else [entry]
            if not all(isinstance(end, int) for end in ids):
                raise ValueError(
                    f"{folder / file}: eos_token_id must be a number, or several; got {shortened(entry)}"
                )
            eos += [] if eos else ids
        eos += [names["eos_token"]] if isinstance(names.get("eos_token"), str) else []
        template = folder / "chat_template.jinja"
        with reading(template if template.is_file() else folder / "tokenizer_config.json", "copy it again"):
            text = (
                template.read_text(encoding="utf-8")
                if template.is_file()
                else _default_template(settings.get("chat_template"))
            )
            if text is not None:
                ChatTemplate(text, names)  # parsed here too, so that an error names the file
        with reading(folder / "tokenizer.json", "copy the files of the tokenizer again"):
            return cls(folder / "tokenizer.json", eos or None, text, names, vocab_size)

    def encode(self, text: str, special: bool = True) -> np.ndarray:
        """Return the ids (T,) int32 of a text.

        Args:
            text: text to encode; names of special tokens inside it become these tokens (in the messages of a chat,
                ``tokens.encode_chat``, they do not).
            special: add the tokens that the tokenizer adds at the ends, such as a beginning-of-text token, unless the
                text begins with them already, as a rendered template does.

        Raises:
            ValueError: the vocabulary has no token for a character of the text.
        """
        try:
            plain = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"the text cannot be encoded: {error}. {self._alphabet()}") from error
        if (lost := _first_lost(text, plain.offsets)) is not None:
            alphabet = set("".join(self._tokenizer.get_vocab(with_added_tokens=True)))
            lost = next((i for i, c in enumerate(text) if _is_visible(c) and c not in alphabet), lost)
            raise ValueError(
                f"no token stands for {text[lost]!r} at position {lost} of the text. {self._alphabet()}"
            )
        ids = self._tokenizer.encode(text, add_special_tokens=True).ids if special else plain.ids
        return np.asarray(ids[_num_repeated(ids, plain.ids) :], np.int32)

    def _alphabet(self) -> str:
        """Say what a text may contain, if the vocabulary is short enough to be listed."""
        names = sorted(set(self._tokenizer.get_vocab(with_added_tokens=False)) - set(self.special_tokens))
        if len(names) > 64:
            return "Leave out such characters, or use the tokenizer of the model"
        return f"The text may contain nothing but {', '.join(map(repr, names))}"

    def decode(self, ids: Any) -> str:
        """Return the text of ids; special tokens add nothing, and bytes that are no character become ``�``.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(f"ids must be 0 ... {self.vocab_size - 1}, got {shortened(ids.tolist())}")
        if self._spelling == "bytes":
            return b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")
        special = set(self.special_ids)
        return self._tokenizer.decode([int(i) for i in ids if i not in special], skip_special_tokens=True)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each token adds to a text before it; empty for special tokens."""
        names = {
            i: name for name, i in self._tokenizer.get_vocab(with_added_tokens=True).items()
        } | self._added
        if self._spelling == "bytes":
            table = _bytes_of_characters()
            spell = lambda name: b"".join(table.get(c) or c.encode() for c in name)  # noqa: E731
        elif self._spelling == "pieces":
            spell = _spell_piece
        else:
            spell = self._decoded_bytes(names).__getitem__
        spelled = {
            i: self._added[i].encode() if i in self._added else spell(name) for i, name in names.items()
        }
        for i in self.special_ids:
            spelled[i] = b""
        return [spelled.get(i, b"") for i in range(self.vocab_size)]

    def _decoded_bytes(self, names: Mapping[int, str]) -> dict[str, bytes]:
        """Return what the decoder adds for each token between two plain tokens (at an end it may differ)."""
        plain, ids = self._neighbor(names), list(names)
        before = self._tokenizer.decode([plain], skip_special_tokens=False)
        behind = self._tokenizer.decode([plain, plain], skip_special_tokens=False).removeprefix(before)
        texts = self._tokenizer.decode_batch([[plain, i, plain] for i in ids], skip_special_tokens=False)
        return {
            names[i]: (
                text[len(before) : len(text) - len(behind)]
                if text.startswith(before)
                and text.endswith(behind)
                and len(text) >= len(before) + len(behind)
                else names[i]
            ).encode()
            for i, text in zip(ids, texts, strict=True)
        }

    def _neighbor(self, names: Mapping[int, str]) -> int:
        """Return a plain token that adds no space when repeated, if there is one among the first."""
        candidates = [i for i in sorted(names) if i not in self._added][:256] or [0]
        once = self._tokenizer.decode_batch([[i] for i in candidates], skip_special_tokens=False)
        twice = self._tokenizer.decode_batch([[i, i] for i in candidates], skip_special_tokens=False)
        triples = zip(candidates, once, twice, strict=True)
        seamless = (i for i, one, two in triples if one.strip() and two == one + one)
        return next(seamless, candidates[0])

    def render(
        self,
        messages: Any,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt of a chat, by the template of the checkpoint.

        Args:
            messages: a string (one message of the user), or messages with ``role`` and ``content``.
            add_generation_prompt: end with the header of the assistant's answer.
            **variables: other variables of the template.

        Raises:
            ValueError: there is no template, or it fails.
        """
        if self._chat is None:
            raise ValueError(
                "this checkpoint has no chat template: it may be a base model, so use chat=False, "
                "or give one with chat_template=..."
            )
        return self._chat.render(messages, add_generation_prompt, **variables)


def _read(source: Any) -> Any:
    """Read a tokenizer from a file or from text, or copy one."""
    library = import_extra("tokenizers", "lm")
    if isinstance(source, library.Tokenizer):
        return library.Tokenizer.from_str(source.to_str())
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"expected the path of a tokenizer.json, or its text; got {shortened(source)}")
    is_text, name = isinstance(source, str) and source.lstrip().startswith("{"), "this"
    if not is_text:
        file = Path(source)
        if not file.is_file():
            raise FileNotFoundError(
                f"there is no {file}; a checkpoint needs the tokenizer.json of its fast tokenizer "
                "(a tokenizer.model alone is not read: convert it once)"
            )
        name = str(file)
        with reading(file, "copy it again"):
            source = file.read_text(encoding="utf-8")
    with reading(name, f"{name} is no tokenizer.json: copy it again"):
        return library.Tokenizer.from_str(source)


def _first_lost(text: str, offsets: Any) -> int | None:
    """Return the position of the first visible character of a text that is in no token."""
    covered = 0
    for start, stop in [*sorted(offsets), (len(text), len(text))]:
        for position in range(covered, start):
            if _is_visible(text[position]):
                return position
        covered = max(covered, stop)
    return None


def _is_visible(character: str) -> bool:
    """Whether a character is a letter, number, punctuation or symbol, and not a space, combining mark or control."""
    return unicodedata.category(character)[0] in "LNPS"


def _num_repeated(ids: list[int], plain: list[int]) -> int:
    """Return how many tokens the tokenizer has added before a text that begins with them already."""
    for size in range(1, len(ids) - len(plain) + 1):
        if ids[size : size + len(plain)] == plain:
            return size if plain[:size] == ids[:size] else 0
    return 0


def _end_ids(tokenizer: Any, eos: Any, size: int) -> tuple[int, ...]:
    """Return the ids of the tokens that end a text."""
    if eos is None:
        return tuple(sorted(i for i in map(tokenizer.token_to_id, _USUAL_END_TOKENS) if i is not None))
    ids = set()
    for end in [eos] if isinstance(eos, (str, int)) else list(eos):
        token_id = tokenizer.token_to_id(end) if isinstance(end, str) else int(end)
        if token_id is None or not 0 <= token_id < size:
            raise ValueError(f"the end token {end!r} is not in the vocabulary of {size} tokens")
        ids.add(token_id)
    return tuple(sorted(ids))


def _spelling(content: Mapping[str, Any]) -> str:
    """Return how tokens spell bytes: ``"bytes"``, ``"pieces"``, or ``"decoder"`` if only the decoder knows."""
    parts = json.dumps([content.get("decoder"), content.get("pre_tokenizer")], ensure_ascii=False)
    if '"ByteLevel"' in parts:
        return "bytes"
    fallback = content.get("model", {}).get("byte_fallback")
    return "pieces" if fallback or _SPACE in parts or '"Metaspace"' in parts else "decoder"


def _spell_piece(name: str) -> bytes:
    """Return the bytes of a piece in the spelling of sentencepiece."""
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(_SPACE, " ").encode()


def _bytes_of_characters() -> dict[str, bytes]:
    """Return GPT-2's alphabet: printable bytes are spelled by themselves, the others by characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


def _json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file; an empty one if there is no such file.

    Raises:
        ValueError: the file does not contain a JSON object.
    """
    if not file.is_file():
        return {}
    with reading(file, "copy it again"):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"it is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"it must contain a JSON object, got {shortened(content)}")
        return content


def _content(value: Any) -> Any:
    """Return the name of a special token, which is given as text or as an object with its content."""
    return value.get("content") if isinstance(value, dict) else value


def _default_template(template: Any) -> str | None:
    """Return the template, or the default one of a list of named templates."""
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"a chat template must be a text, got {shortened(template)}")
    return template
