"""The reasoner's files: a checkpoint folder in the Hugging Face layout, and the reward model beside it.

``model.safetensors`` has the names of a Qwen2 causal language model, ``reward.safetensors`` those of a Qwen2 model for
token classification with one label; ``reward.json`` is the configuration of the latter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from probinfer.errors import import_extra
from probinfer.lm.reasoner import encoding
from probinfer.lm.rewards.model import RewardModel
from probinfer.lm.transformer import Config, Rope, Transformer

__all__ = ["named", "read_model", "read_reward", "write_model", "write_reward"]


def write_model(folder: Path, model: Transformer) -> None:
    """Write config.json, model.safetensors, generation_config.json and the files of the tokenizer.

    Args:
        folder: made if it does not exist.
        model: of one entry a layer, with bias of queries, keys and values and a tied head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "model.safetensors", named(model))
    _write_json(folder / "config.json", _describe(model.config, "Qwen2ForCausalLM"))
    generation = {
        "eos_token_id": encoding.END,
        "pad_token_id": encoding.PAD,
        "do_sample": True,
        "temperature": 1.0,
    }
    _write_json(folder / "generation_config.json", generation)
    encoding.write_tokenizer(folder)


def write_reward(folder: Path, reward: RewardModel) -> None:
    """Write reward.safetensors and reward.json."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {"score.weight": np.asarray(reward.weight)[None], "score.bias": np.asarray(reward.bias)[None]}
    _write(folder / "reward.safetensors", {**named(reward.trunk), **head})
    described = _describe(reward.trunk.config, "Qwen2ForTokenClassification")
    _write_json(folder / "reward.json", {**described, "num_labels": 1})


def read_model(folder: Path) -> Transformer:
    """Read what ``write_model`` wrote, in float32."""
    return _assemble(_read(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()))


def read_reward(folder: Path, max_tokens: int | None = None) -> RewardModel:
    """Read what ``write_reward`` wrote, in float32.

    Args:
        folder: with reward.safetensors and reward.json.
        max_tokens: see ``RewardModel``.
    """
    tensors = _read(folder / "reward.safetensors")
    trunk = _assemble(tensors, json.loads((folder / "reward.json").read_text()))
    weight, bias = jnp.asarray(tensors["score.weight"][0]), jnp.asarray(tensors["score.bias"][0])
    return RewardModel(trunk, weight, bias, max_tokens)


def named(model: Transformer) -> dict[str, np.ndarray]:
    """Weights by their published names; linear maps as (out, in), the fused ones taken apart."""
    config, ends = model.config, model.weights["ends"]
    tensors = {"model.embed_tokens.weight": ends["embedding"], "model.norm.weight": ends["norm"]}
    cuts = np.cumsum([config.num_heads, config.kv_heads]) * config.width
    for i, block in enumerate(model.weights["blocks"]):
        at = f"model.layers.{i}."
        tensors[at + "input_layernorm.weight"] = block["attention_norm"]
        tensors[at + "post_attention_layernorm.weight"] = block["mlp_norm"]
        maps = np.split(np.asarray(block["qkv"]), cuts, axis=1)
        biases = np.split(np.asarray(block["qkv_bias"]), cuts)
        for letter, matrix, bias in zip("qkv", maps, biases, strict=True):
            tensors[at + f"self_attn.{letter}_proj.weight"] = matrix.T
            tensors[at + f"self_attn.{letter}_proj.bias"] = bias
        tensors[at + "self_attn.o_proj.weight"] = block["out"].T
        for name, matrix in zip(
            ("gate", "up"), np.split(np.asarray(block["gate_up"]), 2, axis=1), strict=True
        ):
            tensors[at + f"mlp.{name}_proj.weight"] = matrix.T
        tensors[at + "mlp.down_proj.weight"] = block["down"].T
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _assemble(tensors: dict[str, np.ndarray], described: dict[str, Any]) -> Transformer:
    """The inverse of ``named``."""
    config = _config(described)

    def block(i: int) -> dict[str, Any]:
        at = f"model.layers.{i}."
        maps = {letter: tensors[at + f"self_attn.{letter}_proj.weight"].T for letter in "qkvo"}
        gate, up, down = (tensors[at + f"mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        bias = np.concatenate([tensors[at + f"self_attn.{letter}_proj.bias"] for letter in "qkv"])
        return {
            "attention_norm": tensors[at + "input_layernorm.weight"],
            "mlp_norm": tensors[at + "post_attention_layernorm.weight"],
            "qkv": np.concatenate([maps["q"], maps["k"], maps["v"]], axis=1),
            "qkv_bias": bias,
            "out": maps["o"],
            "gate_up": np.concatenate([gate, up], axis=1),
            "down": down,
        }

    def arrays(group: dict[str, Any]) -> dict[str, Any]:
        return {name: jnp.asarray(tensor) for name, tensor in group.items()}

    ends = {"embedding": tensors["model.embed_tokens.weight"], "norm": tensors["model.norm.weight"]}
    blocks = tuple(arrays(block(i)) for i in range(config.num_layers))
    return Transformer({"ends": arrays(ends), "blocks": blocks}, config)


def _describe(config: Config, architecture: str) -> dict[str, Any]:
    """The configuration by its published names."""
    return {
        "architectures": [architecture],
        "model_type": "qwen2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "eos_token_id": encoding.END,
        "pad_token_id": encoding.PAD,
        "torch_dtype": "float32",
    }


def _config(described: dict[str, Any]) -> Config:
    return Config(
        vocab_size=described["vocab_size"],
        hidden_size=described["hidden_size"],
        intermediate_size=described["intermediate_size"],
        num_layers=described["num_hidden_layers"],
        num_heads=described["num_attention_heads"],
        num_kv_heads=described["num_key_value_heads"],
        max_context=described["max_position_embeddings"],
        norm_eps=described["rms_norm_eps"],
        rope=Rope(theta=described["rope_theta"]),
        qkv_bias=True,
        tied=True,
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    return import_extra("safetensors.numpy", "lm").load_file(str(path))


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    import_extra("safetensors.numpy", "lm").save_file(tensors, str(path), metadata={"format": "pt"})


def _write_json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
