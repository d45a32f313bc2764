"""Tables: cells are formatted once, then shown on a terminal or in a page."""

from __future__ import annotations

import html
import math
from typing import NamedTuple

import rich.table
import rich.text

from probinfer.report.scoring import Estimate

__all__ = ["TextTable", "number", "seconds", "to_html", "to_rich", "with_error"]


class TextTable(NamedTuple):
    """A table of text.

    Attributes:
        title: what it shows.
        columns: headings; the first column holds names, the others numbers (set to the right) unless ``words`` says so.
        rows: cells, as many a row as there are headings.
        note: what a reader should know to read it.
        emphasis: the row that is set in bold, or None.
        words: further columns that hold words.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    emphasis: int | None = None
    words: tuple[int, ...] = ()


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent where that can be read; "-" for none."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 7:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - magnitude, 0)}f}"


def with_error(estimate: Estimate | None, *, sign: bool = False, scale: float = 1.0) -> str:
    """``value ± standard error``, both to the digit that the error justifies (two digits of the error).

    Args:
        estimate: the number, or None for "-".
        sign: write the sign of positive numbers too.
        scale: multiply both, such as 100 for a percentage.
    """
    if estimate is None or math.isnan(estimate.value):
        return "-"
    value, error = estimate.value * scale, estimate.error * scale
    plus = "+" if sign else ""
    if math.isnan(error) or math.isinf(error):
        return f"{value:{plus}.3g}"
    if error == 0:
        return f"{value:{plus}.4g} ± 0"
    places = max(1 - math.floor(math.log10(error)), 0)
    return f"{value:{plus}.{places}f} ± {error:.{places}f}"


def seconds(value: float | None) -> str:
    """A time that a person can read: 0.8 s, 12 s, 3 min 5 s."""
    if value is None or math.isnan(value):
        return "-"
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value // 60:.0f} min {value % 60:.0f} s"


def to_rich(table: TextTable) -> rich.table.Table:
    """The table for a terminal."""
    shown = rich.table.Table(
        title=table.title,
        caption=table.note or None,
        title_justify="left",
        caption_justify="left",
        expand=False,
    )
    for i, heading in enumerate(table.columns):
        shown.add_column(heading, justify="right" if i and i not in table.words else "left", no_wrap=i == 0)
    for i, row in enumerate(table.rows):
        shown.add_row(*map(rich.text.Text, row), style="bold" if i == table.emphasis else None)
    return shown


def to_html(table: TextTable) -> str:
    """The table for a page, inside a box that scrolls sideways on a narrow screen."""
    head = "".join(
        f'<th scope="col"{_side(i, table.words)}>{html.escape(heading)}</th>'
        for i, heading in enumerate(table.columns)
    )
    body = "".join(_row(row, i == table.emphasis, table.words) for i, row in enumerate(table.rows))
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    title = f"<caption>{html.escape(table.title)}</caption>" if table.title else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def _row(row, strong, words):
    name, *cells = (html.escape(cell) for cell in row)
    mark = ' class="strong"' if strong else ""
    rest = "".join(f"<td{_side(i, words)}>{cell}</td>" for i, cell in enumerate(cells, 1))
    return f'<tr{mark}><th scope="row">{name}</th>{rest}</tr>'


def _side(column, words):
    return ' class="words"' if column in words else ""
