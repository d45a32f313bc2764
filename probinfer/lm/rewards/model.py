r"""A reward model: a transformer trunk with a value head, read at the last token of each step.

.. math:: \operatorname{logit} r(x_{1:t}) = w^\top h(c, x_{1:t}) + b

It reads the prompt itself and has a cache of its own, forked by the same ancestors as the cache of the language model,
so a step costs the tokens of the step and not those of the prefix.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.errors import shortened
from probinfer.core.types import Array, ArrayTree, Float, Int, field, pytree, strong_array
from probinfer.lm.models.base import Context
from probinfer.lm.rewards.base import View
from probinfer.lm.rewards.meanings import Score

__all__ = ["RewardModel", "RewardState"]


class RewardState(NamedTuple):
    """What a reward model remembers.

    Attributes:
        prompt: what ``prefill`` of the trunk keeps of the prompt; shared by all particles.
        cache: private suffixes of the trunk.
        length: (N,) number of tokens read so far.
        value: (N,) logit of the prefix read so far; before the first step that of the prompt.
    """

    prompt: ArrayTree
    cache: ArrayTree
    length: Int[Array, " N"]
    value: Float[Array, " N"]


@pytree
class RewardModel(Score):
    """A process reward model; its score of a prefix is the logit of the probability that the prefix is right.

    Args:
        trunk: a ``LanguageModel``; only its hidden states are used.
        weight: (H,) weights of the value head.
        bias: () bias of the value head.
        max_tokens: room for the tokens of a text after its prompt; static. ``None``: what the padded prompt leaves of
            the context of the trunk, which for a large trunk is a large cache.
        chunk: number of tokens read at once; static. The longest step of all particles decides the number of chunks.

    Raises:
        ValueError: the head is not a vector and a number, or a count is below 1.
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
        """Return the same model with room for this many tokens after the prompt."""
        return dataclasses.replace(self, max_tokens=max_tokens)  # type: ignore[type-var]

    def value(self, hidden: Array) -> Array:
        """Return w·h + b of hidden states (..., H), in at least float32."""
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        return hidden.astype(dtype) @ self.weight.astype(dtype) + self.bias.astype(dtype)

    def logits(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s"]:
        """Return logits after every token of whole rows, prompt included, without a cache; used for training.

        Args:
            tokens: rows padded on the right; the trunk must have ``forward``.
        """
        return self.value(self.trunk.forward(tokens))

    def init(self, context: Context, num: int) -> RewardState:
        """Read the prompt once.

        Raises:
            ValueError: the prompt and ``max_tokens`` do not fit into the context of the trunk.
        """
        size, max_context = context.tokens.shape[0], self.trunk.max_context
        room = max_context - size if self.max_tokens is None else self.max_tokens
        if room < 1 or size + room > max_context:
            raise ValueError(
                f"a padded prompt of {size} tokens and {max(room, 1)} tokens after it do not fit into the "
                f"{max_context} tokens of the reward model's context: shorten the prompt or max_tokens"
            )
        hidden, prompt = self.trunk.prefill(context.tokens, context.length)
        value = jnp.broadcast_to(self.value(hidden), (num,))
        return RewardState(prompt, self.trunk.init_cache(num, room), jnp.zeros(num, jnp.int32), value)

    def cache_bytes(self, num: int, max_tokens: int) -> int:
        """Bytes of the cache of the trunk, with room for ``self.max_tokens``, or if it is None for ``max_tokens``."""
        return self.trunk.cache_bytes(num, max_tokens if self.max_tokens is None else self.max_tokens)

    def prompt_bytes(self, length: int) -> int:
        """Bytes that the trunk keeps of the prompt."""
        return self.trunk.prompt_bytes(length)

    def step(self, state: RewardState, view: View) -> tuple[RewardState, Array]:
        """Read the tokens of the step; a particle that took none keeps its value."""
        length = view.step_length.astype(jnp.int32)
        size = min(self.chunk, view.step_tokens.shape[1])
        tokens = jnp.pad(view.step_tokens, ((0, 0), (0, -view.step_tokens.shape[1] % size)))
        num_chunks = (_max_over_prompts(length) + size - 1) // size

        def read_chunk(carry: tuple) -> tuple:
            i, cache, value = carry
            chunk = lax.dynamic_slice_in_dim(tokens, i * size, size, axis=1)
            hidden, cache = self.trunk.extend(state.prompt, cache, chunk, state.length + i * size)
            # the last token of the step, counted from the start of the chunk: its hidden state gives the value
            last = length - 1 - i * size
            index = jnp.clip(last, 0, size - 1)[:, None, None]
            new_value = self.value(jnp.take_along_axis(hidden, index, axis=1)[:, 0]).astype(value.dtype)
            return i + 1, cache, jnp.where((last >= 0) & (last < size), new_value, value)

        start = (jnp.int32(0), state.cache, state.value)
        _, cache, value = lax.while_loop(lambda carry: carry[0] < num_chunks, read_chunk, start)
        return RewardState(state.prompt, cache, state.length + length, value), value

    def gather(self, state: RewardState, ancestors: Array) -> RewardState:
        """Fork the cache; the prompt is shared."""
        cache = self.trunk.gather(state.cache, ancestors)
        return RewardState(state.prompt, cache, state.length[ancestors], state.value[ancestors])


@partial(jax.custom_batching.custom_vmap)
def _max_over_prompts(length: Array) -> Array:
    """Return the largest length, under ``vmap`` of all prompts: with one bound for all, the loop copies no cache."""
    return jnp.max(length)


@_max_over_prompts.def_vmap
def _max_batched(size: int, batched: Any, length: Array) -> tuple[Array, bool]:
    return _max_over_prompts(length.reshape(-1)), False
