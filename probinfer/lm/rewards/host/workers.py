"""A few processes that call one Python function, each call with a time limit of its own.

A process is started when it is first needed and handles one call at a time. When a call takes too long, the process is
killed with all that it has started, and the next call gets a new one. No process shares a lock or a pipe with another,
so the death of one does not affect the others. They are fresh interpreters that run one small script: nothing is forked
(forking a process that runs JAX may hang), and the main module of the parent is not imported again, so scripts need no
``__main__`` guard.
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
_START_SECONDS = 120.0  # time in which a process must have imported what the function needs


class Reply(NamedTuple):
    """Outcome of one call.

    Attributes:
        kind: kind of fault: "exception", "time-out", "crash", "not loaded", "not a number", "NaN", "interrupted"; "" if
            there was none.
        value: the number, NaN if there is none.
        message: the traceback, or what happened; "" if there was no fault.
    """

    kind: str
    value: float
    message: str


_ENDED = Reply("interrupted", float("nan"), "the run was ended by Ctrl-C")


class _Process:
    """One interpreter that has loaded the function, or the reason why it could not."""

    def __init__(self, function: bytes):
        self._expired = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            # a function whose module imports JAX must not use the accelerator
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        reply = self._request((sys.path, function), _START_SECONDS)
        self.fault = (
            reply if isinstance(reply, Reply) else Reply("not loaded", float("nan"), reply) if reply else None
        )

    @property
    def usable(self) -> bool:
        """Whether it can take a call."""
        return self.fault is None and not self._expired and self._process.poll() is None

    def call(self, arguments: tuple, timeout: float | None) -> Reply:
        """Return the reply of the function, which has ``timeout`` seconds from now."""
        if self.fault is not None:
            return self.fault
        return Reply(*self._request(arguments, timeout))

    def kill(self) -> None:
        """End the process and what it has started."""
        self._send_kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _request(self, message: Any, timeout: float | None) -> Any:
        timer = threading.Timer(timeout, self._expire) if timeout is not None else None
        try:
            if timer is not None:
                timer.daemon = True
                timer.start()
            self._process.stdin.write(pickle.dumps(message))  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
            return pickle.load(self._process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, pickle.UnpicklingError):
            self.kill()
            return self._reply_after_death(timeout)
        finally:
            if timer is not None:
                timer.cancel()
                timer.join()

    def _expire(self) -> None:
        self._expired = True
        self._send_kill()

    def _send_kill(self) -> None:
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()

    def _reply_after_death(self, timeout: float | None) -> Reply:
        if self._expired:
            return Reply("time-out", float("nan"), f"the call took longer than {timeout:g} s and was killed")
        code = self._process.returncode
        return Reply("crash", float("nan"), f"the process of the call ended with exit code {code}")


class Pool:
    """Processes for one function.

    Args:
        function: the function, pickled by value.
        num: maximum number of processes.
        timeout: seconds that a call may take, counted from its start; None: no limit.
    """

    def __init__(self, function: bytes, num: int, timeout: float | None):
        self._function, self._num, self._timeout = function, num, timeout
        self._lock = threading.Lock()
        self._processes: list[_Process | None] = [None] * num
        self._owner = os.getpid()
        self._stopped = False
        weakref.finalize(self, _end, self._processes, self._owner)

    def map(self, calls: list[tuple]) -> list[Reply]:
        """Return the replies to all calls, in their order."""
        with self._lock:
            if os.getpid() != self._owner:
                raise RuntimeError(
                    "worker processes do not survive a fork: create the score again in the new process"
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

    def allow(self, run: bool) -> None:
        """Accept calls; or end the processes now, even during a call, and reply to all calls with a fault at once."""
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
        """Let the process of one slot handle waiting calls until there are none."""
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
            if self._stopped:  # even if it was stopped in between
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
    """Kill the processes that still run, if called in the process that started them."""
    if os.getpid() != owner:
        return
    for slot, process in enumerate(processes):
        processes[slot] = None
        if process is not None:
            process.kill()
