"""The process that renders chat templates: run as a script, so it imports the standard library and Jinja alone.

A template is a program of somebody else. Jinja's sandbox keeps it from everything but text, and this process bounds
what text costs: the memory here, the length of what comes out here, the time by the parent, who kills it. Requests are
pickles of the parent; replies are lines of JSON, for what comes from here is not trusted.
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

MOST_CHARACTERS = 2**24
MOST_MEMORY = 2**30  # bytes of address space, of which Python and Jinja take a tenth


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as it stands: Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def environment() -> Any:
    """A sandbox with the helpers that templates of checkpoints expect."""
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks around generated text, which only training uses: the text stays, the marks go."""

        tags = {"generation"}  # noqa: RUF012 (the name and the form that Jinja asks for)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return made


def render(template: Any, variables: dict[str, Any]) -> str:
    """Render piece by piece, no longer than ``MOST_CHARACTERS``."""
    pieces, length = [], 0
    for piece in template.generate(variables):
        length += len(piece)
        if length > MOST_CHARACTERS:
            raise ValueError(f"the prompt would be longer than {MOST_CHARACTERS} characters")
        pieces.append(piece)
    return "".join(pieces)


def serve() -> None:
    """Answer requests (source, variables) until the input ends."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    sys.path[:] = pickle.load(requests)
    made, templates = environment(), {}
    with contextlib.suppress(ImportError, OSError, ValueError):  # where the system has such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    while True:
        try:
            source, variables = pickle.load(requests)
        except EOFError:
            return
        try:
            if source not in templates:
                templates = {source: made.from_string(source)}
            reply: dict[str, Any] = {"text": render(templates[source], variables)}
        except Exception as error:  # whatever a template of somebody else may raise
            reply = {"error": [type(error).__name__, str(error)[:2000]]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve()
