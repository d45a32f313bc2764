"""What the ``config.json`` of a checkpoint says, in our words; what we do not compute is refused by its name."""

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
_AGAIN = "copy it again"
_LARGEST = 2**28  # bytes of a file of settings; the index of the largest checkpoints has some megabytes
_MOST = {"num_hidden_layers": 4096}  # of the largest models there are: 126


def as_folder(folder: Any) -> Path:
    """The path of a folder.

    Raises:
        TypeError: it is no path.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"expected the path of a checkpoint folder, got {shortened(folder)}")
    return Path(folder)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.

    Returns:
        The object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path.name} in {path.parent}; give the folder of a Hugging Face checkpoint"
        )
    with reading(path, _AGAIN):
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"a file of {path.stat().st_size} bytes is none of settings")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"it is not JSON ({error})") from error
        if not isinstance(found, dict):
            raise ValueError(f"it must hold a JSON object; got {shortened(found)}")
        return found


def read_config(folder: str | Path) -> Config:
    """The configuration in a folder.

    Args:
        folder: with a ``config.json``.

    Returns:
        The configuration.

    Raises:
        TypeError: ``folder`` is no path.
        FileNotFoundError: no folder, or no ``config.json`` in it.
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

    Returns:
        The configuration.

    Raises:
        ValueError: an architecture, rotation, activation or quantisation that is not computed here; a missing entry.
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
    if raw.get("quantization_config"):
        said = raw["quantization_config"]
        method = said.get("quant_method") if isinstance(said, dict) else None
        method = "an unnamed method" if method is None else method
        raise ValueError(
            f"the checkpoint is quantised ({method}) and its weights are no plain numbers; give the original one "
            "in float32, float16 or bfloat16"
        )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"the activation must be 'silu'; got {raw['hidden_act']!r}")


def _integer(raw, name):
    value, most = raw.get(name), _MOST.get(name, 2**31 - 1)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"config.json needs {name!r}, an integer from 1 to {most}; got {shortened(value)}")
    return value


def _number(said, name, default=None):
    """A finite number, or what stands for a missing one."""
    value = said.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise ValueError(f"{name!r} must be a number; got {shortened(value)}")
    return float(value)


def _windows(raw, layers):
    """For each layer the width of its window, 0 where it sees everything."""
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
    """The rotation, and the positions that it makes possible."""
    said = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(said, dict):
        raise ValueError(f"a rotation is described by an object; got {shortened(said)}")
    kind = said.get("rope_type", said.get("type", "default"))
    partial = said.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0
    if kind not in KINDS or partial != 1.0:
        detail = "" if partial == 1.0 else f" of {partial} of each head"
        raise ValueError(
            f"the rotation {shortened(kind)}{detail} is not known; there is {', '.join(KINDS)} of whole heads"
        )
    theta = _number(said, "rope_theta") or _number(raw, "rope_theta") or 10000.0
    name = "original_max_position_embeddings"
    original = int(_number(raw, name) or _number(said, name) or context)
    if original < 1:
        raise ValueError(f"{name!r} must be positive; got {original}")
    if kind != "default" and kind != "yarn" and "factor" not in said:
        raise ValueError(f"the rotation {kind!r} needs a factor; got {shortened(said)}")
    factor = _number(said, "factor") or context / original
    if kind == "llama3":
        low, high = _number(said, "low_freq_factor", 1.0), _number(said, "high_freq_factor", 4.0)
        return Rope(kind, theta, factor, original, low, high), context
    if kind == "yarn":
        rope = Rope(
            kind,
            theta,
            factor,
            original,
            _number(said, "beta_slow") or 1.0,
            _number(said, "beta_fast") or 32.0,
            _number(said, "attention_factor"),
            _number(said, "mscale"),
            _number(said, "mscale_all_dim"),
            bool(said.get("truncate", True)),
        )
        return rope, max(context, int(original * factor))
    return Rope(kind, theta, factor if kind != "default" else 1.0), context
