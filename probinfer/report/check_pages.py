"""Reports of checks on one page: verdicts, detectable errors, numbers and plots."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from probinfer.checks.calibration.rank_uniformity import OUTCOMES
from probinfer.core.errors import import_extra, shortened
from probinfer.plots.style import Picture, draw
from probinfer.report.html import Gallery, Paragraph, Section, check_folder, page, write_page
from probinfer.report.tables import TextTable, number

__all__ = ["check_page", "could_have_seen", "numbers", "picture", "report_blocks"]

_MAX_ROWS = 12  # of a table; further rows are only counted


def check_page(
    reports: Mapping[str, Any],
    path: str | os.PathLike,
    *,
    title: str = "Is the posterior right?",
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write reports of checks on one self-contained HTML page.

    Args:
        reports: heading -> a report of ``probinfer.checks``, or any object with ``verdict`` (text) and optionally
            ``passed`` (True, False or None) and ``plot(axes)``.
        path: a file that ends in .html, or a folder for index.html.
        title: title of the page.
        facts: name -> value of settings of the run; the last section.

    Returns:
        The path of the file.

    Raises:
        ValueError: there are no reports, the path is not writable, or a report has no verdict.
        MissingExtraError: matplotlib is not installed.
    """
    if not reports:
        raise ValueError("there is nothing to show: reports is empty; pass {'SBC': checks.sbc(...), ...}")
    for name, report in reports.items():
        if not isinstance(getattr(report, "verdict", None), str):
            raise ValueError(
                f"'{name}' must be a report of probinfer.checks, with a verdict; got {shortened(report)}"
            )
    path = Path(path)
    folder, file = (path.parent, path.name) if path.suffix == ".html" else (path, "index.html")
    check_folder(folder)
    import_extra("matplotlib", "plots")
    rows = tuple((name, _outcome(report), could_have_seen(report)) for name, report in reports.items())
    columns = ("check", "verdict", "smallest error that it could have seen")
    table = TextTable("In short", columns, rows, text_columns=(1, 2))
    sections = [Section("In short", (table._replace(title=""),))]
    sections += [Section(name, report_blocks(name, report)) for name, report in reports.items()]
    text = page(title, _lead(reports), sections, list((facts or {}).items()))
    return write_page(folder, text, name=file)


def report_blocks(name: str, report: Any, *, remark: str = "") -> tuple[Paragraph | Gallery | TextTable, ...]:
    """Return the verdict, the plot and the numbers of one report.

    Args:
        name: name of the report.
        report: report of a check.
        remark: further sentence, shown as a warning.
    """
    passed = getattr(report, "passed", None)
    blocks: list[Any] = [Paragraph(_sentence(report.verdict), "remark" if passed is False else "finding")]
    blocks += [Paragraph(remark, "remark")] if remark else []
    blocks += [Gallery((picture(name, report),))] if hasattr(report, "plot") else []
    return (*blocks, *numbers(report))


def picture(name: str, report: Any, *, width: float = 4.6, height: float = 3.3) -> Picture:
    """Draw the plot of a report, for light and dark pages.

    Args:
        name: title of the picture.
        report: report with ``plot(axes)``.
        width: inches.
        height: inches.
    """

    def fn(axes, theme):
        del theme  # already in matplotlib's settings
        report.plot(axes)

    detectable = could_have_seen(report)
    caption = f"Could have seen: {detectable}." if detectable else ""
    return draw(name, caption, fn, width=width, height=height)


def could_have_seen(report: Any) -> str:
    """Describe the smallest error that a check would have detected; "" if the report does not contain it."""
    power = _nested_attribute(report, "power")
    if power is not None and hasattr(power, "too_wide"):
        if not np.isfinite(power.bias):
            return "nothing: too few simulations"
        widths = [power.too_narrow] if power.too_narrow > 0 else []
        widths += [power.too_wide] if np.isfinite(power.too_wide) else []
        parts = [f"bias {power.bias:.2f} sd"]
        parts += [f"width times {' or '.join(f'{width:.2f}' for width in widths)}"] if widths else []
        return ", ".join(parts)
    bound = getattr(report, "kl_bound", None)
    if bound is not None:
        return f"bounds the error: KL both ways below {number(bound, 2)} nats"
    critical = getattr(report, "detectable", None)
    if critical is None:
        return ""
    if hasattr(report, "accuracies"):
        return f"held-out accuracy {critical:.3f}"
    return f"{getattr(report, 'name', 'statistic')} above {number(critical, 2)}"


def numbers(report: Any) -> list[TextTable]:
    """Return tables of all fields of a report that are numbers or short lists of numbers."""
    tables = [_pvalues(report)] if isinstance(_nested_attribute(report, "raw_pvalues"), Mapping) else []
    if not dataclasses.is_dataclass(report):
        return tables
    fields = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    scalars = [(_label(name), number(float(value), 4)) for name, value in fields.items() if _is_number(value)]
    if scalars:
        tables.append(TextTable("", ("number", "value"), tuple(scalars)))
    groups: dict[tuple, dict[str, list]] = {}
    for name, value in fields.items():
        keys, values = _keys_and_values(value)
        if keys and name not in ("pvalues", "raw_pvalues"):
            groups.setdefault(keys, {})[_label(name)] = values
    for keys, columns in groups.items():
        rows = [(key, *(number(column[i], 3) for column in columns.values())) for i, key in enumerate(keys)]
        tables.append(_truncated(TextTable("", ("", *columns), tuple(rows))))
    return tables


def _pvalues(report):
    raw = _nested_attribute(report, "raw_pvalues")
    adjusted = _nested_attribute(report, "pvalues")
    order = sorted(raw, key=lambda name: raw[name])
    rows = tuple((name, number(raw[name], 2), number(adjusted[name], 2)) for name in order)
    return _truncated(TextTable("", ("quantity", "p-value", "adjusted for all of them (Holm)"), rows))


def _truncated(table):
    if len(table.rows) <= _MAX_ROWS:
        return table
    return table._replace(rows=table.rows[:_MAX_ROWS], note=f"and {len(table.rows) - _MAX_ROWS} more")


def _nested_attribute(report, name):
    """Return an attribute of a report, or of the test of ranks inside it."""
    nested = (getattr(report, field, None) for field in ("uniform", "ranks"))
    values = (getattr(owner, name, None) for owner in (report, *nested))
    return next((value for value in values if value is not None), None)


def _is_number(value):
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _keys_and_values(value):
    """Return (keys, values) of a short list or mapping of numbers, otherwise ((), [])."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and 0 < len(value) <= _MAX_ROWS:
        return tuple(map(str, range(len(value)))), value.astype(float).tolist()
    if isinstance(value, Mapping) and value and all(map(_is_number, value.values())):
        return tuple(map(str, value)), list(map(float, value.values()))
    return (), []


def _label(name):
    return name.replace("_", " ")


def _outcome(report):
    return OUTCOMES[getattr(report, "passed", None)] if hasattr(report, "passed") else "-"


def _sentence(text):
    text = str(text)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _lead(reports):
    failed = [name for name, report in reports.items() if getattr(report, "passed", None) is False]
    undecided = [name for name, report in reports.items() if getattr(report, "passed", False) is None]
    lead = f"Failed: {', '.join(failed)}. " if failed else "No check failed. "
    if undecided:
        lead += f"No verdict from: {', '.join(undecided)}. "
    return lead + "Beside each verdict stands the smallest error that the check could have seen."
