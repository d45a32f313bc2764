"""The reasoner's files: two checkpoint folders in the Hugging Face layout, the reward model's inside the other.

The language model is a Qwen2 causal language model; the reward model in ``reward/`` is a Qwen2 model for token
classification with one label, whose logit is the reward.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import import_extra, reading
from probinfer.lm.models.checkpoints import names
from probinfer.lm.models.checkpoints.configs import parse_config, read_json
from probinfer.lm.models.checkpoints.folder import load
from probinfer.lm.models.transformer import Config, Transformer
from probinfer.lm.reasoner import encoding
from probinfer.lm.rewards.model import RewardModel

_ADVICE = "copy it again, or train it by benchmarks/reasoner_train.py"

__all__ = ["named", "read_model", "read_reward", "write_model", "write_reward"]


def write_model(folder: Path, model: Transformer) -> None:
    """Write config.json, model.safetensors, generation_config.json and the files of the tokenizer.

    Args:
        folder: created if it does not exist.
        model: a model with unstacked layers, biases of queries, keys and values, and a tied head.
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
    """Write config.json and model.safetensors in the folder ``reward`` of the language model's folder."""
    folder = folder / "reward"
    folder.mkdir(parents=True, exist_ok=True)
    head = {"score.weight": np.asarray(reward.weight)[None], "score.bias": np.asarray(reward.bias)[None]}
    _write(folder / "model.safetensors", {**named(reward.trunk), **head})
    described = _describe(reward.trunk.config, "Qwen2ForTokenClassification")
    _write_json(folder / "config.json", {**described, "num_labels": 1})


def read_model(folder: Path) -> Transformer:
    """Read the model that ``write_model`` wrote, in float32."""
    return load(folder, dtype=jnp.float32)


def read_reward(folder: Path, max_tokens: int | None = None) -> RewardModel:
    """Read the reward model that ``write_reward`` wrote, in float32.

    Args:
        folder: the language model's folder, with the folder ``reward`` in it.
        max_tokens: see ``RewardModel``.
    """
    folder = Path(folder) / "reward"
    with reading(folder / "config.json", _ADVICE):
        # without an architecture, since the trunk has no head for tokens
        config = parse_config({**read_json(folder / "config.json"), "architectures": None})
    with reading(folder / "model.safetensors", _ADVICE):
        tensors = import_extra("safetensors.numpy", "lm").load_file(str(folder / "model.safetensors"))
        shapes = {"score.weight": (1, config.hidden_size), "score.bias": (1,)}
        trunk_shapes = names.expected_shapes(config)
        shapes |= {name: shape for name, shape in trunk_shapes.items() if name != "lm_head.weight"}
        wrong = [name for name, shape in shapes.items() if getattr(tensors.get(name), "shape", None) != shape]
        if wrong:
            raise ValueError(
                f"the tensors {', '.join(wrong[:3])} are not those of a reward model of this size"
            )

    def arrays(group: dict[str, np.ndarray]) -> dict[str, Any]:
        return {name: jnp.asarray(tensor) for name, tensor in group.items()}

    read = tensors.__getitem__
    blocks = tuple(arrays(names.block_weights(config, read, i)) for i in range(config.num_layers))
    trunk = Transformer.from_blocks(arrays(names.end_weights(config, read)), blocks, config)
    weight, bias = jnp.asarray(tensors["score.weight"][0]), jnp.asarray(tensors["score.bias"][0])
    return RewardModel(trunk, weight, bias, max_tokens)


def named(model: Transformer) -> dict[str, np.ndarray]:
    """Return the weights by their published names; linear maps are (out, in), and concatenated ones are split."""
    config, ends = model.config, model.weights["ends"]
    tensors = {"model.embed_tokens.weight": ends["embedding"], "model.norm.weight": ends["norm"]}
    cuts = np.cumsum([config.num_heads, config.kv_heads]) * config.width
    for i, block in enumerate(model.weights["blocks"]):
        prefix = f"model.layers.{i}."
        tensors[prefix + "input_layernorm.weight"] = block["attention_norm"]
        tensors[prefix + "post_attention_layernorm.weight"] = block["mlp_norm"]
        matrices = np.split(np.asarray(block["qkv"]), cuts, axis=1)
        biases = np.split(np.asarray(block["qkv_bias"]), cuts)
        for letter, matrix, bias in zip("qkv", matrices, biases, strict=True):
            tensors[prefix + f"self_attn.{letter}_proj.weight"] = matrix.T
            tensors[prefix + f"self_attn.{letter}_proj.bias"] = bias
        tensors[prefix + "self_attn.o_proj.weight"] = block["out"].T
        gate, up = np.split(np.asarray(block["gate_up"]), 2, axis=1)
        tensors[prefix + "mlp.gate_proj.weight"] = gate.T
        tensors[prefix + "mlp.up_proj.weight"] = up.T
        tensors[prefix + "mlp.down_proj.weight"] = block["down"].T
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _describe(config: Config, architecture: str) -> dict[str, Any]:
    """Return the configuration by its published names."""
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


def _write(file: Path, tensors: dict[str, np.ndarray]) -> None:
    import_extra("safetensors.numpy", "lm").save_file(tensors, str(file), metadata={"format": "pt"})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
