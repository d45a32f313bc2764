"""Chat templates: from messages to one prompt, by the template of a checkpoint.

A template is an untrusted program, so it runs in Jinja's immutable sandbox, where it can do nothing but build text, and
in a process of its own, within limits of time and memory (``renderer``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from probinfer.core.errors import import_extra, shortened
from probinfer.lm.tokens import renderer
from probinfer.lm.tokens.template import environment

__all__ = ["ChatTemplate", "as_messages"]

_MAX_CHARACTERS = 2**20  # of a template; those of checkpoints have some thousand
_ADVICE = "give another with chat_template=..., or prompts as plain text"


def as_messages(prompt: Any) -> list[dict[str, Any]]:
    """Return a prompt as a list of messages: a string is one message of the user.

    Raises:
        TypeError: it is neither a string nor messages with a ``role`` and a ``content``.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = list(prompt) if isinstance(prompt, Sequence) else []
    if not messages or not all(map(_is_message, messages)):
        raise TypeError(
            "a chat is a string or a list of messages like {'role': 'user', 'content': 'text'}; "
            f"got {shortened(prompt)}"
        )
    return [dict(message) for message in messages]


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message


class ChatTemplate:
    """A Jinja template with the variables of its tokenizer.

    Args:
        source: text of the template.
        variables: variables of the template beside the messages, such as ``bos_token`` and ``eos_token``.

    Raises:
        ValueError: the template does not parse.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None):
        jinja2 = import_extra("jinja2", "lm")
        self.source, self.variables = source, dict(variables or {})
        if len(source) > _MAX_CHARACTERS:
            raise ValueError(f"the chat template has {len(source)} characters, which is too many; {_ADVICE}")
        try:
            environment().parse(source)  # only parsed: compiling would evaluate its constant expressions
        except RecursionError as error:
            raise ValueError(f"the chat template is nested too deeply; {_ADVICE}") from error
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", None)
            raise ValueError(f"the chat template does not parse: {error} (line {line}); {_ADVICE}") from error

    def render(
        self,
        messages: Any,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt of a chat.

        Args:
            messages: a string (one message of the user), or messages with ``role`` and ``content``.
            add_generation_prompt: end with the header of the assistant's answer.
            **variables: other variables of the template, such as ``enable_thinking=False``.

        Returns:
            The text; it contains the special tokens of the template, so encode it without adding others.

        Raises:
            TypeError: ``messages`` is neither.
            ValueError: the template fails on these messages, or takes too much time or memory.
        """
        messages = as_messages(messages)
        settings = {"tools": None, "documents": None, **self.variables, **variables}
        settings |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return renderer.render(self.source, settings)
        except renderer.TemplateError as error:
            raise ValueError(
                f"the chat template refused these messages: {error}; roles were "
                f"{[message['role'] for message in messages]}. Many templates expect user and assistant in turns and "
                "no other role; or pass the prompt as plain text"
            ) from error
