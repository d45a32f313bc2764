"""Potentials: positive functions of a text that multiply the prior. Their logs add up, and are scaled by powers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.errors import shortened
from probinfer.core.types import Array, ArrayTree, pytree, strong_array
from probinfer.lm.arguments import concrete_number
from probinfer.lm.models.base import Context
from probinfer.lm.rewards.base import CacheOwner, Summand, View

__all__ = [
    "Potential",
    "ProductPotential",
    "TemperedPotential",
    "UnitPotential",
    "add",
    "check_power",
    "temper",
]


class Potential(CacheOwner, Summand):
    """A function G of a text that multiplies the prior, evaluated step by step; base class of pytrees.

    A potential may weigh steps (``advance``) and, if ``per_token``, single tokens (``log_token_potentials``): then
    tokens are drawn in proportion to model times token potential, and the weight is the sum over the vocabulary.
    """

    per_token: bool = False
    num_scores: int = 0  # reward calls of an active particle in one step

    def init(self, context: Context, num: int) -> ArrayTree:
        """Return the state of ``num`` particles before the first step.

        Leaves are (num, ...), unless ``gather`` is overridden.
        """
        return ()

    def log_token_potentials(self, state: ArrayTree, tokens: Array, length: Array) -> Array:
        """Return log potentials (N, V) of the token after the ``length`` first of ``tokens`` (N, M)."""
        raise TypeError(f"{type(self).__name__} has no potentials of tokens")

    def advance_token(self, state: ArrayTree, tokens: Array, active: Array) -> ArrayTree:
        """Return the state after one token (N,) of the active particles."""
        return state

    def advance(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """Weigh a step: return the new state and log potentials (N,), which are ignored for inactive particles."""
        return state, jnp.zeros_like(view.step_log_prob)

    def gather(self, state: ArrayTree, ancestors: Array) -> ArrayTree:
        """Fork the state: row j of the result is row ``ancestors[j]``."""
        return jax.tree.map(lambda leaf: leaf[ancestors], state)

    def log_score(self, last: Array, total: Array) -> Array:
        """Return the log score of the prefixes (N,), by which a search ranks them.

        Args:
            last: (N,) log potentials of the last step.
            total: (N,) sum of the log potentials of all steps.
        """
        return total

    @property
    def description(self) -> str:
        """The potential in words, after "times"."""
        return type(self).__name__

    def __add__(self, other: Any) -> Potential:
        """The product of two potentials, the sum of their logs."""
        if isinstance(other, Summand) and not isinstance(other, Potential):
            return NotImplemented  # its own __radd__ turns it into a potential
        return add(self, other)

    def __radd__(self, other: Any) -> Potential:
        """Reached only if ``other`` is not a reward, so this raises an error that says what can be added."""
        return add(self, other)

    def __mul__(self, power: Any) -> Potential:
        """The potential to a power."""
        return temper(self, power)

    __rmul__ = __mul__


@pytree
class UnitPotential(Potential):
    """The potential one: the target is the prior itself."""

    @property
    def description(self) -> str:
        """The potential in words."""
        return "nothing"


@pytree
class ProductPotential(Potential):
    """A product of potentials.

    Attributes:
        parts: a tuple of potentials.
    """

    parts: Any

    @property
    def per_token(self) -> bool:  # type: ignore[override]
        """Whether one of the parts weighs tokens."""
        return any(part.per_token for part in self.parts)

    @property
    def num_scores(self) -> int:  # type: ignore[override]
        """The sum over the parts."""
        return sum(part.num_scores for part in self.parts)

    def init(self, context: Context, num: int) -> ArrayTree:
        """The states of the parts, as a tuple."""
        return tuple(part.init(context, num) for part in self.parts)

    def log_token_potentials(self, state: ArrayTree, tokens: Array, length: Array) -> Array:
        """The sum over the parts that weigh tokens."""
        pairs = zip(self.parts, state, strict=True)
        values = [p.log_token_potentials(substate, tokens, length) for p, substate in pairs if p.per_token]
        return sum(values[1:], values[0])

    def advance_token(self, state: ArrayTree, tokens: Array, active: Array) -> ArrayTree:
        """Advance each part."""
        pairs = zip(self.parts, state, strict=True)
        return tuple(part.advance_token(substate, tokens, active) for part, substate in pairs)

    def advance(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """The sum over the parts."""
        pairs = zip(self.parts, state, strict=True)
        states, values = zip(*(part.advance(substate, view) for part, substate in pairs), strict=True)
        return states, sum(values[1:], values[0])

    def gather(self, state: ArrayTree, ancestors: Array) -> ArrayTree:
        """Fork the state of each part."""
        return tuple(
            part.gather(substate, ancestors) for part, substate in zip(self.parts, state, strict=True)
        )

    @property
    def description(self) -> str:
        """The potential in words."""
        return ", times ".join(part.description for part in self.parts)


@pytree
class TemperedPotential(Potential):
    """A potential to a power.

    Attributes:
        inner: the potential.
        power: the power beta; 0 removes the potential, even where it is zero.
    """

    inner: Any
    power: Any

    @property
    def per_token(self) -> bool:  # type: ignore[override]
        """As for the inner potential."""
        return self.inner.per_token

    @property
    def num_scores(self) -> int:  # type: ignore[override]
        """As for the inner potential."""
        return self.inner.num_scores

    def init(self, context: Context, num: int) -> ArrayTree:
        """The state of the inner potential."""
        return self.inner.init(context, num)

    def log_token_potentials(self, state: ArrayTree, tokens: Array, length: Array) -> Array:
        """Those of the inner potential, times the power."""
        return _scale(self.inner.log_token_potentials(state, tokens, length), self.power)

    def advance_token(self, state: ArrayTree, tokens: Array, active: Array) -> ArrayTree:
        """Advance the inner potential."""
        return self.inner.advance_token(state, tokens, active)

    def advance(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """The log potential of the inner potential, times the power."""
        state, log_potential = self.inner.advance(state, view)
        return state, _scale(log_potential, self.power)

    def log_score(self, last: Array, total: Array) -> Array:
        """The log score of the inner potential, which the power does not change."""
        power = jnp.where(self.power == 0, 1, self.power).astype(last.dtype)
        return self.inner.log_score(last / power, total / power)

    def gather(self, state: ArrayTree, ancestors: Array) -> ArrayTree:
        """Fork the state of the inner potential."""
        return self.inner.gather(state, ancestors)

    @property
    def description(self) -> str:
        """The potential in words."""
        return f"({self.inner.description}) to the power {float(self.power):g}"


def _scale(value: Array, power: Array) -> Array:
    """Return power times value, and 0 for the power 0 even of minus infinity (the product would be NaN)."""
    power = power.astype(value.dtype)
    return jnp.where(power == 0, jnp.zeros_like(value), power * value)


def add(a: Potential, b: Any) -> Potential:
    """Return the product of two potentials, the sum of their logs.

    Raises:
        TypeError: ``b`` is not a potential.
    """
    if not isinstance(b, Potential):
        raise TypeError(
            f"rewards are added to rewards, got {shortened(b)}; wrap a function by lm.rewards.from_python"
        )
    parts = tuple(
        part for side in (a, b) for part in (side.parts if isinstance(side, ProductPotential) else (side,))
    )
    return ProductPotential(parts)


def temper(inner: Potential, power: Any) -> Potential:
    """Return a potential to a power.

    Raises:
        TypeError: the power is not a number.
        ValueError: it is negative or infinite.
    """
    check_power(power)
    return TemperedPotential(inner, strong_array(power))


def check_power(power: Any) -> None:
    """Refuse an invalid power of a potential; the value of a traced one is not checked.

    Raises:
        TypeError: it is not a number.
        ValueError: it is negative or infinite.
    """
    try:
        number = concrete_number("the power of a reward", power)
    except TypeError:
        raise TypeError(
            f"a reward is tempered by a number, got {shortened(power)}; rewards are added with +"
        ) from None
    if number is not None and not 0 <= number < float("inf"):
        raise ValueError(f"the power of a reward must be finite and not negative, got {number:g}")
