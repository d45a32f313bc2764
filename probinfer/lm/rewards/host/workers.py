"""A few processes that call one Python function, each call with a limit of its own.

A process is started when it is first needed, asked for one call at a time, and killed with all that it has started
when the call takes too long; the next call gets a new one. No process shares a lock or a pipe with another, so one that
dies disturbs nobody. They are fresh interpreters that run one small script: nothing is forked (forking a process that
runs JAX may hang), and the main module of the parent is not imported again, so scripts need no ``__main__`` guard.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Pool", "Reply"]

_SCRIPT = Path(__file__).with_name("worker.py")
_START_LIMIT = 120.0  # seconds until a process must have imported what the function needs


class Reply(NamedTuple):
    """Outcome of one call.

    Attributes:
        kind: of the fault: "exception", "time-out", "crash", "not loaded", "not a number", "NaN", "interrupted"; "" for
            none.
        value: the number, NaN where there is none.
        words: the traceback, or what happened; "" without fault.
    """

    kind: str
    value: float
    words: str


_ENDED = Reply("interrupted", float("nan"), "the run was ended by Ctrl-C")


class _Process:
    """One interpreter that has loaded the function, or says why it could not."""

    def __init__(self, function: bytes):
        self._expired = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
            },  # a function whose module imports JAX leaves the accelerator
        )
        reply = self._ask((sys.path, function), _START_LIMIT)
        self.fault = (
            reply if isinstance(reply, Reply) else Reply("not loaded", float("nan"), reply) if reply else None
        )

    @property
    def usable(self) -> bool:
        """Whether it can take a call."""
        return self.fault is None and not self._expired and self._process.poll() is None

    def call(self, arguments: tuple, timeout: float | None) -> Reply:
        """The reply of the function, which has ``timeout`` seconds from now."""
        if self.fault is not None:
            return self.fault
        return Reply(*self._ask(arguments, timeout))

    def kill(self) -> None:
        """End the process and what it has started."""
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _ask(self, message: Any, timeout: float | None) -> Any:
        watch = threading.Timer(timeout, self._expire) if timeout is not None else None
        try:
            if watch is not None:
                watch.daemon = True
                watch.start()
            self._process.stdin.write(pickle.dumps(message))  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
            return pickle.load(self._process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, pickle.UnpicklingError):
            self.kill()
            return self._death(timeout)
        finally:
            if watch is not None:
                watch.cancel()
                watch.join()

    def _expire(self) -> None:
        self._expired = True
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()

    def _death(self, timeout: float | None) -> Reply:
        if self._expired:
            return Reply("time-out", float("nan"), f"the call took longer than {timeout:g} s and was killed")
        code = self._process.returncode
        return Reply("crash", float("nan"), f"the process of the call ended with exit code {code}")


class Pool:
    """Processes for one function.

    Args:
        function: the function, pickled by value.
        num: most processes at a time.
        timeout: seconds a call may take, counted from its start; None: for ever.
    """

    def __init__(self, function: bytes, num: int, timeout: float | None):
        self._function, self._num, self._timeout = function, num, timeout
        self._lock = threading.Lock()
        self._processes: list[_Process | None] = [None] * num
        self._owner = os.getpid()
        self._stopped = False
        weakref.finalize(self, _end, self._processes, self._owner)

    def map(self, calls: list[tuple]) -> list[Reply]:
        """The replies to all calls, in their order."""
        with self._lock:
            if os.getpid() != self._owner:
                raise RuntimeError(
                    "worker processes do not survive a fork: make the score again in the new process"
                )
            waiting = deque(enumerate(calls))
            replies: dict[int, Reply] = {}
            threads = [
                threading.Thread(target=self._serve, args=(slot, waiting, replies), daemon=True)
                for slot in range(min(self._num, len(calls)))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return [replies[i] for i in range(len(calls))]

    def let(self, run: bool) -> None:
        """Take calls, or end the processes now, even in a call, and answer what is still asked by a fault at once."""
        self._stopped = not run
        if self._stopped:
            _end(self._processes, self._owner)

    def end(self) -> None:
        """End the processes without waiting for a call; the next one starts new ones."""
        _end(self._processes, self._owner)

    def close(self) -> None:
        """End the processes now; the next call starts new ones."""
        with self._lock:
            _end(self._processes, self._owner)

    def _serve(self, slot: int, waiting: deque, replies: dict[int, Reply]) -> None:
        """Let the process of one slot work off what waits."""
        while True:
            try:
                index, arguments = waiting.popleft()
            except IndexError:
                return
            reply = _ENDED
            if not self._stopped:
                try:
                    reply = self._process(slot).call(arguments, self._timeout)
                except Exception as error:  # no process could be started
                    reply = Reply("not loaded", float("nan"), f"{type(error).__name__}: {error}")
            if self._stopped:  # even where it was stopped in between
                _end(self._processes, self._owner)
                reply = _ENDED
            replies[index] = reply

    def _process(self, slot: int) -> _Process:
        process = self._processes[slot]
        if process is None or not process.usable:
            if process is not None:
                process.kill()
            process = self._processes[slot] = _Process(self._function)
        return process


def _end(processes: list[_Process | None], owner: int) -> None:
    """Kill what still runs, in the process that started it."""
    if os.getpid() != owner:
        return
    for slot, process in enumerate(processes):
        processes[slot] = None
        if process is not None:
            process.kill()
