"""Checkpoints of others, read from a local folder: ``config.json`` and ``*.safetensors``. Nothing is ever unpickled."""

from probinfer.lm.models.checkpoints.configs import read_config
from probinfer.lm.models.checkpoints.folder import load

__all__ = ["load", "read_config"]
