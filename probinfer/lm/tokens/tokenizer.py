r"""The tokenizer of a checkpoint: a ``tokenizer.json``, and the bytes that each of its tokens adds to a text.

Three ways to write bytes as tokens are in use. *Byte-level* BPE spells every byte as a printable character (a fixed
table of GPT-2). *Sentencepiece* writes a space as ``▁`` and falls back to tokens ``<0x0A>``. What is left (words,
word pieces) is asked from the decoder itself: the bytes of a token are what it appends to the text of another.
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

_MOST_TOKENS = 2**24
_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_USUAL_ENDS = (
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
    """Text to ids and back, as a ``tokenizer.json`` says.

    Args:
        source: the path of a ``tokenizer.json``, its text, or a ``tokenizers.Tokenizer``.
        eos: the tokens that end a text, by name or id; without it the usual names that the vocabulary has.
        chat_template: the Jinja template of chats.
        variables: what the template may name, such as ``bos_token``.
        vocab_size: V of the model, when its logits are padded beyond the vocabulary: the ids behind it add nothing.

    Raises:
        TypeError: ``source`` is none of these.
        FileNotFoundError: there is no such file.
        ValueError: no tokenizer; an ``eos`` that the vocabulary lacks; a model that is smaller than the vocabulary.

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
        if size > _MOST_TOKENS:
            raise ValueError(
                f"the tokenizer has a token of number {size - 1}, which no model has; copy it again"
            )
        if vocab_size is not None and vocab_size < size:
            raise ValueError(
                f"the tokenizer has {size} tokens and the model only {vocab_size}: they do not belong together; "
                "take the tokenizer.json of the same checkpoint"
            )
        self.vocab_size = size if vocab_size is None else vocab_size
        self.eos_ids = _end_ids(self._tokenizer, eos, self.vocab_size)
        self.special_ids = tuple(
            sorted({i for i, token in added.items() if token.special} | set(self.eos_ids))
        )
        self._added = {i: token.content for i, token in added.items()}
        self.special_tokens = {name: i for i in self.special_ids if (name := self._tokenizer.id_to_token(i))}
        self._kind = _kind(json.loads(self._tokenizer.to_str()))
        self._chat = None if chat_template is None else ChatTemplate(chat_template, variables)

    @classmethod
    def from_folder(cls, folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
        """The tokenizer of a checkpoint folder, with its end tokens and its chat template.

        Args:
            folder: with ``tokenizer.json``; ``tokenizer_config.json``, ``special_tokens_map.json``,
                ``generation_config.json``, ``config.json`` and ``chat_template.jinja`` are read where they are.
            vocab_size: V of the model.

        Raises:
            FileNotFoundError: no ``tokenizer.json``.
            ValueError: see the class.
        """
        folder = Path(folder)
        settings = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
        names = {
            k: _content(v) for k, v in settings.items() if k.endswith("_token") and _content(v) is not None
        }
        ends: list[str | int] = []
        for file in ("generation_config.json", "config.json"):
            found = _json(folder / file).get("eos_token_id")
            said = [] if found is None else found if isinstance(found, list) else [found]
            if not all(isinstance(end, int) for end in said):
                raise ValueError(
                    f"{folder / file}: eos_token_id must be a number, or several; got {shortened(found)}"
                )
            ends += [] if ends else said
        ends += [names["eos_token"]] if isinstance(names.get("eos_token"), str) else []
        template = folder / "chat_template.jinja"
        with reading(template if template.is_file() else folder / "tokenizer_config.json", "copy it again"):
            text = (
                template.read_text(encoding="utf-8")
                if template.is_file()
                else _named(settings.get("chat_template"))
            )
            if text is not None:
                ChatTemplate(text, names)  # which says here, with the name of the file, what is wrong with it
        with reading(folder / "tokenizer.json", "copy the files of the tokenizer again"):
            return cls(folder / "tokenizer.json", ends or None, text, names, vocab_size)

    def encode(self, text: str, special: bool = True) -> np.ndarray:
        """Ids (T,) int32 of a text.

        Args:
            text: what to encode; names of special tokens inside it become these tokens (in the messages of a chat,
                ``tokens.encode_chat``, they do not).
            special: add what the tokenizer adds at the ends, such as a beginning-of-text token, if the text does not
                begin with it; a rendered template does.

        Raises:
            ValueError: no token stands for a character of the text.
        """
        try:
            plain = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"the text cannot be encoded: {error}. {self._alphabet()}") from error
        if (lost := _first_lost(text, plain.offsets)) is not None:
            known = set("".join(self._tokenizer.get_vocab(with_added_tokens=True)))
            lost = next(
                (at for at in range(len(text)) if _is_visible(text[at]) and text[at] not in known), lost
            )
            raise ValueError(
                f"no token stands for {text[lost]!r} at position {lost} of the text. {self._alphabet()}"
            )
        ids = self._tokenizer.encode(text, add_special_tokens=True).ids if special else plain.ids
        return np.asarray(ids[_doubled(ids, plain.ids) :], np.int32)

    def _alphabet(self) -> str:
        """What a text may hold, of a vocabulary that can be listed."""
        names = sorted(set(self._tokenizer.get_vocab(with_added_tokens=False)) - set(self.special_tokens))
        if len(names) > 64:
            return "Leave out such characters, or take the tokenizer of the model"
        return f"The text may hold nothing but {', '.join(map(repr, names))}"

    def decode(self, ids: Any) -> str:
        """The text of ids; special tokens add nothing, and bytes that are no character become ``�``.

        Raises:
            ValueError: an id outside of the vocabulary.
        """
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(f"ids must be 0 ... {self.vocab_size - 1}, got {shortened(ids.tolist())}")
        if self._kind == "bytes":
            return b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")
        hidden = set(self.special_ids)
        return self._tokenizer.decode([int(i) for i in ids if i not in hidden], skip_special_tokens=True)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """What each token adds to a text that stands before it: bytes, none for special tokens."""
        names = {
            i: name for name, i in self._tokenizer.get_vocab(with_added_tokens=True).items()
        } | self._added
        if self._kind == "bytes":
            table = _bytes_of_characters()
            spell = lambda name: b"".join(table.get(c) or c.encode() for c in name)  # noqa: E731
        elif self._kind == "pieces":
            spell = _spell_piece
        else:
            spell = self._asked(names).__getitem__
        spelled = {
            i: self._added[i].encode() if i in self._added else spell(name) for i, name in names.items()
        }
        for i in self.special_ids:
            spelled[i] = b""
        return [spelled.get(i, b"") for i in range(self.vocab_size)]

    def _asked(self, names: Mapping[int, str]) -> dict[str, bytes]:
        """What each token adds between two plain tokens, by the decoder: its last token may be spelled otherwise."""
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
        """A plain token that brings no space of its own to a seam, if one of the first is such."""
        some = [i for i in sorted(names) if i not in self._added][:256] or [0]
        alone = self._tokenizer.decode_batch([[i] for i in some], skip_special_tokens=False)
        twice = self._tokenizer.decode_batch([[i, i] for i in some], skip_special_tokens=False)
        seamless = (
            i for i, one, two in zip(some, alone, twice, strict=True) if one.strip() and two == one + one
        )
        return next(seamless, some[0])

    def render(
        self,
        messages: Any,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a chat, by the template of the checkpoint.

        Args:
            messages: a string (one message of the user), or messages with ``role`` and ``content``.
            add_generation_prompt: end with the header of the assistant's answer.
            **variables: what else the template knows.

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
    """A tokenizer from a path, from text, or as it is."""
    library = import_extra("tokenizers", "lm")
    if isinstance(source, library.Tokenizer):
        return library.Tokenizer.from_str(source.to_str())
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"expected the path of a tokenizer.json, or its text; got {shortened(source)}")
    is_text, name = isinstance(source, str) and source.lstrip().startswith("{"), "this"
    if not is_text:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {path}; a checkpoint needs the tokenizer.json of its fast tokenizer "
                "(a tokenizer.model alone is not read: convert it once)"
            )
        name = str(path)
        with reading(path, "copy it again"):
            source = path.read_text(encoding="utf-8")
    with reading(name, f"{name} is no tokenizer.json: copy it again"):
        return library.Tokenizer.from_str(source)


