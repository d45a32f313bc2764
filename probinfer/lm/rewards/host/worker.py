"""The process that calls a function of the user: run as a script, so it imports the standard library and nothing else.

It reads pickles from its input and writes pickles to its output: first it reads the function and reports whether it
could be loaded; then it writes one reply for each tuple of arguments. What the function prints goes to the standard
error of the parent. When the input ends, the process ends, even during a call.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

__all__ = ["call_function", "serve"]


def call_function(function: Callable[..., Any], arguments: tuple) -> tuple[str, float, str]:
    """Call a function that should return a number.

    Returns:
        The kind of fault ("" for none), the number (NaN if there is none), and the traceback or a description of what
        was returned.
    """
    try:
        value = function(*arguments)
    except Exception as error:
        # without the frame of this module
        error_inside = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
        return "exception", math.nan, "".join(traceback.format_exception(error_inside))
    number, fault = math.nan, "not a number"
    if not isinstance(value, (str, bytes, bytearray)):
        with contextlib.suppress(Exception):
            number = float(value)
            fault = "NaN" if math.isnan(number) else ""
    return fault, number, f"the function returned {_brief(value)}, not a number" if fault else ""


def _brief(value: Any) -> str:
    """Describe a value in few characters, even if its ``repr`` fails."""
    try:
        return f"{value!r:.200} ({type(value).__name__})"
    except Exception:
        return f"a {type(value).__name__}"


def serve() -> None:
    """Answer requests until the input ends."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    search_path, function = pickle.load(requests)
    sys.path[:] = search_path
    waiting: queue.SimpleQueue[tuple] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, waiting), daemon=True).start()
    try:
        function, reply = pickle.loads(function), ""
    except BaseException:
        reply = traceback.format_exc()
    _send(replies, reply)
    while not reply:
        try:
            answer = call_function(function, waiting.get())
        except BaseException:  # such as SystemExit
            answer = ("exception", math.nan, traceback.format_exc())
        _send(replies, answer)


def _listen(requests: Any, waiting: queue.SimpleQueue[tuple]) -> None:
    """Pass requests on; exit at once when the input ends."""
    try:
        while True:
            waiting.put(pickle.load(requests))
    finally:
        os._exit(0)


def _send(replies: Any, answer: Any) -> None:
    replies.write(pickle.dumps(answer))
    replies.flush()


if __name__ == "__main__":
    serve()
