"""A folder of safetensors becomes a transformer: every tensor is looked for, measured and named before one is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import import_extra, reading, shortened
from probinfer.lm.models.checkpoints.configs import read_config, read_json
from probinfer.lm.models.checkpoints.names import HARMLESS, block, ends, expected
from probinfer.lm.models.memory import require
from probinfer.lm.models.transformer.config import Config
from probinfer.lm.models.transformer.network import Transformer

__all__ = ["load"]

_SHARD = re.compile(r"[^/\\\0:]+\.safetensors")
PLAIN = ("F64", "F32", "F16", "BF16")


def load(folder: str | Path, dtype: Any = None, scanned: bool | None = None) -> Transformer:
    """Read the transformer in a local folder of Hugging Face's format.

    Args:
        folder: with ``config.json`` and ``*.safetensors`` (one file, or shards with an index).
        dtype: of the weights; ``None``: float32 on a CPU, which is slower in bfloat16, else as stored.
        scanned: see ``Transformer.from_blocks``.

    Returns:
        The model.

    Raises:
        TypeError: ``folder`` is no path, or ``dtype`` no floating one.
        FileNotFoundError: no folder, configuration, weights, or one shard of them is missing.
        ValueError: an unknown architecture; tensors that are missing, unexpected, of other shapes or quantised; a file
            that is cut off or damaged.
        MemoryError: the weights do not fit.
    """
    dtype = None if dtype is None else _floating(dtype)
    config = read_config(folder)
    folder = Path(folder)
    where = _tensors(_files(folder))
    _check(where, config, folder)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else _stored(where)
    size = config.num_parameters() * jnp.dtype(dtype).itemsize
    require(size, f"the model in {folder}", "load it with dtype=jnp.bfloat16, or take a smaller one")

    def read(name):
        return _read(where[name][0], name)

    def arrays(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(jnp.dtype(dtype))), tree)

    blocks = tuple(arrays(block(config, read, layer)) for layer in range(config.num_layers))
    return Transformer.from_blocks(arrays(ends(config, read)), blocks, config, scanned)


def _floating(dtype):
    """A dtype that weights may have."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(
            f"dtype must be one of floating point, such as jnp.float32 or jnp.bfloat16; got {shortened(dtype)}"
        )
    return found


def _files(folder):
    """The files of weights: what the index says, or all there are."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{index} has no weight_map; copy it again")
        strange = [
            name for name in shards.values() if not isinstance(name, str) or not _SHARD.fullmatch(name)
        ]
        if strange:
            raise ValueError(
                f"{index} names {shortened(strange[0])}, which is no *.safetensors file beside it: files elsewhere are "
                "not read; copy the index again, or put the files into its folder and their plain names into it"
            )
        files = sorted({folder / name for name in shards.values()})
        lacking = [path.name for path in files if not path.is_file()]
        if lacking:
            raise FileNotFoundError(
                f"{folder} lacks {_listed(lacking)}, which its index names; copy them too"
            )
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        more = (
            f"; {_listed(pickled)} may run code when read and is refused: convert it with safetensors"
            if pickled
            else ""
        )
        raise FileNotFoundError(f"there is no *.safetensors in {folder}{more}")
    return files


def _open(path):
    library = import_extra("safetensors", "lm")
    with reading(path, "it was cut off or damaged: copy it again"):
        return library.safe_open(str(path), framework="flax")


def _tensors(files):
    """For each tensor its file, its shape and its kind of number."""
    found = {}
    for path in files:
        with _open(path) as file, reading(path, "copy it again"):
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = (path, tuple(part.get_shape()), part.get_dtype())
    return found


def _check(where, config: Config, folder):
    shapes = expected(config)
    missing = [name for name in shapes if name not in where]
    if missing:
        advice = "config.json and the weights do not belong together, or a file is missing"
        if missing == ["lm_head.weight"]:
            advice = "if the head is the embedding, config.json must say tie_word_embeddings: true"
        raise ValueError(f"{folder} lacks the tensors {_listed(missing)}: {advice}")
    ignored = ("lm_head.weight",) if config.tied else ()
    extra = [n for n in where if n not in shapes and n not in ignored and not HARMLESS.search(n)]
    if extra:
        raise ValueError(
            f"{folder} has tensors that the configuration does not use: {_listed(extra)}; the model would not "
            "be the one that was trained"
        )
    kinds = [f"{name} ({where[name][2]})" for name in shapes if where[name][2] not in PLAIN]
    if kinds:
        raise ValueError(
            f"weights must be stored as one of {', '.join(PLAIN)}; got {_listed(kinds)}: give the checkpoint "
            "before its quantisation"
        )
    wrong = [f"{n} {where[n][1]} for {s}" for n, s in shapes.items() if where[n][1] != s]
    if wrong:
        raise ValueError(f"{folder} has tensors of other shapes than config.json says: {_listed(wrong)}")


def _stored(where):
    """The kind of number of the embedding."""
    kind = where["model.embed_tokens.weight"][2]
    return {"F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}[kind]


def _read(path, name):
    with _open(path) as file, reading(path, "copy it again"):
        return np.asarray(file.get_tensor(name))


def _listed(names, most=8):
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
