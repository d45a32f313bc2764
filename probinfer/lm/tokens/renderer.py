"""One process that renders chat templates within limits of time and memory, started when it is first needed."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

__all__ = ["TemplateError", "render"]

_SCRIPT = Path(__file__).with_name("template.py")
_SECONDS, _START_SECONDS = 20.0, 120.0
_MAX_REPLY_BYTES = 2**28
_LOCK = threading.Lock()
# the id of the parent and the process, which ends when its input ends
_process: tuple[int, subprocess.Popen] | None = None


class TemplateError(Exception):
    """A template failed; the message says how."""


def render(source: str, variables: dict[str, Any]) -> str:
    """Render a template.

    Args:
        source: text of the template.
        variables: variables of the template; anything that can be pickled.

    Returns:
        The text.

    Raises:
        TemplateError: it failed, or took too much time or memory.
    """
    try:
        request = pickle.dumps((source, variables))
    except Exception as error:
        raise TemplateError(
            f"{type(error).__name__}: {error}; messages and variables of a template must be plain data"
        ) from error
    with _LOCK:
        process = _running()
        reply = _request(process, request, _SECONDS)
        if reply is None or not ({"text", "error"} & set(reply)):
            _end()
            raise TemplateError(f"it took longer than {_SECONDS:g} s or more memory than a prompt can need")
    if "error" in reply:
        raise TemplateError(": ".join(map(str, reply["error"])))
    return str(reply["text"])


def _running() -> subprocess.Popen:
    """Return the process; start a new one if there is none, if it has ended, or after a fork."""
    global _process
    if _process is not None and _process[0] == os.getpid() and _process[1].poll() is None:
        return _process[1]
    _end()
    process = subprocess.Popen(
        [sys.executable, "-P", str(_SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    _process = os.getpid(), process
    if _request(process, pickle.dumps(sys.path), _START_SECONDS) != {"ready": True}:
        _end()
        raise TemplateError("the process that renders templates could not be started")
    return process


def _request(process: subprocess.Popen, request: bytes, seconds: float) -> dict[str, Any] | None:
    """Return the reply to a request, None if none came in time."""
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(request)  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        reply = json.loads(process.stdout.readline(_MAX_REPLY_BYTES))  # type: ignore[union-attr]
        return reply if isinstance(reply, dict) else None
    except (OSError, ValueError, RecursionError):
        return None
    except BaseException:  # an unread reply would be mistaken for the reply to the next request
        process.kill()
        raise
    finally:
        timer.cancel()


@atexit.register
def _end() -> None:
    global _process
    if _process is None:
        return
    owner, process = _process
    _process = None
    if owner == os.getpid():
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]
