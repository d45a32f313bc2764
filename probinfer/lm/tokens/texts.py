"""Between text and tokens in context: what tokens add to a text, and chats whose content is never a command.

A tokenizer's own ``decode`` reads a text from its beginning, and some drop the space before its first word. Tokens that
follow a prompt are read here byte by byte, so that rewards, constraints, answers and results see one string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from probinfer.lm.tokens.chat import as_messages

__all__ = ["continuation", "encode_chat"]

_OPEN, _CLOSE = "\ue000", "\ue001"  # of the private use area: no character of any text


def continuation(tokenizer: Any, ids: Any) -> str:
    """What ids add to the text before them; a tokenizer that does not say the bytes of tokens decodes them alone."""
    ids = np.asarray(ids, np.int64).reshape(-1)
    spelled: Sequence[bytes] | None = getattr(tokenizer, "token_bytes", None)
    if spelled is None:
        return tokenizer.decode(ids)
    return b"".join(spelled[i] for i in ids).decode(errors="replace")


def encode_chat(tokenizer: Any, messages: Any) -> np.ndarray:
    """Ids (T,) int32 of a chat: special tokens are those of the template, never those that a message names.

    A message that holds ``<|im_end|>`` speaks of these ten characters; it does not end its turn.

    Args:
        tokenizer: with ``render`` and ``encode``.
        messages: a string (one message of the user), or messages with ``role`` and ``content``.

    Raises:
        TypeError: ``messages`` is neither.
        ValueError: there is no template, it fails, or the name of a special token cannot be spelled by others.
    """
    messages = as_messages(messages)
    names = sorted(getattr(tokenizer, "special_tokens", {}), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    found = sorted({name for message in messages for name in _named(message["content"], pattern)})
    if not found:
        return tokenizer.encode(tokenizer.render(messages), special=False)
    guarded = [
        message
        | {
            "content": _mapped(
                message["content"],
                lambda text: pattern.sub(lambda hit: f"{_OPEN}{found.index(hit[0])}{_CLOSE}", text),
            )
        }
        for message in messages
    ]
    first, *rest = re.split(f"{_OPEN}([0-9]+){_CLOSE}", tokenizer.render(guarded))
    parts = [tokenizer.encode(first, special=False)]
    for number, text in zip(rest[::2], rest[1::2], strict=True):
        parts += [_spelled(tokenizer, found[int(number)].encode()), _encode_behind(tokenizer, text)]
    return np.concatenate(parts).astype(np.int32)


def _mapped(content: Any, change: Callable[[str], str]) -> Any:
    """The content of a message, changed wherever it is text: a string, or parts that hold strings."""
    if isinstance(content, str):
        return change(content)
    if isinstance(content, Mapping):
        return {key: _mapped(value, change) for key, value in content.items()}
    return [_mapped(part, change) for part in content] if isinstance(content, (list, tuple)) else content


def _named(content: Any, pattern: re.Pattern) -> set[str]:
    found: set[str] = set()

    def look(text: str) -> str:
        found.update(pattern.findall(text))
        return text

    _mapped(content, look)
    return found


def _encode_behind(tokenizer: Any, text: str) -> np.ndarray:
    """Ids of a text that stands behind another: without the space that a tokenizer writes before a first word."""
    ids = np.asarray(tokenizer.encode(text, special=False), np.int32)
    first = tokenizer.token_bytes[ids[0]] if len(ids) else b""
    if not first.startswith(b" ") or text.startswith(" "):
        return ids
    return np.concatenate([_spelled(tokenizer, first[1:]), ids[1:]]) if len(first) > 1 else ids[1:]


def _spelled(tokenizer: Any, text: bytes) -> np.ndarray:
    """Ids of plain tokens that spell a text, the longest that fits first.

    Raises:
        ValueError: none fits.
    """
    special = set(tokenizer.special_tokens.values())
    known = {token: i for i, token in enumerate(tokenizer.token_bytes) if token and i not in special}
    ids, at = [], 0
    while at < len(text):
        size = next((n for n in range(len(text) - at, 0, -1) if text[at : at + n] in known), 0)
        if not size:
            name = text.decode(errors="replace")
            raise ValueError(
                f"a message holds {name!r}, which is a special token of this model, and no other tokens spell it: "
                "take it out of the message"
            )
        ids.append(known[text[at : at + size]])
        at += size
    return np.asarray(ids, np.int32)
