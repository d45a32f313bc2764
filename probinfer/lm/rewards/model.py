r"""A reward model: a transformer trunk with a value head, read at the last token of each step.

.. math:: \operatorname{logit} r(x_{1:t}) = w^\top h(c, x_{1:t}) + b

It has its own prompt and its own cache, forked by the same ancestors as the language model's, so a step costs the
tokens of the step and not those of the prefix.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.errors import shortened
from probinfer.core.types import Array, Float, Int, field, pytree, strong_array
from probinfer.lm.models.base import Context
from probinfer.lm.rewards.base import View
from probinfer.lm.rewards.meanings import Score

__all__ = ["RewardModel", "RewardState"]


class RewardState(NamedTuple):
    """What a reward model remembers.

    Attributes:
        prompt: what its ``prefill`` keeps; shared by all particles.
        cache: private suffixes of its trunk.
        length: (N,) tokens read so far.
        value: (N,) logit of the prefix read so far; before the first step that of the prompt.
    """

    prompt: Any
    cache: Any
    length: Array
    value: Array


@pytree
class RewardModel(Score):
    """A process reward model; its score of a prefix is the logit of the probability that the prefix is right.

    Args:
        trunk: a ``LanguageModel``; only its hidden states are used.
        weight: (H,) value head.
        bias: ().
        max_tokens: room for the tokens of a text after its prompt; static. ``None``: what the context of the trunk
            leaves beside the padded prompt, which for a large trunk is a large cache.
        chunk: tokens read at once; static. A step of any length is read in as many chunks as the longest one needs.

    Raises:
        ValueError: the head is no vector and number, or a count is below 1.
    """

    trunk: Any
    weight: Any
    bias: Any
    max_tokens: int | None = field(static=True, default=None)
    chunk: int = field(static=True, default=16)

    source = "the reward model"

    def __post_init__(self):
        for name, rank in (("weight", 1), ("bias", 0)):
            value = strong_array(getattr(self, name))
            if jnp.ndim(value) != rank:
                raise ValueError(f"{name} must have {rank} axes, got shape {jnp.shape(value)}")
            object.__setattr__(self, name, value)
        for name in ("max_tokens", "chunk"):
            value = getattr(self, name)
            absent = name == "max_tokens" and value is None
            if not absent and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(
                    f"{name} must be a positive Python int (it is a shape), got {shortened(value)}"
                )

    def __repr__(self) -> str:
        return f"RewardModel({shortened(self.trunk)})"

    def with_room(self, max_tokens: int) -> RewardModel:
        """The same model with room for so many tokens after the prompt."""
        return dataclasses.replace(self, max_tokens=max_tokens)  # type: ignore[type-var]

    def value(self, hidden: Array) -> Array:
        """w·h + b for hidden states (..., H), in at least float32."""
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        return hidden.astype(dtype) @ self.weight.astype(dtype) + self.bias.astype(dtype)

    def logits(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s"]:
        """Logits after every token of whole rows, prompt included, without a cache: what the head is trained on.

        Args:
            tokens: rows padded on the right; the trunk must have ``forward``.
        """
        return self.value(self.trunk.forward(tokens))

    def init(self, context: Context, num: int) -> RewardState:
        """Read the prompt once.

        Raises:
            ValueError: the prompt and ``max_tokens`` do not fit into the context of the trunk.
        """
        size, most = context.tokens.shape[0], self.trunk.max_context
        room = most - size if self.max_tokens is None else self.max_tokens
        if room < 1 or size + room > most:
            raise ValueError(
                f"a padded prompt of {size} tokens and {max(room, 1)} tokens after it do not fit into the {most} "
                f"tokens of the reward model's context: shorten the prompt or max_tokens"
            )
        hidden, prompt = self.trunk.prefill(context.tokens, context.length)
        value = jnp.broadcast_to(self.value(hidden), (num,))
        return RewardState(prompt, self.trunk.init_cache(num, room), jnp.zeros(num, jnp.int32), value)

    def cache_bytes(self, num: int, max_tokens: int) -> int:
        """Of the trunk: room for ``self.max_tokens``, or where that is None for the texts of the run."""
        return self.trunk.cache_bytes(num, max_tokens if self.max_tokens is None else self.max_tokens)

    def prompt_bytes(self, length: int) -> int:
        """Of the trunk."""
        return self.trunk.prompt_bytes(length)

    def step(self, state: RewardState, view: View) -> tuple[RewardState, Array]:
        """Read the tokens of the step; a particle that took none keeps its value."""
        length = view.step_length.astype(jnp.int32)
        size = min(self.chunk, view.step_tokens.shape[1])
        tokens = jnp.pad(view.step_tokens, ((0, 0), (0, -view.step_tokens.shape[1] % size)))
        num_chunks = (_most(length) + size - 1) // size

        def body(loop: tuple) -> tuple:
            i, cache, value = loop
            part = lax.dynamic_slice_in_dim(tokens, i * size, size, axis=1)
            hidden, cache = self.trunk.extend(state.prompt, cache, part, state.length + i * size)
            last = length - 1 - i * size  # of the step, counted from the start of the chunk
            at = jnp.clip(last, 0, size - 1)[:, None, None]
            here = self.value(jnp.take_along_axis(hidden, at, axis=1)[:, 0])
            return i + 1, cache, jnp.where((last >= 0) & (last < size), here.astype(value.dtype), value)

        start = (jnp.int32(0), state.cache, state.value)
        _, cache, value = lax.while_loop(lambda loop: loop[0] < num_chunks, body, start)
        return RewardState(state.prompt, cache, state.length + length, value), value

    def gather(self, state: RewardState, ancestors: Array) -> RewardState:
        """Fork the cache; the prompt is shared."""
        cache = self.trunk.gather(state.cache, ancestors)
        return RewardState(state.prompt, cache, state.length[ancestors], state.value[ancestors])


@partial(jax.custom_batching.custom_vmap)
def _most(length: Array) -> Array:
    """The largest of all, of every prompt under ``vmap``: one bound of the loop, so that its cache is not copied."""
    return jnp.max(length)


@_most.def_vmap
def _most_of_all(size: int, batched: Any, length: Array) -> tuple[Array, bool]:
    return _most(length.reshape(-1)), False
