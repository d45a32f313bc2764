"""Ctrl-C between two pieces of work: the first asks a loop to stop, the second stops it at once.

Compiled programs do not hear signals, so loops run them in pieces. Inside ``deferred`` the first Ctrl-C only sets a
flag, which the loop looks at between two pieces: it leaves with what is finished. A second Ctrl-C raises
``KeyboardInterrupt`` wherever Python is, and ``wait`` keeps Python listening while a program runs. Signals reach the
main thread alone; in other threads, or where the process ignores Ctrl-C, nothing changes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

__all__ = ["Interrupted", "Interruption", "Pace", "deferred", "each", "wait"]

_SAID = b"\nstopping after the piece of work at hand; Ctrl-C again stops at once\n"
_SHORTEST, _LONGEST = 5e-5, 2e-2  # seconds between two looks at a program that runs


class Interrupted(KeyboardInterrupt):
    """A first Ctrl-C ended work of which no part is of use by itself; what encloses it may have other parts."""


class Interruption:
    """Whether Ctrl-C was pressed.

    >>> Interruption().requested
    False
    """

    def __init__(self) -> None:
        self._requested = self._seen = self._twice = False

    @property
    def requested(self) -> bool:
        """Whether Ctrl-C was pressed; who asks takes it upon itself to stop."""
        self._seen = self._seen or self._requested
        return self._requested


_open: Interruption | None = None  # of the main thread


@contextlib.contextmanager
def deferred(at_second: Callable[[], None] | None = None) -> Iterator[Interruption]:
    """Turn the first Ctrl-C inside into a flag; blocks inside one another share it.

    Args:
        at_second: called in another thread at the second Ctrl-C, even while the main thread waits for a program that
            calls Python back (which no ``wait`` can leave): it should end what the program waits for.

    Yields:
        The flag.

    Raises:
        KeyboardInterrupt: at a second Ctrl-C; at the end, if nobody has looked at the flag since the first.
    """
    global _open
    if _open is not None and _in_main_thread():
        yield _open
        return
    previous = signal.getsignal(signal.SIGINT) if _in_main_thread() else None
    if not callable(previous):  # another thread, or a process that ignores Ctrl-C or dies of it
        yield Interruption()
        return
    interruption = _open = Interruption()
    signal.signal(signal.SIGINT, _handler(interruption, previous))
    with contextlib.nullcontext() if at_second is None else _listening(at_second):
        try:
            yield interruption
        except Exception as error:
            if interruption._twice:  # an error of a program that called Python back, where it was raised
                raise KeyboardInterrupt from error
            raise
        finally:
            _open = None
            signal.signal(signal.SIGINT, previous)
    if interruption._requested and not interruption._seen:
        previous(signal.SIGINT, None)


@contextlib.contextmanager
def _listening(at_second: Callable[[], None]) -> Iterator[None]:
    """Hear signals in a thread of its own: the system's handler writes each to a pipe, wherever the main thread is."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def listen() -> None:
        heard = 0
        while number := os.read(reading, 1):
            heard += number[0] == signal.SIGINT
            if heard == 2:
                at_second()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join()
        os.close(reading)


def _handler(interruption: Interruption, previous: Any) -> Any:
    def handle(number: int, frame: Any) -> None:
        if interruption._requested:
            interruption._twice = True
            signal.signal(signal.SIGINT, previous)
            previous(number, frame)
            return
        interruption._requested = True
        with contextlib.suppress(Exception):
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), _SAID)

    return handle


def wait(tree: Any) -> Any:
    """Wait for the arrays of a tree; a second Ctrl-C is heard meanwhile.

    Args:
        tree: any pytree.

    Returns:
        The tree.
    """
    if _open is not None and _in_main_thread():
        started = time.perf_counter()
        arrays = [
            leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "is_ready")
        ]  # arrays of keys cannot tell
        while not all(array.is_ready() for array in arrays):
            time.sleep(min(max(0.05 * (time.perf_counter() - started), _SHORTEST), _LONGEST))
    return jax.block_until_ready(tree)


def each(run: Callable[[Any, Interruption], Any], tasks: Iterable[Any]) -> list:
    """What ``run(task, interruption)`` returned for each task, of those that were begun before Ctrl-C.

    Args:
        run: the work on one task; it may look at the flag, and raise ``Interrupted`` where it had to leave nothing.
        tasks: one after another.

    Raises:
        Interrupted: there are none.
    """
    found: list = []
    with deferred() as stop:
        for task in tasks:
            if stop.requested:
                break
            try:
                found.append(run(task, stop))
            except Interrupted:
                if not found:
                    raise
                break
    if not found:
        raise Interrupted("Ctrl-C before the first piece of work was begun")
    return found


class Pace:
    """How much work to do before the next look: about a second of it, found by trying.

    Args:
        size: of the first piece.
        seconds: that a piece should take.
    """

    def __init__(self, size: int, seconds: float = 1.0):
        self.size, self._seconds = size, seconds

    @contextlib.contextmanager
    def measured(self, size: int) -> Iterator[None]:
        """Time a piece of this size, and set the size of the next, at most four times as large."""
        started = time.perf_counter()
        yield
        wanted = size * self._seconds / max(time.perf_counter() - started, 1e-9)
        self.size = max(int(min(wanted, 4 * self.size)), 1)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
