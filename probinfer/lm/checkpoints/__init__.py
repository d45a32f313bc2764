"""Checkpoints of others, read from a local folder: ``config.json`` and ``*.safetensors``. Nothing is ever unpickled."""

from probinfer.lm.checkpoints.configs import read_config
from probinfer.lm.checkpoints.load import load

__all__ = ["load", "read_config"]
