"""Potentials: factors of the target; their sums and powers are products and temperings of the factors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.errors import shortened
from probinfer.core.types import Array, ArrayTree, pytree, strong_array
from probinfer.lm.arguments import known_number
from probinfer.lm.models.base import Context
from probinfer.lm.rewards.base import Sized, Summand, View

__all__ = ["Nothing", "Potential", "Product", "Tempered", "add", "check_power", "temper"]


class Potential(Sized, Summand):
    """A factor of the target, told step by step; base class of pytrees.

    A potential may weigh steps (``advance``) and single tokens (``log_factors``, where ``per_token``): then tokens are
    drawn in proportion to model times factor, and the weight is the sum over the vocabulary.
    """

    per_token: bool = False
    num_scores: int = 0  # reward calls an active particle costs a step

    def init(self, context: Context, num: int) -> ArrayTree:
        """State of ``num`` particles before the first step, leaves (num, ...) unless ``gather`` is its own."""
        return ()

    def log_factors(self, state: ArrayTree, tokens: Array, length: Array) -> Array:
        """Log factors (N, V) of the next token after the ``length`` first of ``tokens`` (N, M)."""
        raise TypeError(f"{type(self).__name__} has no factors of tokens")

    def advance_token(self, state: ArrayTree, tokens: Array, active: Array) -> ArrayTree:
        """Take in one token (N,) where ``active``."""
        return state

    def advance(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """Weigh a step: new state and log factors (N,), ignored where inactive."""
        return state, jnp.zeros_like(view.step_log_prob)

    def gather(self, state: ArrayTree, ancestors: Array) -> ArrayTree:
        """Fork the state."""
        return jax.tree.map(lambda leaf: leaf[ancestors], state)

    def log_score(self, last: Array, total: Array) -> Array:
        """Log score of the prefixes (N,), by which a search ranks them.

        Args:
            last: log factors of the last step.
            total: of all steps.
        """
        return total

    @property
    def words(self) -> str:
        """The factor in words, after "times"."""
        return type(self).__name__

    def __add__(self, other: Any) -> Potential:
        """The product of two factors, the sum of their logs."""
        if isinstance(other, Summand) and not isinstance(other, Potential):
            return NotImplemented  # it knows what factor it becomes
        return add(self, other)

    def __radd__(self, other: Any) -> Potential:
        """Never of two factors: say what can be added."""
        return add(self, other)

    def __mul__(self, power: Any) -> Potential:
        """The factor to a power."""
        return temper(self, power)

    __rmul__ = __mul__


@pytree
class Nothing(Potential):
    """The factor one: the prior itself."""

    @property
    def words(self) -> str:
        """In words."""
        return "nothing"


@pytree
class Product(Potential):
    """A product of factors.

    Attributes:
        parts: a tuple of potentials.
    """

    parts: Any

    @property
    def per_token(self) -> bool:  # type: ignore[override]
        """Whether one of them is."""
        return any(part.per_token for part in self.parts)

    @property
    def num_scores(self) -> int:  # type: ignore[override]
        """Of all."""
        return sum(part.num_scores for part in self.parts)

    def init(self, context: Context, num: int) -> ArrayTree:
        """Of each."""
        return tuple(part.init(context, num) for part in self.parts)

    def log_factors(self, state: ArrayTree, tokens: Array, length: Array) -> Array:
        """The sum of those that weigh tokens."""
        pairs = zip(self.parts, state, strict=True)
        found = [part.log_factors(own, tokens, length) for part, own in pairs if part.per_token]
        return sum(found[1:], found[0])

    def advance_token(self, state: ArrayTree, tokens: Array, active: Array) -> ArrayTree:
        """Each."""
        return tuple(p.advance_token(own, tokens, active) for p, own in zip(self.parts, state, strict=True))

    def advance(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """The sum."""
        states, values = zip(
            *(p.advance(own, view) for p, own in zip(self.parts, state, strict=True)), strict=True
        )
        return states, sum(values[1:], values[0])

    def gather(self, state: ArrayTree, ancestors: Array) -> ArrayTree:
        """Each."""
        return tuple(p.gather(own, ancestors) for p, own in zip(self.parts, state, strict=True))

    @property
    def words(self) -> str:
        """In words."""
        return ", times ".join(part.words for part in self.parts)


@pytree
class Tempered(Potential):
    """A factor to a power.

    Attributes:
        inner: the potential.
        power: beta; 0 takes the factor away, even where it is zero.
    """

    inner: Any
    power: Any

    @property
    def per_token(self) -> bool:  # type: ignore[override]
        """As the inner one."""
        return self.inner.per_token

    @property
    def num_scores(self) -> int:  # type: ignore[override]
        """As the inner one."""
        return self.inner.num_scores

    def init(self, context: Context, num: int) -> ArrayTree:
        """As the inner one."""
        return self.inner.init(context, num)

    def log_factors(self, state: ArrayTree, tokens: Array, length: Array) -> Array:
        """Times the power."""
        return _scaled(self.inner.log_factors(state, tokens, length), self.power)

    def advance_token(self, state: ArrayTree, tokens: Array, active: Array) -> ArrayTree:
        """As the inner one."""
        return self.inner.advance_token(state, tokens, active)

    def advance(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """Times the power."""
        state, value = self.inner.advance(state, view)
        return state, _scaled(value, self.power)

    def log_score(self, last: Array, total: Array) -> Array:
        """Of the inner one."""
        power = jnp.where(self.power == 0, 1, self.power).astype(last.dtype)
        return self.inner.log_score(last / power, total / power)

    def gather(self, state: ArrayTree, ancestors: Array) -> ArrayTree:
        """As the inner one."""
        return self.inner.gather(state, ancestors)

    @property
    def words(self) -> str:
        """In words."""
        return f"({self.inner.words}) to the power {float(self.power):g}"


def _scaled(value: Array, power: Array) -> Array:
    power = power.astype(value.dtype)
    return jnp.where(power == 0, jnp.zeros_like(value), power * value)


def add(a: Potential, b: Any) -> Potential:
    """The product of two factors.

    Raises:
        TypeError: ``b`` is no potential.
    """
    if not isinstance(b, Potential):
        raise TypeError(
            f"rewards are added to rewards, got {shortened(b)}; wrap a function by lm.rewards.from_python"
        )
    parts = tuple(part for side in (a, b) for part in (side.parts if isinstance(side, Product) else (side,)))
    return Product(parts)


def temper(inner: Potential, power: Any) -> Potential:
    """A factor to a power.

    Raises:
        TypeError: the power is no number.
        ValueError: it is negative.
    """
    check_power(power)
    return Tempered(inner, strong_array(power))


def check_power(power: Any) -> None:
    """Refuse what is no power of a factor; a traced one may be any number.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative or infinite.
    """
    try:
        known = known_number("the power of a reward", power)
    except TypeError:
        raise TypeError(
            f"a reward is tempered by a number, got {shortened(power)}; rewards are added with +"
        ) from None
    if known is not None and not 0 <= known < float("inf"):
        raise ValueError(f"the power of a reward must be finite and not negative, got {known:g}")
