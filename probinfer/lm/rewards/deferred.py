"""Rewards before a model is known: those that need a tokenizer wait for it, and can be added and tempered before."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from probinfer.core.errors import shortened
from probinfer.lm.rewards.algebra import Potential, UnitPotential, add, check_power, temper
from probinfer.lm.rewards.base import Summand
from probinfer.lm.rewards.host.function_score import HostScore, check_settings
from probinfer.lm.rewards.masks import TokenMask
from probinfer.lm.rewards.meanings import (
    LogOdds,
    Score,
    SelfCertainty,
    Sharpened,
    default_potential,
    potential_from_score,
)

__all__ = [
    "Deferred",
    "bind",
    "from_model",
    "from_python",
    "from_score",
    "grammar",
    "json_schema",
    "regex",
    "self_certainty",
    "sharpened",
]


class Deferred(Summand):
    """A reward that is built when its tokenizer is known, once for each tokenizer."""

    def __init__(self, build: Callable[[Any], Potential], description: str):
        self._build, self._description = build, description
        # the tokenizer is stored too, so that no other object gets its id
        self._potentials: dict[int, tuple[Any, Potential]] = {}

    def bind(self, tokenizer: Any) -> Potential:
        """Return the potential for a tokenizer, always the same object."""
        if id(tokenizer) not in self._potentials:
            self._potentials[id(tokenizer)] = (tokenizer, self._build(tokenizer))
        return self._potentials[id(tokenizer)][1]

    def __add__(self, other: Any) -> Deferred:
        """The product of two potentials, the sum of their logs."""
        return _sum(self, other, other)

    def __radd__(self, other: Any) -> Deferred:
        """The product of two potentials, in the other order."""
        return _sum(other, self, other)

    def __mul__(self, power: Any) -> Deferred:
        """The potential to a power."""
        check_power(power)
        return Deferred(lambda tokenizer: temper(self.bind(tokenizer), power), f"{power} * ({self})")

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return self._description


def _sum(first: Any, second: Any, other: Any) -> Deferred:
    """Return the sum of two rewards; ``other`` is the one of them that may be anything a user has written."""
    if not isinstance(other, Summand):
        raise TypeError(
            f"rewards are added to rewards, got {shortened(other)}; wrap a function by lm.rewards.from_python"
        )
    return Deferred(lambda tok: add(bind(first, tok), bind(second, tok)), f"{first} + {second}")


def bind(reward: Any, tokenizer: Any) -> Potential:
    """Return the potential of a reward: None, a score, a reward model, a deferred reward or a potential.

    Raises:
        TypeError: it is something else.
    """
    if reward is None:
        return UnitPotential()
    if isinstance(reward, Potential):
        return reward
    if isinstance(reward, Deferred):
        return reward.bind(tokenizer)
    if isinstance(reward, Score):
        return default_potential(reward)
    if callable(reward):
        raise TypeError(
            f"a Python function becomes a reward by lm.rewards.from_python(fn), which says what its numbers mean; got "
            f"{shortened(reward)}"
        )
    raise TypeError(
        f"a reward is made by lm.rewards.from_python, from_model, regex, ...; got {shortened(reward)}"
    )


def from_python(fn: Callable[..., Any], *, meaning: str = "twist", **settings: Any) -> Deferred:
    """Make a reward of a Python function ``fn(prompt, text) -> number``, which is called in worker processes.

    Args:
        fn: gets strings and returns a probability, a number from 0 to 1; with ``scale="logit"`` its log odds, any
            number; with ``scale="log"`` a log potential, any number below infinity. A text for which it raises, hangs
            or returns something else gets weight zero and is counted.
        meaning: "twist" (the target is prior times the last score), "likelihood" (prior times the product of the scores
            of all steps), "odds" (the product of their odds) or "terminal" (the score of whole texts only).
        **settings: settings of ``rewards.host.HostScore``: ``takes``, ``scale``, ``timeout``, ``workers``, ``memory``,
            ``max_steps``.

    Raises:
        TypeError: ``fn`` is not a function, or a setting is unknown.
        ValueError: the meaning is unknown, or a setting is out of range.
    """
    if not callable(fn):
        raise TypeError(f"a reward function is called with (prompt, text), got {shortened(fn)}")
    _check_meaning(meaning)
    check_settings(**settings)
    scores: list[HostScore] = []

    def build(tokenizer: Any) -> Potential:
        scores.append(HostScore(fn, tokenizer, **settings))
        return potential_from_score(scores[-1], meaning)

    reward = Deferred(build, f"from_python({fn})")
    weakref.finalize(reward, _end_workers, scores)  # compiled programs may hold the score for longer
    return reward


def _end_workers(scores: list[HostScore]) -> None:
    for score in scores:
        if score.host.pool is not None:
            score.host.pool.end()


def from_model(score: Score, *, meaning: str = "odds") -> Potential:
    """Make a reward of a reward model (a ``Score`` such as ``lm.reasoner().reward``); by default its odds.

    Raises:
        TypeError: ``score`` is not a score.
        ValueError: the meaning is unknown.
    """
    return from_score(score, meaning=meaning)


def from_score(score: Score, *, meaning: str = "odds") -> Potential:
    """Make a reward of any score.

    Raises:
        TypeError: ``score`` is not a score.
        ValueError: the meaning is unknown.
    """
    if not isinstance(score, Score):
        raise TypeError(f"expected a score, such as the reward of lm.reasoner(), got {shortened(score)}")
    return potential_from_score(score, meaning)


def self_certainty(temperature: Any = 1.0) -> Potential:
    """Reward the model's own confidence in its steps: the odds of the geometric mean probability of their tokens.

    Raises:
        TypeError: the temperature is not a number.
        ValueError: it is not positive.
    """
    return LogOdds(SelfCertainty(), temperature)


def sharpened(power: Any) -> Potential:
    """Reward the model's own probability to ``power`` - 1, so that the target is the prior to ``power``.

    Raises:
        TypeError: the power is not a number.
        ValueError: it is negative or not finite.
    """
    return Sharpened(power)


def regex(pattern: Any) -> Deferred:
    """Allow only texts that match a regular expression from end to end.

    Args:
        pattern: in the syntax of Rust's ``regex`` crate: that of Python without look-around and back-references.

    Raises:
        TypeError: the pattern is not a string.
        ValueError: it does not parse.
    """
    from probinfer.lm.rewards import constraints

    return _only(constraints.regex(pattern), "texts that match", f"regex({pattern!r})")


def json_schema(schema: Any) -> Deferred:
    """Allow only JSON that follows a schema, which is a dictionary or its JSON text.

    Raises:
        TypeError: the schema is neither.
        ValueError: it is not a JSON object, not a schema, or has features that are not supported.
    """
    from probinfer.lm.rewards import constraints

    return _only(constraints.json_schema(schema), "JSON that follows the schema", "json_schema(...)")


def grammar(lark: Any) -> Deferred:
    """Allow only texts of a grammar in the notation of Lark.

    Raises:
        TypeError: the grammar is not a string.
        ValueError: it does not parse.
    """
    from probinfer.lm.rewards import constraints

    return _only(constraints.grammar(lark), "texts of the grammar", "grammar(...)")


def _only(language: Any, name: str, description: str) -> Deferred:
    """Return the reward that allows only the texts of a language, before a tokenizer is known."""
    return Deferred(lambda tokenizer: TokenMask(language.follow(tokenizer), name), description)


def _check_meaning(meaning: str) -> None:
    from probinfer.lm.rewards.meanings import MEANINGS

    if meaning not in MEANINGS:
        raise ValueError(f"meaning must be one of {', '.join(map(repr, MEANINGS))}, got {meaning!r}")
