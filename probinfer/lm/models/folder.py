"""A model from a local folder: its network and its tokenizer, which must know the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probinfer.lm.models import checkpoints
from probinfer.lm.models.checkpoints.configs import as_folder
from probinfer.lm.models.model import Model
from probinfer.lm.tokens.tokenizer import Tokenizer

__all__ = ["load"]


def load(folder: str | Path, dtype: Any = None) -> Model:
    """Read a language model, p(x | c) with its tokenizer, from a checkpoint folder of Hugging Face's format.

    Nothing is downloaded, and nothing in the folder is run.

    Args:
        folder: a folder with ``config.json``, ``*.safetensors`` and ``tokenizer.json``; the end tokens and the chat
            template are read if the folder has them.
        dtype: dtype of the weights; None: float32 on a CPU, which is slower in bfloat16, else as stored.

    Returns:
        The model, for ``lm.infer``.

    Raises:
        TypeError: ``folder`` is not a path, or ``dtype`` is not a floating one.
        FileNotFoundError: there is no such folder, or it lacks one of the files.
        ValueError: the architecture is unknown, tensors are missing or damaged, or the tokenizer has more tokens than
            the network.
        MemoryError: the weights do not fit.
    """
    folder = as_folder(folder).expanduser()
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(_lacks_tokenizer(folder))
    network = checkpoints.load(folder, dtype=dtype)
    return Model(network, Tokenizer.from_folder(folder, vocab_size=network.vocab_size))


def _lacks_tokenizer(folder: Path) -> str:
    """Return what to do about a folder without ``tokenizer.json``."""
    if not (folder / "config.json").is_file():
        return f"{folder} is no checkpoint folder: it has neither config.json nor tokenizer.json"
    note = "; its tokenizer.model alone is not read" if (folder / "tokenizer.model").is_file() else ""
    return (
        f"{folder} has no tokenizer.json{note}: copy it from the same checkpoint, or read the network alone with "
        "lm.checkpoints.load(folder) and give it a tokenizer: lm.Model(network, lm.Tokenizer(path))"
    )
