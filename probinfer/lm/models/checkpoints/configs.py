"""Translate the ``config.json`` of a checkpoint; features that are not computed here are refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from probinfer.core.errors import reading, shortened
from probinfer.lm.models.transformer.config import Config
from probinfer.lm.models.transformer.rope import KINDS, Rope

__all__ = ["FAMILIES", "as_folder", "parse_config", "read_config", "read_json"]

FAMILIES = ("llama", "qwen2", "qwen3")
_MAX_BYTES = 2**28  # of a file of settings; the index of the largest checkpoints has some megabytes
_MAX_VALUES = {"num_hidden_layers": 4096}  # the largest models have 126 layers


def as_folder(folder: Any) -> Path:
    """Return a folder as a ``Path``.

    Raises:
        TypeError: it is not a path.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"expected the path of a checkpoint folder, got {shortened(folder)}")
    return Path(folder)


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not contain a JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no {file.name} in {file.parent}; give the folder of a Hugging Face checkpoint"
        )
    with reading(file, "copy it again"):
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"a file of {file.stat().st_size} bytes is too large for settings")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"it is not JSON ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(f"it must contain a JSON object; got {shortened(content)}")
        return content


def read_config(folder: str | Path) -> Config:
    """Read the configuration of a checkpoint folder.

    Args:
        folder: a folder with a ``config.json``.

    Raises:
        TypeError: ``folder`` is not a path.
        FileNotFoundError: there is no such folder, or no ``config.json`` in it.
        ValueError: see ``parse_config``.
    """
    folder = as_folder(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; checkpoints are read from disk, never downloaded"
        )
    raw = read_json(folder / "config.json")
    with reading(folder / "config.json", "give the original checkpoint, or copy it again"):
        return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> Config:
    """Translate a configuration.

    Args:
        raw: the content of ``config.json``.

    Raises:
        ValueError: the architecture, rotation, activation or quantization is not computed here, or an entry is missing.
    """
    family = _family(raw)
    _refuse(raw)
    head_dim = raw.get("head_dim") or (128 if family == "qwen3" else None)
    layers = _integer(raw, "num_hidden_layers")
    rope, context = _rope(raw, _integer(raw, "max_position_embeddings"))
    has_bias = bool(raw.get("attention_bias", False))
    return Config(
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=_integer(raw, "hidden_size"),
        intermediate_size=_integer(raw, "intermediate_size"),
        num_layers=layers,
        num_heads=_integer(raw, "num_attention_heads"),
        num_kv_heads=raw.get("num_key_value_heads"),
        head_dim=head_dim,
        max_context=context,
        norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=rope,
        qkv_bias=family == "qwen2" or has_bias,
        out_bias=family != "qwen2" and has_bias,
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        tied=bool(raw.get("tie_word_embeddings", False)),
        windows=_windows(raw, layers) if family != "llama" else (),
    )


def _family(raw):
    family, names = raw.get("model_type"), raw.get("architectures") or []
    if not isinstance(names, list):
        raise ValueError(f"'architectures' must be a list of names; got {shortened(names)}")
    if family not in FAMILIES:
        raise ValueError(
            f"the architecture {family!r} ({', '.join(map(str, names)) or 'unnamed'}) is not known; "
            f"there is {', '.join(FAMILIES)}"
        )
    if names and not any(str(name).endswith("ForCausalLM") for name in names):
        raise ValueError(
            f"{', '.join(map(str, names))} is no language model: its head does not predict the next token; "
            "give a checkpoint of a ...ForCausalLM"
        )
    return family


def _refuse(raw):
    """Refuse quantized weights and other activations."""
    if raw.get("quantization_config"):
        entry = raw["quantization_config"]
        method = entry.get("quant_method") if isinstance(entry, dict) else None
        method = "an unnamed method" if method is None else method
        raise ValueError(
            f"the checkpoint is quantized ({method}) and its weights are no plain numbers; give the original one "
            "in float32, float16 or bfloat16"
        )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"the activation must be 'silu'; got {raw['hidden_act']!r}")


def _integer(raw, name):
    value, maximum = raw.get(name), _MAX_VALUES.get(name, 2**31 - 1)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
        raise ValueError(
            f"config.json needs {name!r}, an integer from 1 to {maximum}; got {shortened(value)}"
        )
    return value


def _number(entries, name, default=None):
    """Return a finite number, or the default if the entry is missing."""
    value = entries.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise ValueError(f"{name!r} must be a number; got {shortened(value)}")
    return float(value)


def _windows(raw, layers):
    """Return the width of the window of each layer, 0 if it attends to all positions."""
    width = _number(raw, "sliding_window") if raw.get("use_sliding_window", False) else None
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers", 28)
        kinds = ["sliding_attention" if width and i >= first else "full_attention" for i in range(layers)]
    known = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise ValueError(
            f"layer_types must say 'full_attention' or 'sliding_attention' for each of {layers} layers; got "
            f"{shortened(kinds)}"
        )
    return tuple(int(width or 0) if kind == "sliding_attention" else 0 for kind in kinds)


def _rope(raw, context):
    """Return the rotation, and the maximum number of positions with it."""
    entries = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(entries, dict):
        raise ValueError(f"a rotation is described by an object; got {shortened(entries)}")
    kind = entries.get("rope_type", entries.get("type", "default"))
    partial = entries.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0
    if kind not in KINDS or partial != 1.0:
        detail = "" if partial == 1.0 else f" of {partial} of each head"
        raise ValueError(
            f"the rotation {shortened(kind)}{detail} is not known; there is {', '.join(KINDS)} of whole heads"
        )
    base = _number(entries, "rope_theta") or _number(raw, "rope_theta") or 10000.0
    name = "original_max_position_embeddings"
    original = int(_number(raw, name) or _number(entries, name) or context)
    if original < 1:
        raise ValueError(f"{name!r} must be positive; got {original}")
    if kind != "default" and kind != "yarn" and "factor" not in entries:
        raise ValueError(f"the rotation {kind!r} needs a factor; got {shortened(entries)}")
    factor = _number(entries, "factor") or context / original
    if kind == "llama3":
        rope = Rope(
            kind=kind,
            theta=base,
            factor=factor,
            original_context=original,
            low=_number(entries, "low_freq_factor", 1.0),
            high=_number(entries, "high_freq_factor", 4.0),
        )
        return rope, context
    if kind == "yarn":
        rope = Rope(
            kind=kind,
            theta=base,
            factor=factor,
            original_context=original,
            low=_number(entries, "beta_slow") or 1.0,
            high=_number(entries, "beta_fast") or 32.0,
            attention_factor=_number(entries, "attention_factor"),
            mscale=_number(entries, "mscale"),
            mscale_all=_number(entries, "mscale_all_dim"),
            truncate=bool(entries.get("truncate", True)),
        )
        return rope, max(context, int(original * factor))
    return Rope(kind=kind, theta=base, factor=factor if kind != "default" else 1.0), context
