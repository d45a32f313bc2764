r"""What a language model is: pure functions of its weights, a prompt, and the private suffixes of N particles.

.. math:: p(x_{1:T} \mid c) = \prod_t p(x_t \mid c, x_{<t})

The prompt c is computed once (``prefill``) and shared by all particles; what a particle adds stands in a cache that is
an explicit argument and can be forked by ancestors. Every function is written for one prompt; several prompts are a
``vmap`` with the weights unbatched. Weights are leaves of the model, so they are arguments of what is compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from probinfer.core.types import Array, ArrayTree, Float, Int, Shaped

__all__ = ["Context", "LanguageModel", "bucket", "decode", "log_softmax", "pad"]


@runtime_checkable
class LanguageModel(Protocol):
    """The functions that particles need; an implementation is a pytree with its weights as leaves."""

    @property
    def vocab_size(self) -> int:
        """V, the number of logits."""
        ...

    @property
    def max_context(self) -> int:
        """Most tokens of a prompt and its continuation together."""
        ...

    def prefill(self, tokens: Array, length: Array) -> tuple[Array, ArrayTree]:
        """Read a prompt (S,), padded on the right, of which ``length`` tokens are real.

        Returns:
            The hidden state (H,) at the last real token, and what the particles share of the prompt.
        """
        ...

    def init_cache(self, num: int, max_len: int) -> ArrayTree:
        """Return empty private suffixes of ``num`` particles, ``max_len`` tokens each."""
        ...

    def extend(
        self, prompt: ArrayTree, cache: ArrayTree, tokens: Array, start: Array
    ) -> tuple[Array, ArrayTree]:
        """Append tokens (N, S) to the suffixes, in row n at the positions start[n], start[n] + 1, ...

        Whatever stands behind them is never read before it is written anew; positions from ``max_len`` on are dropped.

        Returns:
            Hidden states (N, S, H), and the cache.
        """
        ...

    def head(self, hidden: Array) -> Array:
        """Logits (..., V) of the token that follows a hidden state (..., H), at least float32."""
        ...

    def gather(self, cache: ArrayTree, ancestors: Array) -> ArrayTree:
        """Fork: row j of the result is row ``ancestors[j]``; there may be more or fewer of them."""
        ...

    def cache_bytes(self, num: int, max_len: int) -> int:
        """Bytes of ``init_cache(num, max_len)``."""
        ...

    def prompt_bytes(self, length: int) -> int:
        """Bytes of what ``prefill`` keeps of a prompt padded to ``length``."""
        ...


class Context(NamedTuple):
    """A prompt as scores and potentials see it.

    Attributes:
        tokens: (S,), padded on the right with zeros.
        length: (), how many are real.
    """

    tokens: Array
    length: Array


def decode(
    model: LanguageModel,
    prompt: ArrayTree,
    cache: ArrayTree,
    tokens: Int[Array, " n"],
    start: Int[Array, " n"],
) -> tuple[Float[Array, "n v"], ArrayTree]:
    """Append one token to every particle and return the logits of the next.

    Args:
        model: the language model.
        prompt: of its ``prefill``.
        cache: of N particles.
        tokens: one a particle.
        start: how many tokens each particle has before it.
    """
    hidden, cache = model.extend(prompt, cache, tokens[:, None], start)
    return model.head(hidden[:, 0]), cache


def log_softmax(logits: Float[Array, "... v"]) -> Float[Array, "... v"]:
    r"""Log probabilities :math:`l - \log\sum e^l` in at least float32; minus infinity is a legal logit.

    A row of nothing but minus infinity stays as it is: there is no token to draw.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    largest = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - jnp.where(jnp.isfinite(largest), largest, jnp.zeros_like(largest))
    total = jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True)
    return shifted - jnp.where(total == 0, jnp.zeros_like(total), jnp.log(total))


def bucket(length: int, least: int = 16) -> int:
    """The power of two, at least ``least``, that holds ``length`` tokens: few shapes, few compilations."""
    return max(least, 1 << max(length - 1, 0).bit_length())


def pad(tokens: Any, size: int) -> Shaped[Array, " s"]:
    """Tokens as int32, padded on the right with zeros to ``size``.

    Raises:
        ValueError: there are more than ``size``.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.shape[0] > size:
        raise ValueError(f"{tokens.shape[0]} tokens do not fit into {size}")
    return jnp.pad(tokens, (0, size - tokens.shape[0]))
