"""A reward model with corrected logits: a score, followed by a map that was fitted on held-out steps."""

from __future__ import annotations

from typing import Any

from probinfer.core.errors import shortened
from probinfer.core.types import Array, ArrayTree, pytree
from probinfer.lm.models.base import Context
from probinfer.lm.rewards.base import View
from probinfer.lm.rewards.meanings import Score

__all__ = ["Calibrated", "calibrated"]


@pytree
class Calibrated(Score):
    """A score whose logits are mapped.

    Attributes:
        score: a score on the scale of logits.
        map: logit -> calibrated logit, a pytree (``rewards.calibrate``).
    """

    score: Any
    map: Any

    scale = "logit"

    @property
    def source(self) -> str:
        """Where the score comes from, in words."""
        return f"{self.score.source} (calibrated)"

    def init(self, context: Context, num: int) -> ArrayTree:
        """The state of the score."""
        return self.score.init(context, num)

    def step(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """Map the logits of the score; a failed one (minus infinity) stays failed."""
        state, value = self.score.step(state, view)
        return state, self.map(value)

    def gather(self, state: ArrayTree, ancestors: Array) -> ArrayTree:
        """Fork the state of the score."""
        return self.score.gather(state, ancestors)


def calibrated(score: Any, map: Any) -> Calibrated:
    """Map the logits of a score, so that its probabilities are right on steps like the held-out ones.

    Args:
        score: a score on the scale of logits, such as ``lm.reasoner().reward``.
        map: return value of ``rewards.calibrate(logits, labels)``.

    Raises:
        TypeError: ``score`` is not a score, or ``map`` is not callable.
        ValueError: the score is not on the scale of logits.
    """
    if not isinstance(score, Score) or not callable(map):
        raise TypeError(
            f"expected a score and a map of rewards.calibrate, got {shortened(score)}, {shortened(map)}"
        )
    if score.scale != "logit":
        raise ValueError("only scores that are probabilities (scale 'logit') can be calibrated")
    return Calibrated(score, map)
