"""Show the particles of a language model after each step: a redrawn table on a terminal, lines of text elsewhere."""

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

__all__ = [
    "ParticleRow",
    "StepDisplay",
    "TextTracker",
    "is_correct_so_far",
    "particle_table",
    "share_bar",
    "step_line",
]

CorrectnessFn = Callable[[str], bool | None]

_BAR_WIDTH = 10  # cells
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_END_LABELS = {End.FINISHED: "ended", End.MAX_TOKENS: "cut", End.MAX_STEPS: "cut", End.DEAD: "dead"}


class ParticleRow(NamedTuple):
    """A particle after a step.

    Attributes:
        slot: index of the particle.
        weight: normalized weight.
        log_score: log factors of its text.
        parent: index of the particle that it continues, or None.
        step: the text added by the step, on one line.
        state: "" while the text is incomplete, else "ended", "cut" or "dead".
        is_correct: whether its text is correct so far; None if that is unknown.
    """

    slot: int
    weight: float
    log_score: float
    parent: int | None
    step: str
    state: str
    is_correct: bool | None


class TextTracker:
    """Remember the texts of the previous step, to find the new part of each text.

    Args:
        is_correct_fn: text so far -> whether it is correct so far; or None.
    """

    def __init__(self, is_correct_fn: CorrectnessFn | None = None):
        self._is_correct_fn = is_correct_fn
        self._previous_texts: list[str] = []

    def rows(self, event: Event) -> list[ParticleRow]:
        """Return one row for each particle."""
        rows = [self._row(event, slot) for slot in range(len(event.texts))]
        self._previous_texts = [] if event.ancestors is None else list(event.texts)
        return rows

    def _row(self, event: Event, slot: int) -> ParticleRow:
        text, log_score = event.texts[slot], float(event.log_scores[slot])
        parent, step = self._new_part(event, slot)
        state = _END_LABELS.get(End(int(event.ended[slot])), "")
        is_correct = None if self._is_correct_fn is None or not text else self._is_correct_fn(text)
        return ParticleRow(
            slot=slot,
            weight=float(event.weights[slot]),
            log_score=log_score,
            parent=parent,
            step=" ".join(step.split()),
            state=state,
            is_correct=is_correct,
        )

    def _new_part(self, event: Event, slot: int) -> tuple[int | None, str]:
        """Return the parent of a text and the new part. Beam search may report other parents than the texts show."""
        text = event.texts[slot]
        if event.ancestors is None or not self._previous_texts:
            return None, text
        parent = int(event.ancestors[slot])
        if not text.startswith(self._previous_texts[parent]):
            candidates = [i for i, previous in enumerate(self._previous_texts) if text.startswith(previous)]
            if not candidates:
                return None, text
            parent = max(candidates, key=lambda i: len(self._previous_texts[i]))
        return parent, text[len(self._previous_texts[parent]) :]


