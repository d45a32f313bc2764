"""The process that renders chat templates: run as a script, so it imports the standard library and Jinja alone.

A template is an untrusted program. Jinja's sandbox limits it to building text, and this process limits what that costs:
it bounds the memory and the length of the output, and the parent kills it after a time. Requests are pickles of the
parent; replies are lines of JSON, since the parent does not trust them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pickle
import signal
import sys
from typing import Any

__all__ = ["environment", "render", "serve"]

MAX_CHARACTERS = 2**24
MAX_MEMORY = 2**30  # bytes of address space, of which Python and Jinja take a tenth


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Return plain JSON: Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def environment() -> Any:
    """Return a sandbox with the helpers that templates of checkpoints expect."""
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks around generated text, which only training uses: the text stays, the marks are removed."""

        tags = {"generation"}  # noqa: RUF012 (the name and the form that Jinja asks for)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    sandbox.filters["tojson"] = _tojson
    sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return sandbox


def render(template: Any, variables: dict[str, Any]) -> str:
    """Render piece by piece, and refuse a text longer than ``MAX_CHARACTERS``."""
    pieces, length = [], 0
    for piece in template.generate(variables):
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise ValueError(f"the prompt would be longer than {MAX_CHARACTERS} characters")
        pieces.append(piece)
    return "".join(pieces)


def serve() -> None:
    """Answer requests (source, variables) until the input ends."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    sys.path[:] = pickle.load(requests)
    sandbox, templates = environment(), {}
    with contextlib.suppress(ImportError, OSError, ValueError):  # not all systems have such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    while True:
        try:
            source, variables = pickle.load(requests)
        except EOFError:
            return
        try:
            if source not in templates:
                templates = {source: sandbox.from_string(source)}
            reply: dict[str, Any] = {"text": render(templates[source], variables)}
        except Exception as error:  # a template may raise anything
            reply = {"error": [type(error).__name__, str(error)[:2000]]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve()
