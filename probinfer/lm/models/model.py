"""A language model for users: the network, its tokenizer, and a reward model if it has one."""

from __future__ import annotations

from typing import Any

from probinfer.core.errors import shortened
from probinfer.core.types import field, pytree
from probinfer.lm.models.base import LanguageModel

__all__ = ["Model", "check_model"]


@pytree
class Model:
    """A network with its tokenizer, as ``lm.load`` and ``lm.reasoner`` return it.

    Attributes:
        network: a ``LanguageModel``; its weights are leaves.
        tokenizer: ``lm.Tokenizer`` or ``lm.Vocabulary``; static.
        reward: a reward model (a ``Score``), or None.
        answer: text -> answer or None, for the way this model writes answers; None: ``lm.answers.last_boxed``; static.
        read_task: text -> prompt, for a model of one kind of task: it parses texts that the tokenizer refuses, or
            raises an error that says what can be asked; None: there is no such task; static.

    Raises:
        TypeError: the network or the tokenizer lacks a function of the protocol.
        ValueError: the tokenizer has tokens that the network does not know.
    """

    network: Any
    tokenizer: Any = field(static=True)
    reward: Any = None
    answer: Any = field(static=True, default=None)
    read_task: Any = field(static=True, default=None)

    def __post_init__(self):
        if not isinstance(self.network, LanguageModel):
            raise TypeError(
                f"expected a language model (lm.load(folder), lm.Tabular, ...: prefill, init_cache, extend, head, "
                f"gather), got {shortened(self.network)}"
            )
        if not all(hasattr(self.tokenizer, name) for name in ("vocab_size", "encode", "decode")):
            raise TypeError(
                f"expected a tokenizer (lm.Tokenizer(path), lm.Vocabulary(...)), got {shortened(self.tokenizer)}"
            )
        num_tokens, num_logits = self.tokenizer.vocab_size, self.network.vocab_size
        if num_tokens > num_logits:
            raise ValueError(
                f"the tokenizer has {num_tokens} tokens and the network only {num_logits}: they do not belong together"
            )

    def __repr__(self) -> str:
        reward = "" if self.reward is None else "; reward model"
        return f"Model({shortened(self.network)}{reward})"


def check_model(model: Any) -> None:
    """Refuse anything that is not a model.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(model, Model):
        raise TypeError(f"expected a model of lm.load(folder) or lm.reasoner(), got {shortened(model)}")
