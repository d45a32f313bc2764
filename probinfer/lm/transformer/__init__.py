"""Transformers of the Llama, Qwen2 and Qwen3 families."""

from probinfer.lm.transformer.config import Config
from probinfer.lm.transformer.network import Prompt, Transformer
from probinfer.lm.transformer.rope import Rope

__all__ = ["Config", "Prompt", "Rope", "Transformer"]