def _first_lost(text: str, offsets: Any) -> int | None:
    """The first letter, number, sign or symbol of a text that lies in no token."""
    reached = 0
    for start, stop in [*sorted(offsets), (len(text), len(text))]:
        for at in range(reached, start):
            if _is_visible(text[at]):
                return at
        reached = max(reached, stop)
    return None


def _is_visible(character: str) -> bool:
    """Whether it is a letter, a number, a sign or a symbol: no space, no accent by itself, nothing that controls."""
    return unicodedata.category(character)[0] in "LNPS"


def _doubled(ids: list[int], plain: list[int]) -> int:
    """How many tokens the tokenizer has added before a text that begins with them already."""
    for size in range(1, len(ids) - len(plain) + 1):
        if ids[size : size + len(plain)] == plain:
            return size if plain[:size] == ids[:size] else 0
    return 0


def _end_ids(tokenizer: Any, eos: Any, size: int) -> tuple[int, ...]:
    """Ids of the tokens that end a text."""
    if eos is None:
        return tuple(sorted(i for i in map(tokenizer.token_to_id, _USUAL_ENDS) if i is not None))
    ids = set()
    for end in [eos] if isinstance(eos, (str, int)) else list(eos):
        found = tokenizer.token_to_id(end) if isinstance(end, str) else int(end)
        if found is None or not 0 <= found < size:
            raise ValueError(f"the end token {end!r} is not in the vocabulary of {size} tokens")
        ids.add(found)
    return tuple(sorted(ids))


def _kind(content: Mapping[str, Any]) -> str:
    """How tokens spell bytes: ``"bytes"``, ``"pieces"``, or ``"asked"`` of the decoder."""
    parts = json.dumps([content.get("decoder"), content.get("pre_tokenizer")], ensure_ascii=False)
    if '"ByteLevel"' in parts:
        return "bytes"
    fallback = content.get("model", {}).get("byte_fallback")
    return "pieces" if fallback or _SPACE in parts or '"Metaspace"' in parts else "asked"


def _spell_piece(name: str) -> bytes:
    """Bytes of a piece in sentencepiece's spelling."""
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(_SPACE, " ").encode()


def _bytes_of_characters() -> dict[str, bytes]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


def _json(path: Path) -> dict[str, Any]:
    """A JSON file, or nothing where there is none.

    Raises:
        ValueError: the file is no JSON object.
    """
    if not path.is_file():
        return {}
    with reading(path, "copy it again"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"it is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"it must hold a JSON object, got {shortened(content)}")
        return content


def _content(value: Any) -> Any:
    """A special token by name: as text or as an object with its content."""
    return value.get("content") if isinstance(value, dict) else value


def _named(template: Any) -> str | None:
    """One template, or the default one of a list of named templates."""
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"a chat template is a text, got {shortened(template)}")
    return template
