"""A user's CSV file as numbers, or a sentence that says what is wrong with it and where."""

from __future__ import annotations

import csv
import difflib
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["Table", "TableError", "read_csv", "split_target"]

_MISSING = {"", "na", "n/a", "nan", "null", "none", "?", "-", "."}
_DECIMAL_COMMA = re.compile(r"^[-+]?\d*,\d+(e[-+]?\d+)?$", re.IGNORECASE)
_DELIMITERS = ",;\t|"


class TableError(ValueError):
    """The file cannot be used as it is; the message says where the trouble is and what to do."""


class Table(NamedTuple):
    """Numeric columns of a file.

    Attributes:
        path: the file.
        names: column names, in the order of the file.
        values: ``(N, len(names))``, float64.
    """

    path: Path
    names: tuple[str, ...]
    values: np.ndarray


def read_csv(
    path: str | os.PathLike,
    *,
    drop: tuple[str, ...] = (),
    columns: tuple[str, ...] | None = None,
    target: str | None = None,
) -> Table:
    """Read a file with one header line; commas, semicolons, tabs or bars between the cells.

    Args:
        path: the file.
        drop: columns to leave out.
        columns: read only these, in this order; None: all.
        target: the column that is to be predicted: advice does not say to leave it out.

    Returns:
        The table; every cell is a finite number.

    Raises:
        TableError: there is no such file, it has no header or no rows, a row is too short or too long, two columns
            share a name, a column that was asked for is not there, a column is not numeric, a cell is missing or too
            long.
    """
    path = Path(path)
    header, rows, lines = _cells(path)
    known, left_out = set(header), set(drop)
    for name in (*drop, *(columns or ())):
        if name not in known:
            _index(path, header, name)
    kept = tuple(name for name in (header if columns is None else columns) if name not in left_out)
    if not kept:
        raise TableError(f"{path}: no column is left")
    place = {name: i for i, name in enumerate(header)}
    texts = {name: [row[place[name]] for row in rows] for name in kept}
    _check_numeric(path, texts, target)
    _check_complete(path, texts, lines, target)
    values = np.array([[float(text) for text in texts[name]] for name in kept], np.float64).T
    _check_finite(path, kept, values, lines)
    return Table(path, kept, values)


def split_target(table: Table, target: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Take one column as the output and the others as inputs.

    Returns:
        Inputs ``(N, D)``, outputs ``(N,)``, names of the inputs.

    Raises:
        TableError: there is no such column, or no other one.
    """
    at = _index(table.path, table.names, target)
    if len(table.names) == 1:
        raise TableError(f"{table.path}: {target} is the only column, so there is nothing to predict it from")
    inputs = np.delete(table.values, at, axis=1)
    return inputs, table.values[:, at], table.names[:at] + table.names[at + 1 :]


def _cells(path):
    """Header, rows and the line number of each row, all stripped; empty lines are skipped."""
    if not path.is_file():
        raise TableError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TableError(f"{path} is not a text file in UTF-8; save it as CSV (UTF-8)") from error
    except OSError as error:
        raise TableError(f"{path} cannot be read ({error.strerror}); see that it may be read") from error
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
            f"{path}, line {reader.line_num}: {error}; a quote that is not closed, or a cell of more than "
            f"{csv.field_size_limit()} characters: mend or remove it"
        ) from error
    if len(records) < 2:
        raise TableError(f"{path} has {'no data rows below its header' if records else 'nothing in it'}")
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
            f"{path}: the first line holds numbers, not names; add a header line with one name a column"
        )
    if "" in header:
        hint = " (row numbers, as of a data frame? Write it without its index)" if header[0] == "" else ""
        raise TableError(
            f"{path}: column {header.index('') + 1} has no name in the header; give it one{hint}"
        )
    twice = sorted(name for name, count in Counter(header).items() if count > 1)
    if twice:
        raise TableError(f"{path}: more than one column is called {_listed(twice)}; names must differ")


def _check_numeric(path, texts, target):
    bad = {}
    for name, column in texts.items():
        odd = next((text for text in column if text.lower() not in _MISSING and not _is_number(text)), None)
        if odd is not None:
            bad[name] = odd
    if bad:
        examples = ", ".join(f"{name} (for example '{text[:30]}')" for name, text in list(bad.items())[:8])
        if all(_DECIMAL_COMMA.match(text) for text in bad.values()):
            raise TableError(f"{path}: decimal commas: {examples}. Write numbers with a point, as 1.5")
        advice = "turn categories into 0/1 columns and dates into numbers first"
        others = [name for name in bad if name != target]
        if others:
            advice = f"Leave such columns out with {_drops(others)}, or {advice}"
        if target in bad:
            advice = f"{target} is to be predicted, so it must be numbers: {advice}"
        raise TableError(f"{path}: not numeric: {examples}. {advice}")


def _check_complete(path, texts, lines, target):
    missing = {
        name: [i for i, text in enumerate(column) if text.lower() in _MISSING]
        for name, column in texts.items()
    }
    missing = {name: rows for name, rows in missing.items() if rows}
    if missing:
        where = "; ".join(f"{name} in {_where(rows, lines)}" for name, rows in list(missing.items())[:8])
        num = len(set().union(*missing.values()))
        others = [name for name in missing if name != target]
        advice = f"Fill them in, remove those rows, or leave the columns out with {_drops(others)}"
        if target in missing:
            advice = f"Remove the rows without {target} (--predict takes them, in a file of their own)"
        raise TableError(f"{path}: {num} of {len(lines)} rows have missing values: {where}. {advice}")


def _check_finite(path, names, values, lines):
    for name, column in zip(names, values.T):
        rows = np.flatnonzero(~np.isfinite(column))
        if len(rows):
            raise TableError(
                f"{path}: {name} is infinite in {_where(rows.tolist(), lines)}; remove those rows"
            )


def _index(path, names, name):
    if name in names:
        return list(names).index(name)
    near = difflib.get_close_matches(name.lower(), [known.lower() for known in names], n=1, cutoff=0.6)
    guess = next((known for known in names if near and known.lower() == near[0]), None)
    hint = f"did you mean {guess!r}? " if guess else ""
    raise TableError(f"{path} has no column {name!r}; {hint}Its columns are: {_listed(names)}")


def _where(rows, lines):
    shown = ", ".join(str(lines[row]) for row in rows[:5])
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"line{'s' if len(rows) > 1 else ''} {shown}{more}"


def _listed(names):
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")


def _drops(names):
    return " ".join(f"--drop {_quoted(name)}" for name in names)


def _quoted(name):
    return f'"{name}"' if any(char in name for char in " ()$&;'*?[]|<>") else name


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
