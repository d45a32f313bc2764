"""Particles of a language model while they grow: a table that is redrawn on a terminal, lines of text elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.live
import rich.table
import rich.text

from probinfer import lm
from probinfer.lm import End, Event
from probinfer.lm.reasoner import Problem

__all__ = ["Follower", "Row", "Screen", "bar", "is_right", "lines_of", "table_of"]

Judge = Callable[[str], bool | None]

_BAR = 10  # cells
_PARTS = " ▏▎▍▌▋▊▉█"
_ENDS = {End.FINISHED: "ended", End.MAX_TOKENS: "cut", End.MAX_STEPS: "cut", End.DEAD: "dead"}


class Row(NamedTuple):
    """A particle after a step.

    Attributes:
        slot: its number.
        weight: normalised.
        log_score: log factors of its text.
        parent: whose continuation it is, or None.
        step: what it added, on one line; "" if nothing.
        state: "" while it runs, else "ended", "cut" or "dead".
        right: whether its text is right so far; None: nobody knows.
    """

    slot: int
    weight: float
    log_score: float
    parent: int | None
    step: str
    state: str
    right: bool | None


class Follower:
    """Remembers the texts of the step before, so that the new part of each text is known.

    Args:
        judge: text so far -> whether it is right so far, or None.
    """

    def __init__(self, judge: Judge | None = None):
        self._judge = judge
        self._before: list[str] = []

    def rows(self, event: Event) -> list[Row]:
        """One row a particle."""
        rows = [self._row(event, slot) for slot in range(len(event.texts))]
        self._before = [] if event.ancestors is None else list(event.texts)
        return rows

    def _row(self, event: Event, slot: int) -> Row:
        text, score = event.texts[slot], float(event.log_scores[slot])
        parent, step = self._new_part(event, slot)
        state = _ENDS.get(End(int(event.ended[slot])), "")
        right = None if self._judge is None or not text else self._judge(text)
        return Row(slot, float(event.weights[slot]), score, parent, " ".join(step.split()), state, right)

    def _new_part(self, event: Event, slot: int) -> tuple[int | None, str]:
        """Whose continuation a text is, and what is new. Beams have other parents than the pass says."""
        text = event.texts[slot]
        if event.ancestors is None or not self._before:
            return None, text
        parent = int(event.ancestors[slot])
        if not text.startswith(self._before[parent]):
            fits = [i for i, before in enumerate(self._before) if text.startswith(before)]
            if not fits:
                return None, text
            parent = max(fits, key=lambda i: len(self._before[i]))
        return parent, text[len(self._before[parent]) :]


def table_of(event: Event, rows: list[Row], *, seconds: float, height: int = 40) -> rich.table.Table:
    """The particles as a table.

    Args:
        event: of the step.
        rows: of the particles.
        seconds: since the start.
        height: lines of the terminal; where it is too small the heaviest particles are shown.
    """
    title = f"{_heading(event)}   {seconds:.1f} s"
    table = rich.table.Table(title=title, title_justify="left", expand=True, pad_edge=False)
    for heading, justify in (("", "right"), ("weight", "left"), ("log score", "right"), ("from", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("last step", no_wrap=True, ratio=1, overflow="ellipsis")
    most = max(height - 8, 4)
    kept = sorted(rows, key=lambda row: -row.weight)[:most] if len(rows) > most else rows
    longest = max(row.weight for row in rows)
    for row in sorted(kept, key=lambda row: row.slot):
        parent = "" if row.parent is None or row.parent == row.slot else str(row.parent)
        score = f"{row.log_score:.2f}"
        table.add_row(
            str(row.slot), bar(row.weight, longest=longest), score, parent, _words(row), style=_style(row)
        )
    if len(kept) < len(rows):
        table.caption = f"{len(rows) - len(kept)} lighter ones are not shown"
    return table


def bar(share: float, width: int = _BAR, longest: float = 1.0) -> str:
    """A share between 0 and 1 as a bar, and in percent; the share ``longest`` fills the width."""
    eighths = round(8 * width * min(max(share / longest, 0.0), 1.0))
    full, part = divmod(eighths, 8)
    return f"{('█' * full + (_PARTS[part] if part else '')):<{width}} {share:4.0%}"


def lines_of(event: Event, rows: list[Row], most: int = 3) -> str:
    """A step in one line: the heaviest of its different continuations, how many particles took them, their weight."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.step, row.state, row.right), []).append(row)
    ranked = sorted(groups.values(), key=lambda group: -sum(row.weight for row in group))
    parts = []
    for group in ranked[:most]:
        times = f"{len(group)} x " if len(group) > 1 else ""
        parts.append(f"{sum(row.weight for row in group):.0%} {times}{_words(group[0]).plain[:60]}")
    more = f" | {len(ranked) - most} more" if len(ranked) > most else ""
    return f"{_heading(event)}: {' | '.join(parts)}{more}"


def is_right(problem: Problem, text: str) -> bool:
    """Whether a text begins the solution of a problem of the reasoner; nothing begins all of them."""
    steps = lm.reasoner.check(problem, text).steps
    return not steps or steps[-1]


class Screen:
    """What ``watch`` is: shows every step.

    Args:
        console: where.
        judge: as for ``Follower``.
        redraw: one table, redrawn; else a line a step.
    """

    def __init__(self, console: rich.console.Console, judge: Judge | None = None, *, redraw: bool):
        self._console, self._follower, self._started = console, Follower(judge), time.perf_counter()
        self._live = None
        if redraw:
            waiting = rich.text.Text("reading the prompt and compiling the first step ...", style="dim")
            self._live = rich.live.Live(waiting, console=console, auto_refresh=False)

    def __enter__(self) -> Screen:
        """Open the display."""
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the last table where it is."""
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> bool:
        """Show a step; the run goes on."""
        rows = self._follower.rows(event)
        if self._live is None:
            self._console.print(lines_of(event, rows), markup=False, highlight=False, soft_wrap=True)
        else:
            seconds, height = time.perf_counter() - self._started, self._console.height
            self._live.update(table_of(event, rows, seconds=seconds, height=height), refresh=True)
        return False


def _heading(event: Event) -> str:
    name = "iteration" if event.ancestors is None else "step"
    how = ", resampled" if event.resampled and event.ancestors is not None else ""
    evidence = f", log evidence {event.log_evidence:.2f}" if np.isfinite(event.log_evidence) else ""
    return f"{name} {event.step + 1}, {event.ess:.1f} of {len(event.texts)} effective{how}{evidence}"


def _words(row: Row) -> rich.text.Text:
    """The step, with the verdict and the end of the text."""
    mark = {True: "✓ ", False: "✗ ", None: ""}[row.right]
    state = f" ({row.state})" if row.state else ""
    return rich.text.Text(
        f"{mark}{row.step}{state}", style={True: "green", False: "red", None: ""}[row.right]
    )


def _style(row: Row) -> str:
    return "dim" if row.state else ""
