"""The bundled reasoner: a small transformer for chained arithmetic, with a trained process reward model."""

from probinfer.lm.reasoner.load import folder, problems
from probinfer.lm.reasoner.task import Check, Problem, answer, check

__all__ = ["Check", "Problem", "answer", "check", "folder", "problems"]
