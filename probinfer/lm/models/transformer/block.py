"""The flax modules of a transformer: one block, and the embedding and head before and after the blocks.

Weights are stored (in, out), queries, keys and values in one matrix, the gate and the feed-forward input in another:
fewer and larger products. The modules hold weights only; keys and values of past tokens are arguments and results.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.lm.models.transformer.config import Config
from probinfer.lm.models.transformer.rope import rotate

__all__ = ["Block", "Ends", "rms_norm"]


def rms_norm(x: Float[Array, "*b h"], weight: Float[Array, "h"], eps: float) -> Float[Array, "*b h"]:
    """Divide by sqrt(mean(x^2) + eps) and multiply by the weight, computed in float32 or wider.

    Args:
        x: rows.
        weight: weight of each coordinate.
        eps: added to the mean square.

    Returns:
        Normalized rows, in the dtype of x.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.asarray(eps, wide.dtype))
    return (wide * scale).astype(x.dtype) * weight


def _normal(key, shape, scale, dtype):
    return nnx.Param(scale * jax.random.normal(key, shape, dtype))


def _zeros(shape, dtype, enabled):
    return nnx.Param(jnp.zeros(shape, dtype)) if enabled else None


def _ones(shape, dtype, enabled=True):
    return nnx.Param(jnp.ones(shape, dtype)) if enabled else None


def _add_bias(x, bias):
    return x if bias is None else x + bias[...]


class Block(nnx.Module):
    """One layer: attention and a gated feed-forward network, each after a norm and added to its input."""

    def __init__(self, key: PRNGKey, config: Config, dtype: Any):
        h, f, d = config.hidden_size, config.intermediate_size, config.width
        wide = (config.num_heads + 2 * config.kv_heads) * d
        keys = jax.random.split(key, 4)
        # variance 1 / fan-in; outputs that are added to the stream shrink with depth, so that the stream stays O(1)
        depth = (2 * config.num_layers) ** -0.5
        self.config = nnx.static(config)
        self.attention_norm = _ones((h,), dtype)
        self.qkv = _normal(keys[0], (h, wide), h**-0.5, dtype)
        self.qkv_bias = _zeros((wide,), dtype, config.qkv_bias)
        self.q_norm = _ones((d,), dtype, config.qk_norm)
        self.k_norm = _ones((d,), dtype, config.qk_norm)
        self.out = _normal(keys[1], (config.num_heads * d, h), depth * (config.num_heads * d) ** -0.5, dtype)
        self.out_bias = _zeros((h,), dtype, config.out_bias)
        self.mlp_norm = _ones((h,), dtype)
        self.gate_up = _normal(keys[2], (h, 2 * f), h**-0.5, dtype)
        self.gate_up_bias = _zeros((2 * f,), dtype, config.mlp_bias)
        self.down = _normal(keys[3], (f, h), depth * f**-0.5, dtype)
        self.down_bias = _zeros((h,), dtype, config.mlp_bias)

    def project(
        self, x: Float[Array, "n s h"], cos: Float[Array, "*c e"], sin: Float[Array, "*c e"]
    ) -> tuple[Float[Array, "n s k g d"], Float[Array, "n s k d"], Float[Array, "n s k d"]]:
        """Return queries, keys and values of the normalized stream, rotated to their positions.

        Args:
            x: the stream.
            cos: (N or 1, S, D/2).
            sin: (N or 1, S, D/2).

        Returns:
            Queries, grouped by the head of keys that they share; keys; values.
        """
        config = self.config
        y = rms_norm(x, self.attention_norm[...], config.norm_eps)
        y = _add_bias(y @ self.qkv[...], self.qkv_bias)
        y = y.reshape(*y.shape[:-1], -1, config.width)
        q, k, v = jnp.split(y, [config.num_heads, config.num_heads + config.kv_heads], axis=-2)
        if self.q_norm is not None:
            q = rms_norm(q, self.q_norm[...], config.norm_eps)
            k = rms_norm(k, self.k_norm[...], config.norm_eps)
        cos, sin = cos[..., None, :], sin[..., None, :]
        q, k = rotate(q, cos, sin).astype(y.dtype), rotate(k, cos, sin).astype(y.dtype)
        return q.reshape(*q.shape[:2], config.kv_heads, config.group, config.width), k, v

    def finish(self, x: Float[Array, "n s h"], attended: Float[Array, "n s k g d"]) -> Float[Array, "n s h"]:
        """Return the stream after the block.

        Args:
            x: the stream before the block.
            attended: output of attention.
        """
        attended = attended.reshape(*x.shape[:-1], -1)
        x = x + _add_bias(attended @ self.out[...], self.out_bias)
        y = rms_norm(x, self.mlp_norm[...], self.config.norm_eps)
        gate, up = jnp.split(_add_bias(y @ self.gate_up[...], self.gate_up_bias), 2, axis=-1)
        return x + _add_bias((jax.nn.silu(gate) * up) @ self.down[...], self.down_bias)


class Ends(nnx.Module):
    """The embedding, the last norm and the head."""

    def __init__(self, key: PRNGKey, config: Config, dtype: Any):
        embedding_key, head_key = jax.random.split(key)
        shape, scale = (config.vocab_size, config.hidden_size), config.hidden_size**-0.5
        self.config = nnx.static(config)
        self.embedding = _normal(embedding_key, shape, scale, dtype)
        self.norm = _ones((config.hidden_size,), dtype)
        self.head = None if config.tied else _normal(head_key, shape, scale, dtype)

    def embed(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b h"]:
        """Return the stream before the first block: rows of the embedding."""
        return self.embedding[...].at[tokens].get(mode="clip")

    def normalize(self, x: Float[Array, "*b h"]) -> Float[Array, "*b h"]:
        """Apply the last norm to the stream after the last block."""
        return rms_norm(x, self.norm[...], self.config.norm_eps)

    def logits(self, hidden: Float[Array, "*b h"]) -> Float[Array, "*b v"]:
        """Return the logits of the next token, float32 or wider.

        Args:
            hidden: the stream after the last norm.
        """
        weight = (self.embedding if self.head is None else self.head)[...]
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.einsum("...h,vh->...v", hidden, weight, preferred_element_type=wide)