def particle_table(
    event: Event, rows: list[ParticleRow], *, seconds: float, height: int = 40
) -> rich.table.Table:
    """Return the particles as a table.

    Args:
        event: event of the step.
        rows: rows of the particles.
        seconds: time since the start.
        height: lines of the terminal; if it is too small, only the particles of largest weight are shown.
    """
    title = f"{_heading(event)}   {seconds:.1f} s"
    table = rich.table.Table(title=title, title_justify="left", expand=True, pad_edge=False)
    for heading, justify in (("", "right"), ("weight", "left"), ("log score", "right"), ("from", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("last step", no_wrap=True, ratio=1, overflow="ellipsis")
    max_rows = max(height - 8, 4)
    shown = sorted(rows, key=lambda row: -row.weight)[:max_rows] if len(rows) > max_rows else rows
    max_weight = max(row.weight for row in rows)
    for row in sorted(shown, key=lambda row: row.slot):
        parent = "" if row.parent is None or row.parent == row.slot else str(row.parent)
        score = f"{row.log_score:.2f}"
        table.add_row(
            str(row.slot),
            share_bar(row.weight, max_share=max_weight),
            score,
            parent,
            _step_text(row),
            style=_style(row),
        )
    if len(shown) < len(rows):
        table.caption = f"{len(rows) - len(shown)} particles of smaller weight are not shown"
    return table


def share_bar(share: float, width: int = _BAR_WIDTH, max_share: float = 1.0) -> str:
    """Return a share between 0 and 1 as a bar and in percent; the share ``max_share`` fills the width."""
    eighths = round(8 * width * min(max(share / max_share, 0.0), 1.0))
    full, part = divmod(eighths, 8)
    return f"{('█' * full + (_EIGHTHS[part] if part else '')):<{width}} {share:4.0%}"


def step_line(event: Event, rows: list[ParticleRow], max_groups: int = 3) -> str:
    """Return one line for a step: its continuations of largest weight, each with its count and its weight."""
    groups: dict[tuple, list[ParticleRow]] = {}
    for row in rows:
        groups.setdefault((row.step, row.state, row.is_correct), []).append(row)
    ranked = sorted(groups.values(), key=lambda group: -sum(row.weight for row in group))
    parts = []
    for group in ranked[:max_groups]:
        times = f"{len(group)} x " if len(group) > 1 else ""
        parts.append(f"{sum(row.weight for row in group):.0%} {times}{_step_text(group[0]).plain[:60]}")
    more = f" | {len(ranked) - max_groups} more" if len(ranked) > max_groups else ""
    return f"{_heading(event)}: {' | '.join(parts)}{more}"


def is_correct_so_far(problem: Problem, text: str) -> bool:
    """Whether a text is a correct beginning of the solution of a problem; the empty text is one."""
    steps = lm.reasoner.check(problem, text).steps
    return not steps or steps[-1]


class StepDisplay:
    """A ``watch`` callback that shows every step.

    Args:
        console: console of the output.
        is_correct_fn: as for ``TextTracker``.
        redraw: redraw one table; else print one line for each step.
    """

    def __init__(
        self, console: rich.console.Console, is_correct_fn: CorrectnessFn | None = None, *, redraw: bool
    ):
        self._console, self._tracker, self._start = console, TextTracker(is_correct_fn), time.perf_counter()
        self._live = None
        if redraw:
            placeholder = rich.text.Text("reading the prompt and compiling the first step ...", style="dim")
            self._live = rich.live.Live(placeholder, console=console, auto_refresh=False)

    def __enter__(self) -> StepDisplay:
        """Open the display."""
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *error: Any) -> None:
        """Close the display; the last table stays on the terminal."""
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> bool:
        """Show a step; return False, so that the run continues."""
        rows = self._tracker.rows(event)
        if self._live is None:
            self._console.print(step_line(event, rows), markup=False, highlight=False, soft_wrap=True)
        else:
            seconds, height = time.perf_counter() - self._start, self._console.height
            self._live.update(particle_table(event, rows, seconds=seconds, height=height), refresh=True)
        return False


def _heading(event: Event) -> str:
    name = "iteration" if event.ancestors is None else "step"
    resampled = ", resampled" if event.resampled and event.ancestors is not None else ""
    evidence = f", log evidence {event.log_evidence:.2f}" if np.isfinite(event.log_evidence) else ""
    return f"{name} {event.step + 1}, {event.ess:.1f} of {len(event.texts)} effective{resampled}{evidence}"


def _step_text(row: ParticleRow) -> rich.text.Text:
    """Return the text of a step, marked as correct or wrong, with its state."""
    mark = {True: "✓ ", False: "✗ ", None: ""}[row.is_correct]
    state = f" ({row.state})" if row.state else ""
    return rich.text.Text(
        f"{mark}{row.step}{state}", style={True: "green", False: "red", None: ""}[row.is_correct]
    )


def _style(row: ParticleRow) -> str:
    return "dim" if row.state else ""
