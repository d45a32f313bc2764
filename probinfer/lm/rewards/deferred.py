"""Rewards before a model is known: what needs a tokenizer waits for it, and can be added and tempered before."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from probinfer.core.errors import shortened
from probinfer.lm.rewards.algebra import Nothing, Potential, add, check_power, temper
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
    """A reward that is made when its tokenizer is known, once for each tokenizer."""

    def __init__(self, make: Callable[[Any], Potential], words: str):
        self._make, self._words = make, words
        self._made: dict[int, tuple[Any, Potential]] = {}

    def bind(self, tokenizer: Any) -> Potential:
        """The potential for a tokenizer; the same object when asked again."""
        if id(tokenizer) not in self._made:
            self._made[id(tokenizer)] = (tokenizer, self._make(tokenizer))
        return self._made[id(tokenizer)][1]

    def __add__(self, other: Any) -> Deferred:
        """The product of two factors."""
        return _sum(self, other, other)

    def __radd__(self, other: Any) -> Deferred:
        """The product of two factors, the other way round."""
        return _sum(other, self, other)

    def __mul__(self, power: Any) -> Deferred:
        """The factor to a power."""
        check_power(power)
        return Deferred(lambda tokenizer: temper(self.bind(tokenizer), power), f"{power} * ({self})")

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return self._words


def _sum(first: Any, second: Any, other: Any) -> Deferred:
    """The sum of two rewards, of which ``other`` may be anything that a user has written."""
    if not isinstance(other, Summand):
        raise TypeError(
            f"rewards are added to rewards, got {shortened(other)}; wrap a function by lm.rewards.from_python"
        )
    return Deferred(lambda tok: add(bind(first, tok), bind(second, tok)), f"{first} + {second}")


def bind(reward: Any, tokenizer: Any) -> Potential:
    """The potential of what a user calls a reward: None, a function, a score, a reward model, a potential.

    Raises:
        TypeError: it is something else.
    """
    if reward is None:
        return Nothing()
    if isinstance(reward, Potential):
        return reward
    if isinstance(reward, Deferred):
        return reward.bind(tokenizer)
    if isinstance(reward, Score):
        return default_potential(reward)
    if callable(reward):
        raise TypeError(
            f"a Python function becomes a reward by lm.rewards.from_python(fn): it says what its numbers mean; got "
            f"{shortened(reward)}"
        )
    raise TypeError(
        f"a reward is made by lm.rewards.from_python, from_model, regex, ...; got {shortened(reward)}"
    )


def from_python(fn: Callable[..., Any], *, meaning: str = "twist", **settings: Any) -> Deferred:
    """A Python function ``fn(prompt, text) -> number`` as a reward, called in worker processes.

    Args:
        fn: sees strings and returns a probability, a number from 0 to 1; with ``scale="logit"`` its log odds, any
            number; with ``scale="log"`` the log of a factor, any number below infinity. What raises, hangs or returns
            something else gets weight zero and is counted.
        meaning: "twist" (the text's law is prior times the last score), "likelihood" (the product of the scores of its
            steps), "odds" (the product of their odds) or "terminal" (the score of whole texts only).
        **settings: of ``rewards.host.HostScore``: ``takes``, ``scale``, ``timeout``, ``workers``, ``memory``,
            ``max_steps``.

    Raises:
        TypeError: no function, or an unknown setting.
        ValueError: an unknown meaning, or a setting out of range.
    """
    if not callable(fn):
        raise TypeError(f"a reward function is called with (prompt, text), got {shortened(fn)}")
    _check_meaning(meaning)
    check_settings(**settings)
    made: list[HostScore] = []

    def make(tokenizer: Any) -> Potential:
        made.append(HostScore(fn, tokenizer, **settings))
        return potential_from_score(made[-1], meaning)

    reward = Deferred(make, f"from_python({fn})")
    weakref.finalize(reward, _end_workers, made)  # compiled programs may hold the score for longer
    return reward


def _end_workers(scores: list[HostScore]) -> None:
    for score in scores:
        if score.host.pool is not None:
            score.host.pool.end()


def from_model(score: Score, *, meaning: str = "odds") -> Potential:
    """A reward model (a ``Score`` such as ``lm.reasoner().reward``) as a reward; by default its odds.

    Raises:
        TypeError: no score.
        ValueError: an unknown meaning.
    """
    return from_score(score, meaning=meaning)


def from_score(score: Score, *, meaning: str = "odds") -> Potential:
    """Any score as a reward.

    Raises:
        TypeError: no score.
        ValueError: an unknown meaning.
    """
    if not isinstance(score, Score):
        raise TypeError(f"expected a score, such as the reward of lm.reasoner(), got {shortened(score)}")
    return potential_from_score(score, meaning)


def self_certainty(temperature: Any = 1.0) -> Potential:
    """The model's own confidence in its steps as a reward: odds of the geometric mean probability of their tokens.

    Raises:
        TypeError: the temperature is no number.
        ValueError: it is not positive.
    """
    return LogOdds(SelfCertainty(), temperature)


def sharpened(power: Any) -> Potential:
    """The model's own probability to ``power`` - 1: the law is then prior to that power.

    Raises:
        TypeError: the power is no number.
        ValueError: it is negative or not finite.
    """
    return Sharpened(power)


def regex(pattern: Any) -> Deferred:
    """Only texts that match a regular expression from end to end.

    Args:
        pattern: in the syntax of Rust's ``regex`` crate: as Python's without look-around and back-references.

    Raises:
        TypeError: the pattern is no string.
        ValueError: it does not parse.
    """
    from probinfer.lm.rewards import constraints

    return _only(constraints.regex(pattern), "texts that match", f"regex({pattern!r})")


def json_schema(schema: Any) -> Deferred:
    """Only JSON that follows a schema, a dictionary or its JSON text.

    Raises:
        TypeError: the schema is neither.
        ValueError: it is no JSON object, no schema, or uses what cannot be followed.
    """
    from probinfer.lm.rewards import constraints

    return _only(constraints.json_schema(schema), "JSON that follows the schema", "json_schema(...)")


def grammar(lark: Any) -> Deferred:
    """Only texts of a grammar in the notation of Lark.

    Raises:
        TypeError: the grammar is no string.
        ValueError: it does not parse.
    """
    from probinfer.lm.rewards import constraints

    return _only(constraints.grammar(lark), "texts of the grammar", "grammar(...)")


def _only(language: Any, name: str, words: str) -> Deferred:
    """The texts of a language, of which the tokenizer is to come."""
    return Deferred(lambda tokenizer: TokenMask(language.follow(tokenizer), name), words)


def _check_meaning(meaning: str) -> None:
    from probinfer.lm.rewards.meanings import MEANINGS

    if meaning not in MEANINGS:
        raise ValueError(f"meaning must be one of {', '.join(map(repr, MEANINGS))}, got {meaning!r}")
