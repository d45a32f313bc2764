"""Rewards: scores of steps, and what they mean as factors of the distribution that is sampled.

``from_python`` makes a reward of a Python function, ``from_model`` of a reward model, ``from_score`` of any score;
``meaning`` says how its numbers weigh. ``regex``, ``json_schema`` and ``grammar`` allow only some texts. Rewards are
added (the product of the factors) and multiplied by numbers (a factor to a power). ``calibrate`` learns on held-out
steps how far a reward model is to be trusted, ``reliability`` shows it, ``calibrated`` puts it right.
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
