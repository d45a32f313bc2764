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

_AGAIN = "copy it again, or train it by benchmarks/reasoner_train.py"

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
    """Write config.json and model.safetensors in the folder ``reward`` of the language model's folder."""
    folder = folder / "reward"
    folder.mkdir(parents=True, exist_ok=True)
    head = {"score.weight": np.asarray(reward.weight)[None], "score.bias": np.asarray(reward.bias)[None]}
    _write(folder / "model.safetensors", {**named(reward.trunk), **head})
    described = _describe(reward.trunk.config, "Qwen2ForTokenClassification")
    _write_json(folder / "config.json", {**described, "num_labels": 1})


def read_model(folder: Path) -> Transformer:
    """Read what ``write_model`` wrote, in float32."""
    return load(folder, dtype=jnp.float32)


def read_reward(folder: Path, max_tokens: int | None = None) -> RewardModel:
    """Read what ``write_reward`` wrote, in float32.

    Args:
        folder: the language model's folder, with the folder ``reward`` in it.
        max_tokens: see ``RewardModel``.
    """
    folder = Path(folder) / "reward"
    with reading(folder / "config.json", _AGAIN):
        config = parse_config(
            {**read_json(folder / "config.json"), "architectures": None}
        )  # a trunk without head
    with reading(folder / "model.safetensors", _AGAIN):
        tensors = import_extra("safetensors.numpy", "lm").load_file(str(folder / "model.safetensors"))
        shapes = {"score.weight": (1, config.hidden_size), "score.bias": (1,)}
        shapes |= {name: shape for name, shape in names.expected(config).items() if name != "lm_head.weight"}
        wrong = [name for name, shape in shapes.items() if getattr(tensors.get(name), "shape", None) != shape]
        if wrong:
            raise ValueError(
                f"the tensors {', '.join(wrong[:3])} are not those of a reward model of this size"
            )

    def arrays(group: dict[str, np.ndarray]) -> dict[str, Any]:
        return {name: jnp.asarray(tensor) for name, tensor in group.items()}

    blocks = tuple(arrays(names.block(config, tensors.__getitem__, i)) for i in range(config.num_layers))
    trunk = Transformer.from_blocks(arrays(names.ends(config, tensors.__getitem__)), blocks, config)
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


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    import_extra("safetensors.numpy", "lm").save_file(tensors, str(path), metadata={"format": "pt"})


def _write_json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
