r"""Scores, numbers for every prefix that ends with a step, and the potentials that they become by their meaning.

The same scores r_t define different targets.

============== ===================================== ==========================
meaning        log potential of step t               texts x in proportion to
============== ===================================== ==========================
likelihood     log r_t                               prior(x) Π_t r_t
twist          log ψ_t - log ψ_{t-1}                 prior(x) ψ_T
odds           logit(r_t) / τ                        prior(x) Π_t (r_t/(1-r_t))^{1/τ}
terminal       log r_T, where the text ends          prior(x) r_T
============== ===================================== ==========================

Here ψ_t is the score r_t of the prefix after step t: only the last one remains in the product. Each step is weighed
once: a text that has ended keeps its weight.

References:
    Puri et al. (2025), odds of process rewards; Zhao et al. (2024), twists; Lew et al. (2023), likelihoods of steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, ArrayTree, Float, pytree, strong_array
from probinfer.lm.arguments import concrete_number
from probinfer.lm.models.base import Context
from probinfer.lm.rewards.algebra import Potential
from probinfer.lm.rewards.base import CacheOwner, Summand, View, log_value

__all__ = [
    "MEANINGS",
    "LogOdds",
    "PrefixTwist",
    "Score",
    "SelfCertainty",
    "Sharpened",
    "StepLikelihood",
    "Terminal",
    "default_potential",
    "potential_from_score",
]

_CLIP = 16.0  # odds of a score of one are finite: 1e-7 and 1 - 1e-7 are the extremes


class Score(CacheOwner, Summand):
    """A number for every prefix that ends with a step; base class of pytrees.

    ``scale`` says what ``step`` returns: "logit" of a probability, or "log" of a number that is not negative. In sums
    and powers of rewards a score stands for its odds, and a score on the scale "log" for its twist.
    """

    scale: str = "logit"

    @property
    def source(self) -> str:
        """Where the score comes from, in words."""
        return type(self).__name__

    def init(self, context: Context, num: int) -> ArrayTree:
        """Return the state of ``num`` particles before the first step.

        Leaves are (num, ...), unless ``gather`` is overridden.
        """
        return ()

    def step(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """Score a step: return the new state and scores (N,), which are not read for inactive particles."""
        raise TypeError(f"{type(self).__name__} does not define step(state, view)")

    def gather(self, state: ArrayTree, ancestors: Array) -> ArrayTree:
        """Fork the state: row j of the result is row ``ancestors[j]``."""
        return jax.tree.map(lambda leaf: leaf[ancestors], state)

    def __add__(self, other: Any) -> Any:
        """The product of two potentials, the sum of their logs."""
        return default_potential(self) + other

    def __radd__(self, other: Any) -> Any:
        """The product of two potentials, the sum of their logs."""
        return other + default_potential(self)

    def __mul__(self, power: Any) -> Potential:
        """The potential to a power."""
        return default_potential(self) * power

    __rmul__ = __mul__


class _ScorePotential(Potential):
    """A potential of one score, whose state is its own."""

    num_scores = 1
    score: Any

    def init(self, context: Context, num: int) -> ArrayTree:
        return self.score.init(context, num)

    def gather(self, state: ArrayTree, ancestors: Array) -> ArrayTree:
        return self.score.gather(state, ancestors)

    def log_score(self, last: Array, total: Array) -> Array:
        return last


@pytree
class StepLikelihood(_ScorePotential):
    """The score of each step is the likelihood that the step is right: log potential log r_t.

    Attributes:
        score: score of a step.
    """

    score: Any

    def advance(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """Weigh by log r_t."""
        state, value = self.score.step(state, view)
        return state, log_value(self.score.scale, value)

    @property
    def description(self) -> str:
        """The potential in words."""
        return f"the product of the scores of its steps by {self.score.source}"


class TwistState(NamedTuple):
    """What ``PrefixTwist`` remembers.

    Attributes:
        score_state: state of the score.
        last_log_score: (N,) log psi_{t-1}, the log score of the last prefix.
    """

    score_state: ArrayTree
    last_log_score: Float[Array, " N"]


@pytree
class PrefixTwist(Potential):
    """The score of a prefix is a twist: it is divided out when the next score comes, so only the last score remains.

    A prefix of score zero has weight zero from then on, so a score that is zero must stay zero.

    Attributes:
        score: score of a prefix; that of the whole text is the reward.
    """

    score: Any
    num_scores = 1

    def init(self, context: Context, num: int) -> TwistState:
        """Return the state with log psi_0 = 0."""
        return TwistState(self.score.init(context, num), jnp.zeros(num, jnp.result_type(float)))

    def gather(self, state: TwistState, ancestors: Array) -> TwistState:
        """Fork the state."""
        return TwistState(self.score.gather(state.score_state, ancestors), state.last_log_score[ancestors])

    def advance(self, state: TwistState, view: View) -> tuple[TwistState, Array]:
        """Weigh by log psi_t - log psi_{t-1}."""
        last = state.last_log_score
        score_state, value = self.score.step(state.score_state, view)
        value = log_value(self.score.scale, value).astype(last.dtype)
        # after a score of zero the difference could be NaN or plus infinity: the weight stays zero
        dead = last == -jnp.inf
        change = jnp.where(dead, -jnp.inf, value - jnp.where(dead, 0, last))
        return TwistState(score_state, jnp.where(view.active, value, last)), change

    @property
    def description(self) -> str:
        """The potential in words."""
        return f"the score of the whole text by {self.score.source}"


@pytree
class LogOdds(_ScorePotential):
    r"""Every step multiplies the odds of its score: log potential logit(r_t) / tau, clipped at \|logit\| = 16.

    Attributes:
        score: score of a prefix, on the scale of logits.
        temperature: tau; above 1 trusts the score less.
    """

    score: Any
    temperature: Any = 1.0

    def __post_init__(self):
        if self.score.scale != "logit":
            raise ValueError(
                "odds need a score that is a probability (scale 'logit'), and this score is any positive number: use "
                "StepLikelihood, PrefixTwist or Terminal"
            )
        tau = concrete_number("temperature", self.temperature)
        if tau is not None and not 0 < tau < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {tau:g}")
        object.__setattr__(self, "temperature", strong_array(self.temperature))

    def advance(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """Weigh by logit(r_t) / tau; a score that failed (minus infinity) has weight zero."""
        state, value = self.score.step(state, view)
        log_odds = jnp.where(value == -jnp.inf, value, jnp.clip(value, -_CLIP, _CLIP))
        return state, log_odds / self.temperature.astype(log_odds.dtype)

    def log_score(self, last: Array, total: Array) -> Array:
        """The log probability whose odds are the potential of the last step."""
        return log_value("logit", last * self.temperature.astype(last.dtype))

    @property
    def description(self) -> str:
        """The potential in words."""
        tau = float(self.temperature)
        power = f", to the power {1 / tau:g}" if tau != 1 else ""
        return f"the product of the odds of the scores of its steps by {self.score.source}{power}"


@pytree
class Terminal(_ScorePotential):
    """Only the whole text is weighed: log potential log r_T in the step in which it ends or is cut.

    Attributes:
        score: score of a whole text.
    """

    score: Any

    def advance(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """Weigh by log r_T at the end, by zero before."""
        state, value = self.score.step(state, view)
        ends = view.finished | view.truncated
        return state, jnp.where(ends, log_value(self.score.scale, value), jnp.zeros_like(value))

    @property
    def description(self) -> str:
        """The potential in words."""
        return f"the score of the whole text by {self.score.source}"


@pytree
class Sharpened(Potential):
    r"""The prior to a power: log potential :math:`(\alpha - 1) \log p(x_t)` of each step; no reward is needed.

    Attributes:
        power: alpha; above 1 prefers texts that the model thinks likely.

    References:
        Karan and Du (2025), power sampling; Zhao et al. (2026), power SMC.
    """

    power: Any

    def __post_init__(self):
        power = concrete_number("power", self.power)
        if power is not None and not 0 <= power < float("inf"):
            raise ValueError(
                f"the power of the prior must be finite and not negative, got {power:g}; 1 is the prior itself"
            )
        object.__setattr__(self, "power", strong_array(self.power))

    def advance(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """Weigh by (alpha - 1) log p."""
        return state, (self.power.astype(view.step_log_prob.dtype) - 1) * view.step_log_prob

    @property
    def description(self) -> str:
        """The potential in words."""
        return f"the prior to the power {float(self.power) - 1:g}"


@pytree
class SelfCertainty(Score):
    """The model's own confidence: r is the geometric mean of the probabilities of the tokens of the step.

    References:
        Kang, Zhao and Song (2025), self-certainty.
    """

    scale = "logit"
    source = "the self-certainty"

    def step(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """Return the logit of exp(mean log probability of the tokens)."""
        log_r = view.step_log_prob / jnp.maximum(view.step_length, 1)
        log_r = jnp.minimum(log_r, -1e-7)  # keeps the logit finite where r rounds to one
        return state, log_r - jnp.log(-jnp.expm1(log_r))


MEANINGS = {"likelihood": StepLikelihood, "twist": PrefixTwist, "odds": LogOdds, "terminal": Terminal}


def potential_from_score(score: Score, meaning: str) -> Potential:
    """Return the potential of a score by its meaning: "likelihood", "twist", "odds" or "terminal".

    Raises:
        ValueError: the meaning is unknown.
    """
    if meaning not in MEANINGS:
        raise ValueError(f"meaning must be one of {', '.join(map(repr, MEANINGS))}, got {meaning!r}")
    return MEANINGS[meaning](score)


def default_potential(score: Score) -> Potential:
    """Return the potential of a score without a meaning: its odds, or its twist if it is not a probability."""
    return potential_from_score(score, "odds" if score.scale == "logit" else "twist")
