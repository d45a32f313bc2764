"""Read a transformer from a folder of safetensors; names, shapes and dtypes of all tensors are checked first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import import_extra, reading, shortened
from probinfer.lm.models.checkpoints.configs import read_config, read_json
from probinfer.lm.models.checkpoints.names import IGNORED, block_weights, end_weights, expected_shapes
from probinfer.lm.models.memory import require
from probinfer.lm.models.transformer.config import Config
from probinfer.lm.models.transformer.network import Transformer

__all__ = ["load"]

_SHARD = re.compile(r"[^/\\\0:]+\.safetensors")
_DTYPES = {"F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


def load(folder: str | Path, dtype: Any = None, scanned: bool | None = None) -> Transformer:
    """Read the transformer in a local folder of Hugging Face's format.

    Args:
        folder: a folder with ``config.json`` and ``*.safetensors`` (one file, or shards with an index).
        dtype: dtype of the weights; ``None``: float32 on a CPU, which is slower in bfloat16, else as stored.
        scanned: see ``Transformer.from_blocks``.

    Returns:
        The model.

    Raises:
        TypeError: ``folder`` is not a path, or ``dtype`` is not a floating one.
        FileNotFoundError: the folder, the configuration, the weights or one shard of them is missing.
        ValueError: the architecture is unknown; tensors are missing, unexpected, of other shapes or quantized; a file
            is cut off or damaged.
        MemoryError: the weights do not fit.
    """
    dtype = None if dtype is None else _as_floating(dtype)
    config = read_config(folder)
    folder = Path(folder)
    tensors = _tensors(_files(folder))
    _check(tensors, config, folder)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else _stored_dtype(tensors)
    size = config.num_parameters() * jnp.dtype(dtype).itemsize
    require(size, f"the model in {folder}", "load it with dtype=jnp.bfloat16, or use a smaller one")

    def read(name):
        return _read(tensors[name][0], name)

    def arrays(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(jnp.dtype(dtype))), tree)

    blocks = tuple(arrays(block_weights(config, read, layer)) for layer in range(config.num_layers))
    return Transformer.from_blocks(arrays(end_weights(config, read)), blocks, config, scanned)


def _as_floating(dtype):
    """Return a dtype that weights may have."""
    try:
        valid = jnp.dtype(dtype)
    except TypeError:
        valid = None
    if valid is None or not jnp.issubdtype(valid, jnp.floating):
        raise TypeError(
            f"dtype must be one of floating point, such as jnp.float32 or jnp.bfloat16; got {shortened(dtype)}"
        )
    return valid


def _files(folder):
    """Return the files of weights: those that the index names, or all if there is no index."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{index} has no weight_map; copy it again")
        invalid = [
            name for name in shards.values() if not isinstance(name, str) or not _SHARD.fullmatch(name)
        ]
        if invalid:
            raise ValueError(
                f"{index} names {shortened(invalid[0])}, which is no *.safetensors file beside it: files elsewhere are "
                "not read; copy the index again, or put the files into its folder and their plain names into it"
            )
        files = sorted({folder / name for name in shards.values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {_list_names(missing)}, which its index names; copy them too"
            )
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        note = (
            f"; {_list_names(pickled)} may run code when read and is refused: convert it with safetensors"
            if pickled
            else ""
        )
        raise FileNotFoundError(f"there is no *.safetensors in {folder}{note}")
    return files


def _open(file):
    library = import_extra("safetensors", "lm")
    with reading(file, "it was cut off or damaged: copy it again"):
        return library.safe_open(str(file), framework="flax")


def _tensors(files):
    """Return the file, the shape and the stored dtype of each tensor, by its name."""
    tensors = {}
    for file in files:
        with _open(file) as opened, reading(file, "copy it again"):
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_slice(name)
                tensors[name] = (file, tuple(tensor.get_shape()), tensor.get_dtype())
    return tensors


def _check(tensors, config: Config, folder):
    """Refuse tensors that are missing, unexpected, quantized or of other shapes than the configuration says."""
    shapes = expected_shapes(config)
    missing = [name for name in shapes if name not in tensors]
    if missing:
        advice = "config.json and the weights do not belong together, or a file is missing"
        if missing == ["lm_head.weight"]:
            advice = "if the head is the embedding, config.json must say tie_word_embeddings: true"
        raise ValueError(f"{folder} lacks the tensors {_list_names(missing)}: {advice}")
    unused = ("lm_head.weight",) if config.tied else ()
    extra = [n for n in tensors if n not in shapes and n not in unused and not IGNORED.search(n)]
    if extra:
        raise ValueError(
            f"{folder} has tensors that the configuration does not use: {_list_names(extra)}; the model would not "
            "be the one that was trained"
        )
    quantized = [f"{name} ({tensors[name][2]})" for name in shapes if tensors[name][2] not in _DTYPES]
    if quantized:
        raise ValueError(
            f"weights must be stored as one of {', '.join(_DTYPES)}; got {_list_names(quantized)}: give the checkpoint "
            "before its quantization"
        )
    wrong = [f"{n} {tensors[n][1]} for {s}" for n, s in shapes.items() if tensors[n][1] != s]
    if wrong:
        raise ValueError(f"{folder} has tensors of other shapes than config.json says: {_list_names(wrong)}")


def _stored_dtype(tensors):
    """Return the dtype of the embedding."""
    return _DTYPES[tensors["model.embed_tokens.weight"][2]]


def _read(file, name):
    with _open(file) as opened, reading(file, "copy it again"):
        return np.asarray(opened.get_tensor(name))


def _list_names(names, max_names=8):
    shown = ", ".join(names[:max_names])
    return shown if len(names) <= max_names else f"{shown} and {len(names) - max_names} more"
