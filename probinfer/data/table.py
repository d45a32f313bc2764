"""Read a CSV file of numbers; errors say what is wrong, where, and what to do."""

from __future__ import annotations

import csv
import difflib
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from probinfer.core.types import Float

__all__ = ["Table", "TableError", "read_csv", "split_target"]

_MISSING = {"", "na", "n/a", "nan", "null", "none", "?", "-", "."}
_DECIMAL_COMMA = re.compile(r"^[-+]?\d*,\d+(e[-+]?\d+)?$", re.IGNORECASE)
_DELIMITERS = ",;\t|"


class TableError(ValueError):
    """The file cannot be used; the message says what is wrong, where, and what to do."""


class Table(NamedTuple):
    """Numeric columns of a file.

    Attributes:
        path: the file.
        names: column names, in the order of the file.
        values: numbers ``(N, D)``, float64, one column for each name.
    """

    path: Path
    names: tuple[str, ...]
    values: Float[np.ndarray, "N D"]


def read_csv(
    path: str | os.PathLike,
    *,
    drop: tuple[str, ...] = (),
    columns: tuple[str, ...] | None = None,
    target: str | None = None,
) -> Table:
    """Read a file with one header line and cells separated by commas, semicolons, tabs or vertical bars.

    Args:
        path: the file.
        drop: columns to leave out.
        columns: columns to read, in this order; None reads all.
        target: the column to be predicted; error messages do not advise to leave it out.

    Returns:
        The table; each cell is a finite number.

    Raises:
        TableError: the file does not exist, has no header or no rows, or a row has the wrong number of cells; two
            columns have the same name; a requested column does not exist; a column is not numeric; a cell is missing
            or too long.
    """
    path = Path(path)
    header, rows, lines = _read_cells(path)
    known, left_out = set(header), set(drop)
    for name in (*drop, *(columns or ())):
        if name not in known:
            _index(path, header, name)  # raises, with advice
    selected = tuple(name for name in (header if columns is None else columns) if name not in left_out)
    if not selected:
        raise TableError(f"{path}: no column is left")
    index = {name: i for i, name in enumerate(header)}
    texts = {name: [row[index[name]] for row in rows] for name in selected}
    _check_numeric(path, texts, target)
    _check_complete(path, texts, lines, target)
    values = np.array([[float(text) for text in texts[name]] for name in selected], np.float64).T
    _check_finite(path, selected, values, lines)
    return Table(path, selected, values)


