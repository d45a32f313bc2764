"""What a reward sees of a step, and its two kinds: scores are numbers, potentials what they mean as weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer.lm.base import Context
from probinfer.types import Array, ArrayTree

__all__ = ["Potential", "Score", "View", "log_value"]


class View(NamedTuple):
    """N particles after a step.

    Attributes:
        context: the prompt.
        tokens: (N, M) all tokens so far.
        length: (N,) how many.
        step_tokens: (N, K) those of this step.
        step_length: (N,) how many; 0 where the text had ended before.
        active: (N,) whether the particle took this step.
        finished: (N,) whether its text ended in it, by the end token or a stop string.
        truncated: (N,) whether it was cut in it, by the limit of tokens or of steps.
        step_log_prob: (N,) log probability of the step under the prior.
        t: (), number of the step.
    """

    context: Context
    tokens: Array
    length: Array
    step_tokens: Array
    step_length: Array
    active: Array
    finished: Array
    truncated: Array
    step_log_prob: Array
    t: Array


class Score:
    """A number for every prefix that ends with a step; base class of pytrees.

    ``scale`` says what ``step`` returns: "logit" of a probability, or "log" of a number that is not negative.
    """

    scale: str = "logit"

    def init(self, context: Context, num: int) -> ArrayTree:
        """State of ``num`` particles before the first step, leaves (num, ...) unless ``gather`` is its own."""
        return ()

    def step(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """Score the step that was taken: new state and values (N,); values of inactive particles are not read."""
        raise TypeError(f"{type(self).__name__} does not define step(state, view)")

    def gather(self, state: ArrayTree, ancestors: Array) -> ArrayTree:
        """Fork the state."""
        return jax.tree.map(lambda leaf: leaf[ancestors], state)


def log_value(scale: str, value: Array) -> Array:
    """Log of the number that a score stands for."""
    return -jnp.logaddexp(jnp.zeros_like(value), -value) if scale == "logit" else value


class Potential:
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
        from probinfer.lm.rewards.algebra import add

        return add(self, other)

    def __mul__(self, power: Any) -> Potential:
        """The factor to a power."""
        from probinfer.lm.rewards.algebra import temper

        return temper(self, power)

    __rmul__ = __mul__
