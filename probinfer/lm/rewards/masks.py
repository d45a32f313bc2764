r"""Constraints on texts: :math:`1[x \in C]`, evaluated token by token.

Tokens are drawn among those that may follow, and every token is weighed by the total probability of these: a text does
not become more likely because the mask left little choice.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from probinfer.core.types import Array, ArrayTree, field, pytree
from probinfer.lm.models.base import Context
from probinfer.lm.rewards.algebra import Potential
from probinfer.lm.rewards.base import View
from probinfer.lm.rewards.host.registry import detached

__all__ = ["TokenMask"]


@pytree
class TokenMask(Potential):
    """A set of texts.

    Attributes:
        constraint: an object with ``init(context, num)``, ``mask(state, tokens, length) -> (N, V)``,
            ``advance(state, tokens, active)`` and ``gather(state, ancestors)``.
        name: the texts in words; static.
        complete_only: texts that were cut before their end have weight zero; static.
    """

    constraint: Any
    name: str = field(static=True, default="allowed texts")
    complete_only: bool = field(static=True, default=True)

    per_token = True

    def init(self, context: Context, num: int) -> ArrayTree:
        """The state of the constraint."""
        return self.constraint.init(context, num)

    def log_token_potentials(self, state: ArrayTree, tokens: Array, length: Array) -> Array:
        """Zero where a token may follow, minus infinity elsewhere."""
        allowed = self.constraint.mask(state, tokens, length)
        return jnp.where(allowed, 0.0, -jnp.inf).astype(jnp.float32)

    def advance_token(self, state: ArrayTree, tokens: Array, active: Array) -> ArrayTree:
        """Advance the constraint."""
        return self.constraint.advance(state, tokens, active)

    def advance(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """Weigh texts that were cut by zero; the tokens have been weighed already."""
        cut = view.truncated if self.complete_only else jnp.zeros_like(view.truncated)
        return state, jnp.where(cut, -jnp.inf, 0.0).astype(view.step_log_prob.dtype)

    def gather(self, state: ArrayTree, ancestors: Array) -> ArrayTree:
        """Fork the state of the constraint."""
        return self.constraint.gather(state, ancestors)

    def detached(self) -> TokenMask:
        """Return the same without its name and its host object, so that all patterns and schemas share one program."""
        return TokenMask(detached(self.constraint), complete_only=self.complete_only)

    @property
    def description(self) -> str:
        """The potential in words."""
        return f"one for {self.name} and zero for others"