def split_target(table: Table, target: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Use one column as the output and the others as inputs.

    Args:
        table: the table.
        target: name of the output column.

    Returns:
        Inputs ``(N, D)``, outputs ``(N,)``, names of the inputs.

    Raises:
        TableError: the column does not exist, or it is the only one.
    """
    column = _index(table.path, table.names, target)
    if len(table.names) == 1:
        raise TableError(f"{table.path}: {target} is the only column, so there is nothing to predict it from")
    inputs = np.delete(table.values, column, axis=1)
    return inputs, table.values[:, column], table.names[:column] + table.names[column + 1 :]


def _read_cells(path):
    """Return header, rows and the line number of each row; cells are stripped, empty lines skipped."""
    if not path.is_file():
        raise TableError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TableError(f"{path} is not a text file in UTF-8; save it as CSV (UTF-8)") from error
    except OSError as error:
        raise TableError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(_DELIMITERS, key=first.count)
    reader = csv.reader(text.splitlines(), delimiter=delimiter)
    try:
        records = [
            (reader.line_num, [cell.strip() for cell in row])
            for row in reader
            if any(cell.strip() for cell in row)
        ]
    except csv.Error as error:
        raise TableError(
            f"{path}, line {reader.line_num}: {error}; a quote is not closed, or a cell has more than "
            f"{csv.field_size_limit()} characters: correct or remove it"
        ) from error
    if len(records) < 2:
        raise TableError(f"{path} {'has no data rows below its header' if records else 'is empty'}")
    header = records[0][1]
    _check_header(path, header)
    for line, row in records[1:]:
        if len(row) != len(header):
            raise TableError(
                f"{path}, line {line}: {len(row)} cells, but the header has {len(header)} columns"
            )
    return header, [row for _, row in records[1:]], [line for line, _ in records[1:]]


def _check_header(path, header):
    if all(_is_number(name) for name in header):
        raise TableError(
            f"{path}: the first line has numbers, not names; add a header line with one name for each column"
        )
    if "" in header:
        hint = (
            " (if it is the index of a data frame, write the file without the index)"
            if header[0] == ""
            else ""
        )
        raise TableError(f"{path}: column {header.index('') + 1} has no name in the header; add a name{hint}")
    duplicates = sorted(name for name, count in Counter(header).items() if count > 1)
    if duplicates:
        raise TableError(
            f"{path}: more than one column is called {_listed(duplicates)}; names must be unique"
        )


def _check_numeric(path, texts, target):
    invalid = {}  # the first invalid cell of each column
    for name, column in texts.items():
        cell = next((text for text in column if text.lower() not in _MISSING and not _is_number(text)), None)
        if cell is not None:
            invalid[name] = cell
    if invalid:
        examples = ", ".join(
            f"{name} (for example '{text[:30]}')" for name, text in list(invalid.items())[:8]
        )
        if all(_DECIMAL_COMMA.match(text) for text in invalid.values()):
            raise TableError(
                f"{path}: decimal commas: {examples}. Write numbers with a decimal point, such as 1.5"
            )
        advice = "convert categories to 0/1 columns and dates to numbers first"
        others = [name for name in invalid if name != target]
        if others:
            advice = f"Leave these columns out with {_drop_options(others)}, or {advice}"
        if target in invalid:
            advice = f"{target} is to be predicted, so it must be numeric: {advice}"
        raise TableError(f"{path}: not numeric: {examples}. {advice}")


def _check_complete(path, texts, lines, target):
    missing = {
        name: [i for i, text in enumerate(column) if text.lower() in _MISSING]
        for name, column in texts.items()
    }
    missing = {name: rows for name, rows in missing.items() if rows}
    if missing:
        listed = "; ".join(f"{name} in {_line_list(rows, lines)}" for name, rows in list(missing.items())[:8])
        num = len(set().union(*missing.values()))
        others = [name for name in missing if name != target]
        advice = f"Fill in the values, remove the rows, or leave the columns out with {_drop_options(others)}"
        if target in missing:
            advice = f"Remove the rows without {target} (--predict accepts them in a separate file)"
        raise TableError(f"{path}: {num} of {len(lines)} rows have missing values: {listed}. {advice}")


def _check_finite(path, names, values, lines):
    for name, column in zip(names, values.T):
        rows = np.flatnonzero(~np.isfinite(column))
        if len(rows):
            raise TableError(
                f"{path}: {name} is infinite in {_line_list(rows.tolist(), lines)}; remove these rows"
            )


def _index(path, names, name):
    if name in names:
        return list(names).index(name)
    matches = difflib.get_close_matches(name.lower(), [known.lower() for known in names], n=1, cutoff=0.6)
    suggestion = next((known for known in names if matches and known.lower() == matches[0]), None)
    hint = f"did you mean {suggestion!r}? " if suggestion else ""
    raise TableError(f"{path} has no column {name!r}; {hint}Its columns are: {_listed(names)}")


def _line_list(rows, lines):
    shown = ", ".join(str(lines[row]) for row in rows[:5])
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"line{'s' if len(rows) > 1 else ''} {shown}{more}"


def _listed(names):
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")


def _drop_options(names):
    return " ".join(f"--drop {_quoted(name)}" for name in names)


def _quoted(name):
    return f'"{name}"' if any(char in name for char in " ()$&;'*?[]|<>") else name


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
