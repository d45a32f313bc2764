"""What a reward sees of a step, and what all rewards have in common."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.types import Array
from probinfer.lm.models.base import Context

__all__ = ["Sized", "Summand", "View", "log_value"]


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


class Sized:
    """What is told how large its caches will be; base class of pytrees that may contain others of it.

    What wraps, adds or tempers rewards passes on the bytes of all that it is made of; who keeps a cache says its own.
    Numbers that are kept for each particle are not counted.
    """

    def cache_bytes(self, num: int, max_tokens: int) -> int:
        """Bytes of the private caches of ``num`` particles with texts of up to ``max_tokens`` tokens."""
        return sum(part.cache_bytes(num, max_tokens) for part in self._parts())

    def prompt_bytes(self, length: int) -> int:
        """Bytes of what is kept of a prompt padded to ``length``, besides what the language model keeps."""
        return sum(part.prompt_bytes(length) for part in self._parts())

    def _parts(self) -> list[Sized]:
        found = jax.tree.leaves(self, is_leaf=lambda leaf: leaf is not self and isinstance(leaf, Sized))
        return [part for part in found if part is not self and isinstance(part, Sized)]


class Summand:
    """What stands on either side of a plus between rewards: a factor, or what becomes one; base class."""


def log_value(scale: str, value: Array) -> Array:
    """Log of the number that a score stands for."""
    return -jnp.logaddexp(jnp.zeros_like(value), -value) if scale == "logit" else value
