"""Files of posteriordb: data and reference draws, JSON in zip archives, in the folder that PROBINFER_DATA names."""

from __future__ import annotations

import json
import re
import zipfile
from typing import Any

import numpy as np
from measurements import measurement_path

__all__ = ["read_data", "read_draws"]

_ELEMENT = re.compile(r"(?P<name>.+)\[(?P<index>\d+)\]")


def read_data(name: str) -> dict[str, Any]:
    """The contents of a data file.

    Args:
        name: of the data, for example ``"kidiq"``.

    Raises:
        FileNotFoundError: the environment variable is not set, or the folder or the file is missing.
        ValueError: not a zip archive with one JSON file.
    """
    return _read(f"posteriordb/data/{name}.json.zip")


def read_draws(name: str) -> dict[str, np.ndarray]:
    """Reference draws by quantity, arrays (chain, draw, ...): the elements of a vector are put together.

    Args:
        name: of the posterior, for example ``"arK-arK"``.

    Raises:
        FileNotFoundError: the environment variable is not set, or the folder or the file is missing.
        ValueError: not a zip archive with one JSON file, chains that differ in length or names, draws that are not
            finite numbers.
    """
    chains = _read(f"posteriordb/draws/{name}.json.zip")
    try:
        stacked = {key: np.array([chain[key] for chain in chains], float) for key in chains[0]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the draws of {name} should be chains of equal length with the same names: {error}"
        ) from error
    for key, values in stacked.items():
        if values.ndim != 2 or not np.isfinite(values).all():
            raise ValueError(f"the draws of {name} for {key} are not finite numbers, a list in every chain")
    return _joined(stacked)


def _joined(stacked: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``beta[1], beta[2], ...`` become ``beta`` with a last axis."""
    joined: dict[str, Any] = {}
    for key, values in stacked.items():
        if match := _ELEMENT.fullmatch(key):
            joined.setdefault(match["name"], {})[int(match["index"])] = values
        else:
            joined[key] = values
    return {
        key: np.stack([value[i] for i in sorted(value)], axis=-1) if isinstance(value, dict) else value
        for key, value in joined.items()
    }


def _read(relative: str) -> Any:
    path = measurement_path(relative)
    try:
        with zipfile.ZipFile(path) as archive:
            (member,) = archive.namelist()
            return json.loads(archive.read(member))
    except (zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{path} should be a zip archive with one JSON file: {error}") from error
