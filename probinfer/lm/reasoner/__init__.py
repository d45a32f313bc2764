"""The bundled reasoner: a small transformer for chained arithmetic, with a trained process reward model.

``lm.reasoner()`` loads it: this package can be called, which calls its function ``model``. Start with ``task``.
"""

import sys
import types
from typing import Any

from probinfer.lm.reasoner.load import folder, model, parse, problems
from probinfer.lm.reasoner.task import Check, Problem, answer, check

__all__ = ["Check", "Problem", "answer", "check", "folder", "model", "parse", "problems"]


class _Reasoner(types.ModuleType):
    """A module that loads the model when it is called."""

    def __call__(self) -> Any:
        """See ``model``."""
        return model()


sys.modules[__name__].__class__ = _Reasoner
