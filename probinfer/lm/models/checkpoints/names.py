"""Names and shapes of the tensors of a checkpoint, and how they become the weights of ``Transformer``.

Those of a checkpoint are (out, in), one for each matrix product; ours are (in, out), and those with the same input are
concatenated.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from probinfer.lm.models.transformer.config import Config

__all__ = ["IGNORED", "block_weights", "end_weights", "expected_shapes"]

IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$")  # recomputed from the configuration

Read = Callable[[str], np.ndarray]


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors by their names."""
    h, v = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    if not config.tied:
        shapes["lm_head.weight"] = (v, h)
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _block_shapes(config).items()}
    return shapes


def _block_shapes(config):
    h, f, d = config.hidden_size, config.intermediate_size, config.width
    q, k = config.num_heads * d, config.kv_heads * d
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (h,),
        "post_attention_layernorm.weight": (h,),
    }
    if config.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
    for name, out, width, bias in (
        ("self_attn.q_proj", q, h, config.qkv_bias),
        ("self_attn.k_proj", k, h, config.qkv_bias),
        ("self_attn.v_proj", k, h, config.qkv_bias),
        ("self_attn.o_proj", h, q, config.out_bias),
        ("mlp.gate_proj", f, h, config.mlp_bias),
        ("mlp.up_proj", f, h, config.mlp_bias),
        ("mlp.down_proj", h, f, config.mlp_bias),
    ):
        shapes[f"{name}.weight"] = (out, width)
        shapes |= {f"{name}.bias": (out,)} if bias else {}
    return shapes


def end_weights(config: Config, read: Read) -> dict[str, Any]:
    """Return the weights of ``Ends``.

    Args:
        config: sizes and switches.
        read: name -> tensor.

    Returns:
        Arrays by our names.
    """
    weights = {"embedding": read("model.embed_tokens.weight"), "norm": read("model.norm.weight")}
    return weights if config.tied else weights | {"head": read("lm_head.weight")}


def block_weights(config: Config, read: Read, layer: int) -> dict[str, Any]:
    """Return the weights of the ``Block`` of one layer.

    Args:
        config: sizes and switches.
        read: name -> tensor.
        layer: number of the layer, from 0.

    Returns:
        Arrays by our names.
    """

    def get(name):
        return read(f"model.layers.{layer}.{name}")

    def product(*names):
        return np.concatenate([get(f"{name}.weight").T for name in names], axis=1)

    def bias(*names):
        return np.concatenate([get(f"{name}.bias") for name in names])

    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up, out, down = ("mlp.gate_proj", "mlp.up_proj"), "self_attn.o_proj", "mlp.down_proj"
    weights = {
        "attention_norm": get("input_layernorm.weight"),
        "mlp_norm": get("post_attention_layernorm.weight"),
        "qkv": product(*qkv),
        "out": product(out),
        "gate_up": product(*gate_up),
        "down": product(down),
    }
    if config.qk_norm:
        weights |= {"q_norm": get("self_attn.q_norm.weight"), "k_norm": get("self_attn.k_norm.weight")}
    if config.qkv_bias:
        weights["qkv_bias"] = bias(*qkv)
    if config.out_bias:
        weights["out_bias"] = bias(out)
    if config.mlp_bias:
        weights |= {"gate_up_bias": bias(*gate_up), "down_bias": bias(down)}
    return weights
