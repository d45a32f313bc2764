"""Transformers of the Llama, Qwen2 and Qwen3 families.

Start with ``network`` (``Transformer``), then ``block``, one layer, and ``attention``, over a shared prompt.
"""

from probinfer.lm.models.transformer.config import Config
from probinfer.lm.models.transformer.network import Prompt, Transformer
from probinfer.lm.models.transformer.rope import Rope

__all__ = ["Config", "Prompt", "Rope", "Transformer"]
