"""Solutions drawn from a language model, for training and for its accuracy: many prompts in one batched loop."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from probinfer.core.types import Array, PRNGKey
from probinfer.lm.models.base import decode
from probinfer.lm.reasoner import encoding
from probinfer.lm.reasoner.task import Problems

__all__ = ["Rollouts", "accuracy", "rollouts", "sample"]


class Rollouts(NamedTuple):
    """Solutions that a model wrote, with the verdicts of the checker.

    Args:
        tokens: (B, T), padded on the right.
        length: (B,) tokens of each, the end token included.
        right: (B, T), whether the solution is right up to each token.
        answer: (B,), whether the answer is right, however it was reached.
    """

    tokens: Int[np.ndarray, "B T"]
    length: Int[np.ndarray, "B"]
    right: Bool[np.ndarray, "B T"]
    answer: Bool[np.ndarray, "B"]


@partial(jax.jit, static_argnames="max_tokens")
def sample(
    key: PRNGKey,
    model: Any,
    prompts: Int[Array, "b p"],
    lengths: Int[Array, " b"],
    temperature: Any,
    max_tokens: int,
) -> tuple[Int[Array, "b t"], Int[Array, " b"]]:
    """Draw one continuation of each prompt until the end token.

    Args:
        key: random key.
        model: a ``LanguageModel``.
        prompts: tokens padded on the right.
        lengths: of the prompts.
        temperature: 0 takes the likeliest token.
        max_tokens: most tokens of a continuation.

    Returns:
        Tokens, zeros behind the end, and how many.
    """
    num = prompts.shape[0]
    hidden, prompt = jax.vmap(model.prefill)(prompts, lengths)
    cache = jax.vmap(lambda _: model.init_cache(1, max_tokens))(jnp.arange(num))
    step_fn = jax.vmap(lambda *args: decode(model, *args))

    def body(loop: tuple) -> tuple:
        i, logits, cache, tokens, length, active = loop
        noise = jax.random.gumbel(jax.random.fold_in(key, i), logits.shape, logits.dtype)
        token = jnp.argmax(logits + jnp.asarray(temperature, logits.dtype) * noise, axis=-1).astype(jnp.int32)
        token = jnp.where(active, token, encoding.PAD)
        tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, None], i, axis=1)
        length = length + active
        logits, cache = step_fn(prompt, cache, token[:, None], jnp.full((num, 1), i, jnp.int32))
        return i + 1, logits[:, 0], cache, tokens, length, active & (token != encoding.END)

    tokens, length = jnp.zeros((num, max_tokens), jnp.int32), jnp.zeros(num, jnp.int32)
    start = (jnp.int32(0), model.head(hidden), cache, tokens, length, jnp.ones(num, bool))
    last = lax.while_loop(lambda loop: jnp.any(loop[5]) & (loop[0] < max_tokens), body, start)
    return last[3], last[4]


def rollouts(
    key: PRNGKey, model: Any, problems: Problems, temperature: Any = 1.0, batch: int = 256
) -> Rollouts:
    """Draw one solution of each problem and let the checker judge it.

    Args:
        key: random key.
        model: a ``LanguageModel`` over the tokens of ``encoding``.
        problems: B of them.
        temperature: 0 takes the likeliest token.
        batch: problems at a time, to bound memory.
    """
    prompts, lengths = encoding.prompts(problems)
    room = encoding.solutions(problems)[0].shape[1]
    parts, batch = [], min(batch, len(lengths))
    for i in range(0, len(lengths), batch):
        rows = np.minimum(np.arange(i, i + batch), len(lengths) - 1)  # one shape for all, one program
        asked = jnp.asarray(prompts[rows]), jnp.asarray(lengths[rows], jnp.int32)
        found = sample(jax.random.fold_in(key, i), model, *asked, temperature, room)
        parts.append([np.asarray(leaf)[: len(lengths) - i] for leaf in found])
    tokens, length = (np.concatenate(leaf) for leaf in zip(*parts, strict=True))
    right = encoding.right_so_far(problems, tokens, length)
    truth = np.array([results[-1] for results in encoding.values(problems)])
    return Rollouts(tokens, length, right, encoding.answers(tokens, length) == truth)


def accuracy(model: Any, problems: Problems, batch: int = 256) -> Float[np.ndarray, "B"]:
    """Whether the greedy solution of each problem is right in every step and in its end, as 0 or 1."""
    found = rollouts(jax.random.key(0), model, problems, temperature=0.0, batch=batch)
    last = np.take_along_axis(found.right, found.length[:, None] - 1, axis=1)[:, 0]
    ended = np.take_along_axis(found.tokens, found.length[:, None] - 1, axis=1)[:, 0] == encoding.END
    return (last & ended).astype(float)
