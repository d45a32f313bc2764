"""What a reward is given of a step, and what all rewards have in common."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Bool, Float, Int
from probinfer.lm.models.base import Context

__all__ = ["CacheOwner", "Summand", "View", "log_value"]


class View(NamedTuple):
    """N particles after a step.

    Attributes:
        context: the prompt.
        tokens: (N, M) all tokens so far, padded on the right.
        length: (N,) number of tokens so far.
        step_tokens: (N, K) tokens of this step, padded on the right.
        step_length: (N,) number of tokens of this step; 0 if the text had ended before.
        active: (N,) whether the particle took this step.
        finished: (N,) whether its text ended in this step, by the end token or a stop string.
        truncated: (N,) whether its text was cut in this step, by the limit of tokens or of steps.
        step_log_prob: (N,) log probability of the step under the prior.
        t: () number of the step, from 0.
    """

    context: Context
    tokens: Int[Array, "N M"]
    length: Int[Array, " N"]
    step_tokens: Int[Array, "N K"]
    step_length: Int[Array, " N"]
    active: Bool[Array, " N"]
    finished: Bool[Array, " N"]
    truncated: Bool[Array, " N"]
    step_log_prob: Float[Array, " N"]
    t: Int[Array, ""]


class CacheOwner:
    """A reward that says how many bytes its caches take; base class of pytrees that may contain others of its kind.

    By default this is the sum over all parts; a reward with a cache of its own overrides the two methods. Numbers that
    are stored for each particle are not counted.
    """

    def cache_bytes(self, num: int, max_tokens: int) -> int:
        """Return bytes of the private caches of ``num`` particles with texts of up to ``max_tokens`` tokens."""
        return sum(part.cache_bytes(num, max_tokens) for part in self._parts())

    def prompt_bytes(self, length: int) -> int:
        """Return bytes that the reward stores of a prompt padded to ``length``; the language model counts its own."""
        return sum(part.prompt_bytes(length) for part in self._parts())

    def _parts(self) -> list[CacheOwner]:
        leaves = jax.tree.leaves(self, is_leaf=lambda leaf: leaf is not self and isinstance(leaf, CacheOwner))
        return [part for part in leaves if part is not self and isinstance(part, CacheOwner)]


class Summand:
    """What may stand on either side of a plus between rewards: a potential, or what becomes one; base class."""


def log_value(scale: str, value: Array) -> Array:
    """Return the log of the number that a score represents: log sigmoid of a logit, and a log as it is."""
    return -jnp.logaddexp(jnp.zeros_like(value), -value) if scale == "logit" else value
