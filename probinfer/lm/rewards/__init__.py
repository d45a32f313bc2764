"""Rewards: scores of steps, and the potentials by which they weigh the texts that are sampled.

``from_python`` makes a reward of a Python function, ``from_model`` of a reward model, ``from_score`` of any score;
``meaning`` defines how its scores become log potentials. ``regex``, ``json_schema`` and ``grammar`` allow only some
texts. Rewards are added (the sum of the log potentials) and multiplied by numbers (a potential to a power).
``calibrate`` learns on held-out steps how far a reward model can be trusted, ``reliability`` measures it, and
``calibrated`` corrects it. Open ``meanings`` first.
"""

from probinfer.lm.rewards.algebra import Potential
from probinfer.lm.rewards.base import View
from probinfer.lm.rewards.calibrated_scores import calibrated
from probinfer.lm.rewards.calibration import calibrate, reliability
from probinfer.lm.rewards.deferred import (
    from_model,
    from_python,
    from_score,
    grammar,
    json_schema,
    regex,
    self_certainty,
    sharpened,
)
from probinfer.lm.rewards.meanings import (
    LogOdds,
    PrefixTwist,
    Score,
    SelfCertainty,
    Sharpened,
    StepLikelihood,
    Terminal,
)

__all__ = [
    "LogOdds",
    "Potential",
    "PrefixTwist",
    "Score",
    "SelfCertainty",
    "Sharpened",
    "StepLikelihood",
    "Terminal",
    "View",
    "calibrate",
    "calibrated",
    "from_model",
    "from_python",
    "from_score",
    "grammar",
    "json_schema",
    "regex",
    "reliability",
    "self_certainty",
    "sharpened",
]
