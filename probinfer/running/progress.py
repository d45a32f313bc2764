"""Progress bars that nested calls share.

``task`` opens one line for one piece of work. The outermost task opens the display, tasks inside it add their lines to
the same display, and the display goes away with the outermost one. Wherever ``progress`` is a setting it reads:
``None`` (on if a display is open or the error stream is a terminal), ``True``, ``False``, or a text, which is on and
names the line. Bars go to the error stream (in a notebook: to the cell); when off, nothing is printed.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Iterator
from typing import Any

import rich.console
import rich.progress

__all__ = ["Task", "display", "is_on", "label", "task"]

Setting = bool | str | None


class _TerminalBars:
    """Lines of a rich display."""

    def __init__(self, console: rich.console.Console):
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
        )
        self.progress = rich.progress.Progress(*columns, console=console, transient=True)
        self.progress.start()

    def add(self, text: str, total: int | None) -> Any:
        return self.progress.add_task(text, total=total, note="")

    def update(self, line: Any, completed: int, note: str) -> None:
        self.progress.update(line, completed=completed, note=note, refresh=True)

    def remove(self, line: Any) -> None:
        self.progress.remove_task(line)

    def close(self) -> None:
        self.progress.stop()


class _NotebookBars:
    """Lines of text in one cell output, rewritten in place (needs no widgets)."""

    def __init__(self):
        self.lines: dict[int, tuple[str, int | None, int, str]] = {}
        import IPython.display  # there whenever this class is used: the process is a notebook's

        self.handle = IPython.display.display(_Text(""), display_id=True)

    def add(self, text: str, total: int | None) -> int:
        line = max(self.lines, default=-1) + 1
        self.lines[line] = (text, total, 0, "")
        self._show()
        return line

    def update(self, line: int, completed: int, note: str) -> None:
        text, total = self.lines[line][:2]
        self.lines[line] = (text, total, completed, note)
        self._show()

    def remove(self, line: int) -> None:
        self.lines.pop(line)
        self._show()

    def close(self) -> None:
        self.lines.clear()
        self._show()

    def _show(self) -> None:
        self.handle.update(_Text("\n".join(_text_bar(*entry) for entry in self.lines.values())))


class _Text:
    """Plain text for a notebook cell."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _text_bar(text: str, total: int | None, completed: int, note: str, width: int = 30) -> str:
    """One line: ``NUTS  ██████░░░░ 60/100 note``."""
    filled = int(width * completed / total) if total else 0
    count = f"{completed}/{total}" if total else f"{completed}"
    return f"{text}  {'█' * filled}{'░' * (width - filled)} {count} {note}".rstrip()


_current: contextvars.ContextVar[Any] = contextvars.ContextVar("probinfer_progress", default=None)


class Task:
    """One line of the display; a silent one does nothing.

    >>> Task().update(3, note="seen by nobody")
    """

    def __init__(self, bars: Any = None, line: Any = None):
        self._bars, self._line = bars, line

    @property
    def on(self) -> bool:
        """Whether somebody can see this line."""
        return self._bars is not None

    def update(self, completed: int, note: str = "") -> None:
        """Say how far the work is.

        Args:
            completed: units done since the start of the task.
            note: a few words shown at the end of the line.
        """
        if self._bars is not None:
            self._bars.update(self._line, int(completed), note)


def is_on(progress: Setting = None) -> bool:
    """Read a ``progress`` setting: ``None`` means on if a display is open or the error stream is a terminal."""
    if progress is None:
        return _current.get() is not None or sys.stderr.isatty()
    return bool(progress)


def label(progress: Setting, text: str) -> str | bool:
    """The setting to hand to an inner call: ``text`` where ``progress`` is on, else ``False``."""
    return text if is_on(progress) else False


@contextlib.contextmanager
def display(console: rich.console.Console | None = None) -> Iterator[None]:
    """Keep one display open for all tasks inside.

    Args:
        console: where to draw; default the notebook cell, else the error stream.
    """
    if console is None and _in_notebook():
        bars: Any = _NotebookBars()
    else:
        bars = _TerminalBars(rich.console.Console(stderr=True) if console is None else console)
    token = _current.set(bars)
    try:
        yield
    finally:
        _current.reset(token)
        bars.close()


@contextlib.contextmanager
def task(text: str, total: int | None = None, progress: Setting = None) -> Iterator[Task]:
    """Open one line for one piece of work, in the open display or in one of its own.

    Args:
        text: what the work is; a text given as ``progress`` replaces it.
        total: units of work, ``None`` if unknown.
        progress: the setting, see the module.

    Yields:
        The task; ``task.update(completed)`` moves its bar.
    """
    if not is_on(progress):
        yield Task()
        return
    with contextlib.ExitStack() as stack:
        if _current.get() is None:
            stack.enter_context(display())
        bars = _current.get()
        line = bars.add(progress if isinstance(progress, str) else text, total)
        stack.callback(bars.remove, line)
        yield Task(bars, line)


def _in_notebook() -> bool:
    """Whether this process is a Jupyter kernel (IPython is loaded then)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")
