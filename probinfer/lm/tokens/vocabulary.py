"""A vocabulary given as a tuple of strings: for tabular models, tests, and languages of a few words."""

from __future__ import annotations

from typing import Any

import numpy as np

from probinfer.core.errors import shortened
from probinfer.lm.tokens.chat import ChatTemplate

__all__ = ["Vocabulary"]


class Vocabulary:
    """Tokens that are strings; text is cut greedily into the longest tokens.

    Args:
        tokens: an iterable with the text of each token, all different and not empty.
        eos: the token, or tokens, that end a text; they add nothing to it.
        chat_template: a Jinja template for ``render``, if the model was trained on chats.

    Raises:
        TypeError: a token is not a string.
        ValueError: there are no tokens, two are equal, one is empty, or ``eos`` is not among them.

    Example:
        >>> from probinfer.lm import tokens
        >>> words = tokens.Vocabulary(("1", "+", "11", "."), eos=".")
        >>> words.encode("11+1.").tolist(), words.decode([2, 1, 0, 3]), words.eos_ids
        ([2, 1, 0, 3], '11+1', (3,))
    """

    def __init__(self, tokens: Any, eos: Any = None, chat_template: str | None = None):
        self.tokens = tuple(tokens)
        if not all(isinstance(token, str) for token in self.tokens):
            raise TypeError(f"tokens must be strings, got {shortened(self.tokens)}")
        if not self.tokens or not all(self.tokens) or len(set(self.tokens)) < len(self.tokens):
            raise ValueError(f"tokens must be different and none empty, got {shortened(self.tokens)}")
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        ends = () if eos is None else (eos,) if isinstance(eos, str) else tuple(eos)
        unknown = [end for end in ends if end not in self._ids]
        if unknown:
            raise ValueError(
                f"eos must be one of the tokens; {shortened(unknown)} is not among {shortened(self.tokens)}"
            )
        self.eos_ids = tuple(sorted(self._ids[end] for end in ends))
        self.token_bytes = [
            b"" if i in self.eos_ids else token.encode() for i, token in enumerate(self.tokens)
        ]
        self.special_tokens = {self.tokens[i]: i for i in self.eos_ids}
        self._max_length = max(map(len, self.tokens))
        self._chat = (
            None if chat_template is None else ChatTemplate(chat_template, {"eos_token": ends and ends[0]})
        )

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.tokens)

    def encode(self, text: str, special: bool = True) -> np.ndarray:
        """Return the ids (T,) int32 of a text, at each position the longest token that fits.

        Args:
            text: text to encode; an ``eos`` inside it becomes its token.
            special: not used, since there are no special tokens to add; part of the protocol.

        Raises:
            ValueError: no token fits at some position.
        """
        ids, position = [], 0
        while position < len(text):
            sizes = range(min(self._max_length, len(text) - position), 0, -1)
            size = next((n for n in sizes if text[position : position + n] in self._ids), 0)
            if not size:
                raise ValueError(
                    f"no token fits at position {position}, before {shortened(text[position : position + 20])}; "
                    f"the tokens are {shortened(self.tokens)}"
                )
            ids.append(self._ids[text[position : position + size]])
            position += size
        return np.asarray(ids, np.int32)

    def decode(self, ids: Any) -> str:
        """Return the text of ids; end tokens add nothing.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(f"ids must be 0 ... {self.vocab_size - 1}, got {shortened(ids.tolist())}")
        return b"".join(self.token_bytes[i] for i in ids).decode()

    def render(
        self,
        messages: Any,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt of a chat, by the template.

        Raises:
            ValueError: there is no template.
        """
        if self._chat is None:
            raise ValueError(
                "this vocabulary has no chat template: pass chat_template=..., or use chat=False"
            )
        return self._chat.render(messages, add_generation_prompt, **variables)
