r"""Only some texts: :math:`1[x \in C]`, told token by token.

Tokens are drawn among those that may follow, and every token is weighed by their total probability: a text is not more
likely because the mask had left it little choice.
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
        name: in words; static.
        whole: texts that were cut before their end have weight zero; static.
    """

    constraint: Any
    name: str = field(static=True, default="allowed texts")
    whole: bool = field(static=True, default=True)

    per_token = True

    def init(self, context: Context, num: int) -> ArrayTree:
        """Of the constraint."""
        return self.constraint.init(context, num)

    def log_factors(self, state: ArrayTree, tokens: Array, length: Array) -> Array:
        """Zero where a token may follow, minus infinity elsewhere."""
        allowed = self.constraint.mask(state, tokens, length)
        return jnp.where(allowed, 0.0, -jnp.inf).astype(jnp.float32)

    def advance_token(self, state: ArrayTree, tokens: Array, active: Array) -> ArrayTree:
        """Of the constraint."""
        return self.constraint.advance(state, tokens, active)

    def advance(self, state: ArrayTree, view: View) -> tuple[ArrayTree, Array]:
        """Nothing more, but for texts that were cut."""
        cut = view.truncated if self.whole else jnp.zeros_like(view.truncated)
        return state, jnp.where(cut, -jnp.inf, 0.0).astype(view.step_log_prob.dtype)

    def gather(self, state: ArrayTree, ancestors: Array) -> ArrayTree:
        """Of the constraint."""
        return self.constraint.gather(state, ancestors)

    def detached(self) -> TokenMask:
        """The same without its words and what is on the host: a pattern runs the program of a schema."""
        return TokenMask(detached(self.constraint), whole=self.whole)

    @property
    def words(self) -> str:
        """In words."""
        return f"one for {self.name} and zero for others"
