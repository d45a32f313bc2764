"""Fits on disk: arrays in one ``.npz`` file, their structure beside them as JSON. No pickle, so a file runs no code.

Registered classes and named tuples are written as their name and fields. A class of this library is named by its
package alone (``probinfer.gp:Fit``), so files outlive a move from one module to another. Reading finds those by name,
and the few of other libraries that our engines put in their reports; classes of a user are named in
``gp.load(path, classes=[...])``.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import math
import pkgutil
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import reading
from probinfer.running.sealed_files import whole

__all__ = ["load", "save"]

_FORMAT = 3
_PLAIN = (bool, int, float, str, type(None))
# What a fit can hold: models, posteriors and the reports of engines.
_ROOMS = ("core", "coin", "gp", "inference", "kernels", "mcmc", "numerics", "running", "smc", "targets", "vi")
_PACKAGES = tuple(f"probinfer.{room}" for room in _ROOMS)
_FOREIGN = ("blackjax.mcmc.metrics:LowRankInverseMassMatrix",)  # the metric in the report of NUTS and HMC


def save(path: Any, fit: Any) -> None:
    """Write a fit; the file is complete or not there at all.

    Args:
        path: the file, by custom ``NAME.npz``.
        fit: the fit.

    Raises:
        TypeError: the fit holds an object that cannot be written.
        OSError: the file cannot be written, such as on a full disk; one that was there is unchanged.
    """
    arrays: dict[str, np.ndarray] = {}
    structure = {"format": _FORMAT, "fit": _encode(fit, arrays, "fit")}
    text = np.frombuffer(json.dumps(structure).encode(), dtype=np.uint8)
    with whole(path) as stream:
        np.savez(stream, **{"structure": text, **arrays})  # type: ignore[arg-type]


def load(path: Any, classes: Any = ()) -> Any:
    """Read a fit that ``fit.save(path)`` wrote.

    Args:
        path: the file.
        classes: the registered classes of your own that the model uses.

    Returns:
        The ``Fit``, in the dtype in which it was made.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: the file is not a fit, is damaged, or is of another format.
        ValueError: it holds a class that was not named in ``classes``, or float64 numbers while 64-bit mode is off.
    """
    with reading(
        path, "it is not a fit written by fit.save, or was damaged: take a copy of it, or fit again"
    ):
        arrays = _arrays(Path(path))
        structure = json.loads(arrays.pop("structure").tobytes())
        if structure.get("format") != _FORMAT:
            raise ValueError(f"it has format {structure.get('format')!r}, and this version reads {_FORMAT}")
        wide = [name for name, array in arrays.items() if array.dtype == np.float64]
        if wide and jnp.result_type(float) != jnp.float64:
            raise ValueError(
                f"{path} holds float64 numbers; call jax.config.update('jax_enable_x64', True) before any computation"
            )
        found = _decode(structure["fit"], arrays, {_qualified(cls): cls for cls in classes})
        if type(found).__qualname__ != "Fit":
            raise ValueError(f"it holds a {type(found).__name__}")
        return found


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive; what it says of their sizes is held against the size of the file."""
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("it would unpack to more than its own size, which no file of fit.save does")
        for member in members:
            arrays[member.filename.removesuffix(".npy")] = _array(io.BytesIO(archive.read(member)))
    return arrays


def _array(stream: io.BytesIO) -> np.ndarray:
    """One array, whose header must be true of the bytes behind it."""
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(stream)]
    shape, in_columns, dtype = read_header(stream)
    raw = stream.read()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"an array of {dtype}{list(shape)} does not fit its {len(raw)} bytes")
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if in_columns else "C")


def _qualified(cls) -> str:
    """The name of a class in a file; see the module's docstring."""
    parts = cls.__module__.split(".")
    module = ".".join(parts[:2]) if parts[0] == "probinfer" else cls.__module__
    return f"{module}:{cls.__qualname__}"


@cache
def _defined_in(package: str) -> dict[str, type]:
    """The classes of one package of this library, by their names; those of its inner modules too."""
    found = importlib.import_module(package)
    names = [item.name for item in pkgutil.walk_packages(found.__path__, f"{package}.")]
    modules = [found, *map(importlib.import_module, names)]
    return {
        value.__qualname__: value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    }


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
        "(probinfer.core.types.pytree) of arrays and plain values"
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
    if module in _PACKAGES:
        found: Any = _defined_in(module).get(qualname)
    elif name in _FOREIGN:
        found = getattr(importlib.import_module(module), qualname)
    else:
        raise ValueError(f"it uses {name}, which is not part of probinfer; pass gp.load(path, classes=[...])")
    if not (isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, tuple))):
        raise ValueError(f"{name} is not a class of probinfer that a fit can hold")
    return found


def _instance(cls, fields):
    if issubclass(cls, tuple):
        return cls(**fields)
    known = {item.name: item for item in dataclasses.fields(cls)}
    lacking = [
        name for name, item in known.items() if name not in fields and item.default is dataclasses.MISSING
    ]
    if lacking or set(fields) - set(known):
        raise ValueError(
            f"{cls.__name__} has the fields {', '.join(known)}, and the file {', '.join(fields)}"
        )
    obj = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(obj, name, value)
    return obj
