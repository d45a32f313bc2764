"""Read checkpoints of other libraries from a local folder: ``config.json`` and ``*.safetensors``, never a pickle.

Start with ``folder`` (``load``). ``configs`` translates the configuration, ``names`` the names and shapes of the
weights.
"""

from probinfer.lm.models.checkpoints.configs import read_config
from probinfer.lm.models.checkpoints.folder import load

__all__ = ["load", "read_config"]
