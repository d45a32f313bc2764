"""Chat templates: messages to one prompt, by the template that a checkpoint brings.

A template is a program of somebody else, so it runs in Jinja's immutable sandbox: it can build text and nothing more.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from probinfer.errors import import_extra, shortened

__all__ = ["ChatTemplate", "as_messages"]


def as_messages(prompt: Any) -> list[dict[str, Any]]:
    """A prompt as a list of messages: a string is one message of the user.

    Raises:
        TypeError: neither a string nor messages with a ``role`` and a ``content``.
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


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as it stands: Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _environment() -> Any:
    """A sandbox with the helpers that templates of checkpoints expect."""
    sandbox = import_extra("jinja2.sandbox", "lm").ImmutableSandboxedEnvironment
    extension = import_extra("jinja2.ext", "lm").Extension

    class Generation(extension):
        """Marks around generated text, which only training uses: the text stays, the marks go."""

        tags = {"generation"}  # noqa: RUF012 (the name and the form that Jinja asks for)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


class ChatTemplate:
    """A Jinja template with the variables of its tokenizer.

    Args:
        source: text of the template.
        variables: what the template may name beside the messages, such as ``bos_token`` and ``eos_token``.

    Raises:
        ValueError: the template does not parse.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None):
        jinja2 = import_extra("jinja2", "lm")
        self.source, self.variables = source, dict(variables or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", None)
            raise ValueError(
                f"the chat template does not parse: {error} (line {line}); "
                "give another with chat_template=..., or prompts as plain text"
            ) from error

    def render(
        self,
        messages: Any,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a chat.

        Args:
            messages: a string (one message of the user), or messages with ``role`` and ``content``.
            add_generation_prompt: end with the header of the assistant's answer.
            **variables: what else the template knows, such as ``enable_thinking=False``.

        Returns:
            The text; it holds the special tokens of the template, so encode it without adding others.

        Raises:
            TypeError: ``messages`` is neither.
            ValueError: the template fails on these messages.
        """
        messages = as_messages(messages)
        settings = {"tools": None, "documents": None, **self.variables, **variables}
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **settings
            )
        except Exception as error:  # whatever a template of somebody else may raise
            raise ValueError(
                f"the chat template refused these messages: {type(error).__name__}: {error}; roles were "
                f"{[message['role'] for message in messages]}. Many templates want user and assistant in turns and "
                "know no other role; or pass the prompt as plain text"
            ) from error
