"""Fits on disk: arrays in one ``.npz`` file, their structure beside them as JSON. No pickle, so a file runs no code.

Registered classes and named tuples are written as their qualified name and fields. Reading finds those of this package
by name, and the few of other packages that our engines put in their reports; classes of a user are named in
``gp.load(path, classes=[...])``.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["load", "save"]

_FORMAT = 2
_PLAIN = (bool, int, float, str, type(None))
_FOREIGN = ("blackjax.mcmc.metrics:LowRankInverseMassMatrix",)  # the metric in the report of NUTS and HMC


def save(path: Any, fit: Any) -> None:
    """Write a fit; the file is complete or not there at all.

    Args:
        path: the file, by custom ``NAME.npz``.
        fit: the fit.

    Raises:
        TypeError: the fit holds an object that cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    structure = {"format": _FORMAT, "fit": _encode(fit, arrays, "fit")}
    text = np.frombuffer(json.dumps(structure).encode(), dtype=np.uint8)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.savez(file, **{"structure": text, **arrays})  # type: ignore[arg-type]
    os.replace(partial, path)


def load(path: Any, classes: Any = ()) -> Any:
    """Read a fit that ``fit.save(path)`` wrote.

    Args:
        path: the file.
        classes: the registered classes of your own that the model uses.

    Returns:
        The ``Fit``, in the dtype in which it was made.

    Raises:
        ValueError: the file is not a fit, is of another format, holds a class that was not named in ``classes``, or
            holds float64 numbers while 64-bit mode is off.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        structure = json.loads(arrays.pop("structure").tobytes())
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a fit written by fit.save") from error
    if structure.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has format {structure.get('format')}, this version reads {_FORMAT}; fit again"
        )
    wide = [name for name, array in arrays.items() if array.dtype == np.float64]
    if wide and jnp.result_type(float) != jnp.float64:
        raise ValueError(
            f"{path} holds float64 numbers; call jax.config.update('jax_enable_x64', True) before any computation"
        )
    known = {_qualified(cls): cls for cls in classes}
    return _decode(structure["fit"], arrays, known)


def _qualified(cls) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _encode(value, arrays, where):
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        name = f"a{len(arrays)}"
        arrays[name] = np.asarray(value)
        return {"array": name}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{where}: only dictionaries with string keys can be written")
        return {"dict": {key: _encode(item, arrays, f"{where}.{key}") for key, item in value.items()}}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = {key: _encode(getattr(value, key), arrays, f"{where}.{key}") for key in value._fields}
        return {"class": _qualified(type(value)), "fields": fields}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(item, arrays, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, _PLAIN):
        return {"value": value if not isinstance(value, int) or isinstance(value, bool) else int(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value)]
        fields = {name: _encode(getattr(value, name), arrays, f"{where}.{name}") for name in names}
        return {"class": _qualified(type(value)), "fields": fields}
    raise TypeError(
        f"{where} is a {type(value).__name__}, which cannot be written without pickle; make it a registered class "
        "(probinfer.types.pytree) of arrays and plain values"
    )


def _decode(node, arrays, known):
    if "array" in node:
        return jnp.asarray(arrays[node["array"]])
    if "value" in node:
        return node["value"]
    if "dict" in node:
        return {key: _decode(item, arrays, known) for key, item in node["dict"].items()}
    if "list" in node or "tuple" in node:
        kind = list if "list" in node else tuple
        return kind(_decode(item, arrays, known) for item in next(iter(node.values())))
    fields = {name: _decode(item, arrays, known) for name, item in node["fields"].items()}
    return _instance(_class(node["class"], known), fields)


def _class(name, known):
    if name in known:
        return known[name]
    module, qualname = name.split(":")
    if module.split(".")[0] != "probinfer" and name not in _FOREIGN:
        raise ValueError(
            f"the file uses {name}, which is not part of probinfer; pass gp.load(path, classes=[...])"
        )
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    if not (isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, tuple))):
        raise ValueError(f"{name} is not a class of probinfer that a fit can hold")
    return found


def _instance(cls, fields):
    if issubclass(cls, tuple):
        return cls(**fields)
    obj = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(obj, name, value)
    return obj
