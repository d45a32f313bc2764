"""Fits on disk: one ``.npz`` file of arrays and of their structure as JSON. No pickle, so that a file runs no code.

Registered classes and named tuples are written as their name and fields. A class of this library is named by its
package alone (``probinfer.gp:Fit``), so that a file stays valid if the class moves to another module. These classes,
and the few of other libraries that reports of our engines contain, are found by name; those of a user must be passed to
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
# The packages whose classes a fit can contain: models, posteriors and the reports of engines.
_PACKAGE_NAMES = (
    "core",
    "coin",
    "gp",
    "inference",
    "kernels",
    "mcmc",
    "numerics",
    "running",
    "smc",
    "targets",
    "vi",
)
_PACKAGES = tuple(f"probinfer.{name}" for name in _PACKAGE_NAMES)
_FOREIGN = ("blackjax.mcmc.metrics:LowRankInverseMassMatrix",)  # the metric in the report of NUTS and HMC


def save(path: Any, fit: Any) -> None:
    """Write a fit to a file, completely or not at all.

    Args:
        path: the file, by convention ``NAME.npz``.
        fit: the fit.

    Raises:
        TypeError: the fit contains an object that cannot be written.
        OSError: the file cannot be written, for example on a full disk; an existing file is unchanged.
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
        classes: your own registered classes that the model uses.

    Returns:
        The ``Fit``, in the dtype in which it was written.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: the file is not a fit, is damaged, or is of another format.
        ValueError: it contains a class that is not in ``classes``, or float64 numbers while 64-bit mode is off.
    """
    with reading(path, "it is not a fit written by fit.save, or was damaged: use a copy of it, or fit again"):
        arrays = _arrays(Path(path))
        structure = json.loads(arrays.pop("structure").tobytes())
        if structure.get("format") != _FORMAT:
            raise ValueError(f"it has format {structure.get('format')!r}, and this version reads {_FORMAT}")
        has_float64 = any(array.dtype == np.float64 for array in arrays.values())
        if has_float64 and jnp.result_type(float) != jnp.float64:
            raise ValueError(
                f"{path} holds float64 numbers; call jax.config.update('jax_enable_x64', True) before any computation"
            )
        fit = _decode(structure["fit"], arrays, {_qualified_name(cls): cls for cls in classes})
        if type(fit).__qualname__ != "Fit":
            raise ValueError(f"it contains a {type(fit).__name__}")
        return fit


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive, whose declared sizes are compared with the size of the file before anything is read."""
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        is_compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if is_compressed or sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("it would unpack to more than its own size, which no file of fit.save does")
        for member in members:
            arrays[member.filename.removesuffix(".npy")] = _array(io.BytesIO(archive.read(member)))
    return arrays


def _array(stream: io.BytesIO) -> np.ndarray:
    """Read one array, whose header must agree with the number of bytes that follow it."""
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(stream)]
    shape, in_columns, dtype = read_header(stream)
    raw = stream.read()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"an array of {dtype}{list(shape)} does not fit its {len(raw)} bytes")
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if in_columns else "C")


def _qualified_name(cls) -> str:
    """The name of a class in a file; see the docstring of the module."""
    parts = cls.__module__.split(".")
    module = ".".join(parts[:2]) if parts[0] == "probinfer" else cls.__module__
    return f"{module}:{cls.__qualname__}"


@cache
def _defined_in(package: str) -> dict[str, type]:
    """The classes of one package of this library and of all its modules, by name."""
    root = importlib.import_module(package)
    names = [item.name for item in pkgutil.walk_packages(root.__path__, f"{package}.")]
    modules = [root, *map(importlib.import_module, names)]
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
        return {"class": _qualified_name(type(value)), "fields": fields}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(item, arrays, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, _PLAIN):
        return {"value": value if not isinstance(value, int) or isinstance(value, bool) else int(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value)]
        fields = {name: _encode(getattr(value, name), arrays, f"{where}.{name}") for name in names}
        return {"class": _qualified_name(type(value)), "fields": fields}
    raise TypeError(
        f"{where} is a {type(value).__name__}, which cannot be written without pickle; make it a registered class "
        "(probinfer.core.types.pytree) of arrays and plain values"
    )


def _decode(node, arrays, classes):
    if "array" in node:
        return jnp.asarray(arrays[node["array"]])
    if "value" in node:
        return node["value"]
    if "dict" in node:
        return {key: _decode(item, arrays, classes) for key, item in node["dict"].items()}
    if "list" in node or "tuple" in node:
        kind = list if "list" in node else tuple
        return kind(_decode(item, arrays, classes) for item in next(iter(node.values())))
    fields = {name: _decode(item, arrays, classes) for name, item in node["fields"].items()}
    return _instance(_class(node["class"], classes), fields)


def _class(name, classes):
    if name in classes:
        return classes[name]
    module, qualname = name.split(":")
    if module in _PACKAGES:
        cls: Any = _defined_in(module).get(qualname)
    elif name in _FOREIGN:
        cls = getattr(importlib.import_module(module), qualname)
    else:
        raise ValueError(f"it uses {name}, which is not part of probinfer; pass gp.load(path, classes=[...])")
    if not (isinstance(cls, type) and (dataclasses.is_dataclass(cls) or issubclass(cls, tuple))):
        raise ValueError(f"{name} is not a class of probinfer that a fit can contain")
    return cls


def _instance(cls, fields):
    if issubclass(cls, tuple):
        return cls(**fields)
    declared = {item.name: item for item in dataclasses.fields(cls)}
    missing = [
        name for name, item in declared.items() if name not in fields and item.default is dataclasses.MISSING
    ]
    if missing or set(fields) - set(declared):
        raise ValueError(
            f"{cls.__name__} has the fields {', '.join(declared)}, and the file has {', '.join(fields)}"
        )
    # Without __init__, whose checks would refuse stacked leaves
    obj = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(obj, name, value)
    return obj
