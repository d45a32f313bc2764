"""Tables of formatted cells, rendered on a terminal or in an HTML page."""

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
        title: title of the table.
        columns: headings; the first column holds names, the others right-aligned numbers except ``text_columns``.
        rows: cells, as many per row as there are headings.
        note: explanation below the table.
        emphasis: index of the row in bold; None: no row.
        text_columns: indices of further columns that hold text.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    emphasis: int | None = None
    text_columns: tuple[int, ...] = ()


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with the given significant digits, without an exponent if readable; "-" for None or NaN."""
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
    """Format ``value ± standard error`` with two significant digits of the error.

    Args:
        estimate: the number; None gives "-".
        sign: whether positive numbers have a sign.
        scale: factor on both, such as 100 for a percentage.
    """
    if estimate is None or math.isnan(estimate.value):
        return "-"
    value, error = estimate.value * scale, estimate.error * scale
    plus = "+" if sign else ""
    if math.isnan(error) or math.isinf(error):
        return f"{value:{plus}.3g}"
    if error == 0:
        return f"{value:{plus}.4g} ± 0"
    decimals = max(1 - math.floor(math.log10(error)), 0)
    return f"{value:{plus}.{decimals}f} ± {error:.{decimals}f}"


def seconds(value: float | None) -> str:
    """Format a duration as 0.8 s, 12 s or 3 min 5 s."""
    if value is None or math.isnan(value):
        return "-"
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value // 60:.0f} min {value % 60:.0f} s"


def to_rich(table: TextTable) -> rich.table.Table:
    """Render the table for a terminal."""
    rendered = rich.table.Table(
        title=table.title,
        caption=table.note or None,
        title_justify="left",
        caption_justify="left",
        expand=False,
    )
    for i, heading in enumerate(table.columns):
        rendered.add_column(
            heading, justify="right" if i and i not in table.text_columns else "left", no_wrap=i == 0
        )
    for i, row in enumerate(table.rows):
        rendered.add_row(*map(rich.text.Text, row), style="bold" if i == table.emphasis else None)
    return rendered


def to_html(table: TextTable) -> str:
    """Render the table as HTML, inside a box that scrolls sideways on a narrow screen."""
    head = "".join(
        f'<th scope="col"{_alignment(i, table.text_columns)}>{html.escape(heading)}</th>'
        for i, heading in enumerate(table.columns)
    )
    body = "".join(_row(row, i == table.emphasis, table.text_columns) for i, row in enumerate(table.rows))
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    title = f"<caption>{html.escape(table.title)}</caption>" if table.title else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def _row(row, emphasized, text_columns):
    name, *cells = (html.escape(cell) for cell in row)
    css_class = ' class="strong"' if emphasized else ""
    rest = "".join(f"<td{_alignment(i, text_columns)}>{cell}</td>" for i, cell in enumerate(cells, 1))
    return f'<tr{css_class}><th scope="row">{name}</th>{rest}</tr>'


def _alignment(column, text_columns):
    return ' class="words"' if column in text_columns else ""
