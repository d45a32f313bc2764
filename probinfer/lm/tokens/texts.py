"""Text and tokens in context: the text that tokens add to a prompt, and chats whose content is never a command.

The ``decode`` of a tokenizer decodes a text from its start, and some drop the space before the first word. Tokens that
follow a prompt are decoded here byte by byte, so that rewards, constraints, answers and results get the same string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from probinfer.lm.tokens.chat import as_messages

__all__ = ["continuation", "encode_chat"]

_OPEN, _CLOSE = "\ue000", "\ue001"  # characters of the private use area, which no text contains


def continuation(tokenizer: Any, ids: Any) -> str:
    """Return the text that ids add to the text before them.

    A tokenizer that does not give the bytes of its tokens decodes the ids alone.
    """
    ids = np.asarray(ids, np.int64).reshape(-1)
    token_bytes: Sequence[bytes] | None = getattr(tokenizer, "token_bytes", None)
    if token_bytes is None:
        return tokenizer.decode(ids)
    return b"".join(token_bytes[i] for i in ids).decode(errors="replace")


def encode_chat(tokenizer: Any, messages: Any) -> np.ndarray:
    """Return the ids (T,) int32 of a chat: special tokens come from the template alone, never from a message.

    A message with the text ``<|im_end|>`` contains these ten characters; it does not end its turn.

    Args:
        tokenizer: an object with ``render`` and ``encode``.
        messages: a string (one message of the user), or messages with ``role`` and ``content``.

    Raises:
        TypeError: ``messages`` is neither.
        ValueError: there is no template, it fails, or the name of a special token cannot be spelled by other tokens.
    """
    messages = as_messages(messages)
    special = sorted(getattr(tokenizer, "special_tokens", {}), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, special)) or r"(?!)")
    names = sorted({name for message in messages for name in _names_in(message["content"], pattern)})
    if not names:
        return tokenizer.encode(tokenizer.render(messages), special=False)

    def guard(text: str) -> str:
        """Replace names of special tokens by marks, which the template passes on unchanged."""
        return pattern.sub(lambda match: f"{_OPEN}{names.index(match[0])}{_CLOSE}", text)

    guarded = [message | {"content": _map_text(message["content"], guard)} for message in messages]
    first, *rest = re.split(f"{_OPEN}([0-9]+){_CLOSE}", tokenizer.render(guarded))
    parts = [tokenizer.encode(first, special=False)]
    for number, text in zip(rest[::2], rest[1::2], strict=True):
        parts += [_spell(tokenizer, names[int(number)].encode()), _encode_continuation(tokenizer, text)]
    return np.concatenate(parts).astype(np.int32)


def _map_text(content: Any, change: Callable[[str], str]) -> Any:
    """Apply a function to all text in the content of a message: a string, or parts that contain strings."""
    if isinstance(content, str):
        return change(content)
    if isinstance(content, Mapping):
        return {key: _map_text(value, change) for key, value in content.items()}
    return [_map_text(part, change) for part in content] if isinstance(content, (list, tuple)) else content


def _names_in(content: Any, pattern: re.Pattern) -> set[str]:
    names: set[str] = set()

    def collect(text: str) -> str:
        names.update(pattern.findall(text))
        return text

    _map_text(content, collect)
    return names


def _encode_continuation(tokenizer: Any, text: str) -> np.ndarray:
    """Return the ids of a text that follows another, without the space that a tokenizer adds before a first word."""
    ids = np.asarray(tokenizer.encode(text, special=False), np.int32)
    first = tokenizer.token_bytes[ids[0]] if len(ids) else b""
    if not first.startswith(b" ") or text.startswith(" "):
        return ids
    return np.concatenate([_spell(tokenizer, first[1:]), ids[1:]]) if len(first) > 1 else ids[1:]


def _spell(tokenizer: Any, text: bytes) -> np.ndarray:
    """Return ids of plain tokens that spell a text, the longest token that fits first.

    Raises:
        ValueError: no token fits.
    """
    special = set(tokenizer.special_tokens.values())
    plain = {token: i for i, token in enumerate(tokenizer.token_bytes) if token and i not in special}
    ids, position = [], 0
    while position < len(text):
        sizes = range(len(text) - position, 0, -1)
        size = next((n for n in sizes if text[position : position + n] in plain), 0)
        if not size:
            name = text.decode(errors="replace")
            raise ValueError(
                f"a message contains {name!r}, which is a special token of this model, and no other tokens spell it: "
                "remove it from the message"
            )
        ids.append(plain[text[position : position + size]])
        position += size
    return np.asarray(ids, np.int32)
