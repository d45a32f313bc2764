r"""The contract of a language model: pure functions of its weights, a prompt, and the private suffixes of N particles.

.. math:: p(x_{1:T} \mid c) = \prod_t p(x_t \mid c, x_{<t})

The prompt c is read once (``prefill``) and shared by all particles; the tokens that a particle adds are in a cache that
is an explicit argument and can be forked by ancestors. Every function is written for one prompt; several prompts are a
``vmap`` with the weights unbatched. Weights are leaves of the model, so they are arguments of compiled programs.
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
        """Maximum number of tokens of a prompt and its continuation together."""
        ...

    def prefill(self, tokens: Array, length: Array) -> tuple[Array, ArrayTree]:
        """Read a prompt (S,), padded on the right, of which ``length`` tokens are real.

        Returns:
            The hidden state (H,) at the last real token, and the state of the prompt that the particles share.
        """
        ...

    def init_cache(self, num: int, max_len: int) -> ArrayTree:
        """Return empty private suffixes of ``num`` particles, ``max_len`` tokens each."""
        ...

    def extend(
        self, prompt: ArrayTree, cache: ArrayTree, tokens: Array, start: Array
    ) -> tuple[Array, ArrayTree]:
        """Append tokens (N, S) to the suffixes, in row n at the positions start[n], start[n] + 1, ...

        What the cache holds behind them is never read before it is overwritten; positions from ``max_len`` on are
        dropped.

        Returns:
            Hidden states (N, S, H), and the cache.
        """
        ...

    def head(self, hidden: Array) -> Array:
        """Return logits (..., V) of the token that follows a hidden state (..., H), at least float32."""
        ...

    def gather(self, cache: ArrayTree, ancestors: Array) -> ArrayTree:
        """Fork: row j of the result is row ``ancestors[j]``; there may be more or fewer ancestors than rows."""
        ...

    def cache_bytes(self, num: int, max_len: int) -> int:
        """Return the bytes of ``init_cache(num, max_len)``."""
        ...

    def prompt_bytes(self, length: int) -> int:
        """Return the bytes that ``prefill`` keeps of a prompt padded to ``length``."""
        ...


class Context(NamedTuple):
    """A prompt as it is given to scores and potentials.

    Attributes:
        tokens: (S,) tokens, padded on the right with zeros.
        length: () number of tokens that are not padding.
    """

    tokens: Int[Array, " S"]
    length: Int[Array, ""]


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
        prompt: state of the prompt, from ``prefill``.
        cache: private suffixes of N particles.
        tokens: one token for each particle.
        start: number of tokens that each particle has before it.
    """
    hidden, cache = model.extend(prompt, cache, tokens[:, None], start)
    return model.head(hidden[:, 0]), cache


def log_softmax(logits: Float[Array, "... v"]) -> Float[Array, "... v"]:
    r"""Return log probabilities :math:`l - \log\sum e^l` in at least float32; minus infinity is a legal logit.

    A row of nothing but minus infinity stays as it is, while ``jax.nn.log_softmax`` would make it NaN.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    largest = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - jnp.where(jnp.isfinite(largest), largest, jnp.zeros_like(largest))
    total = jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True)
    return shifted - jnp.where(total == 0, jnp.zeros_like(total), jnp.log(total))


def bucket(length: int, min_size: int = 16) -> int:
    """Return a power of two, at least ``min_size``, that holds ``length`` tokens: few shapes, few compilations."""
    return max(min_size, 1 << max(length - 1, 0).bit_length())


def pad(tokens: Any, size: int) -> Shaped[Array, " s"]:
    """Return tokens as int32, padded on the right with zeros to ``size``.

    Raises:
        ValueError: there are more than ``size``.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.shape[0] > size:
        raise ValueError(f"{tokens.shape[0]} tokens do not fit into {size}")
    return jnp.pad(tokens, (0, size - tokens.shape[0]))
