r"""How tokens are drawn: the distribution of the model, tempered and truncated, and one draw for every particle.

.. math:: q(v) \propto p(v)^{1/\tau}\,1[v \text{ among the likeliest}]
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.errors import shortened
from probinfer.core.types import Array, Float, Int, PRNGKey, field, pytree, strong_array
from probinfer.lm.arguments import as_count, concrete_number
from probinfer.lm.models.base import log_softmax

__all__ = ["Proposal", "as_proposal", "draw"]


@pytree
class Proposal:
    r"""The distribution that tokens are drawn from.

    By default the proposal *is* the prior: a method then samples the tempered, truncated model times the reward, as the
    papers of this field do. ``correct=True`` keeps the model itself as the prior and weighs every token by p / q.

    Attributes:
        temperature: tau > 0; 0 means top_k=1, the likeliest token.
        top_k: keep the k likeliest tokens, the first of equal ones; None: all; static.
        top_p: keep the smallest set of likeliest tokens with at least this probability; None: all.
        correct: weigh tokens so that the prior is the model at temperature one; static.

    Raises:
        TypeError: a setting is not a number; a traced temperature is not checked, and must not be zero.
        ValueError: a setting is out of range, or a truncated proposal is to be corrected.

    References:
        Holtzman et al. (2020), top-p.
    """

    temperature: Any = 1.0
    top_k: Any = field(static=True, default=None)
    top_p: Any = None
    correct: bool = field(static=True, default=False)

    def __post_init__(self):
        tau = concrete_number("temperature", self.temperature)
        top_p = None if self.top_p is None else concrete_number("top_p", self.top_p)
        top_k = None if self.top_k is None else as_count("top_k (tokens to keep)", self.top_k)
        if tau is not None and not 0 <= tau < float("inf"):
            raise ValueError(
                f"temperature must be finite and not negative, got {tau:g}; 1 is the model itself"
            )
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p is a probability, above 0 and at most 1; got {top_p:g}")
        if self.correct and (top_k is not None or self.top_p is not None or tau == 0):
            raise ValueError(
                "correct=True needs a proposal that can draw every token: top_k, top_p and temperature 0 cannot. "
                "Leave them out, or use the truncated distribution as the prior (correct=False)"
            )
        object.__setattr__(self, "temperature", strong_array(1.0 if tau == 0 else self.temperature))
        object.__setattr__(self, "top_k", 1 if tau == 0 else top_k)
        object.__setattr__(self, "top_p", strong_array(self.top_p))

    def log_probs(self, logits: Float[Array, "n v"]) -> Float[Array, "n v"]:
        """Return the normalized log probabilities of the proposal.

        Args:
            logits: logits of the model.
        """
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        tempered = logits / self.temperature.astype(logits.dtype)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            tempered = jnp.where(_largest(tempered, self.top_k), tempered, -jnp.inf)
        log_probs = log_softmax(tempered)
        return log_probs if self.top_p is None else log_softmax(_nucleus(log_probs, self.top_p))

    def log_prior(self, logits: Float[Array, "n v"], log_probs: Float[Array, "n v"]) -> Float[Array, "n v"]:
        """Return log probabilities of the prior: those of the proposal, or of the model if draws are corrected."""
        return log_softmax(logits) if self.correct else log_probs

    @property
    def description(self) -> str:
        """The prior in words."""
        tau = float(self.temperature)
        if self.correct:
            return "the model"
        if self.top_k == 1:
            return "the likeliest token of the model, always"
        parts = [] if tau == 1 else [f"temperature {tau:g}"]
        parts += [] if self.top_k is None else [f"top-k {self.top_k}"]
        parts += [] if self.top_p is None else [f"top-p {float(self.top_p):g}"]
        return "the model" + (f" at {', '.join(parts)}" if parts else "")


def as_proposal(value: Any) -> Proposal:
    """Return a proposal; None means the model itself.

    Raises:
        TypeError: it is something else.
    """
    if value is None:
        return Proposal()
    if not isinstance(value, Proposal):
        example = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.7
        raise TypeError(
            f"proposal must be lm.Proposal(temperature={example:g}) or the like, got {shortened(value)}"
        )
    return value


def _largest(logits: Array, k: int) -> Array:
    """Whether a logit is among the k largest of its row; of equal ones the first count."""
    rows = jnp.arange(logits.shape[0])[:, None]
    chosen = jnp.argmax(logits, axis=-1)[:, None] if k == 1 else jax.lax.top_k(logits, k)[1]
    return jnp.zeros(logits.shape, bool).at[rows, chosen].set(True)


def _nucleus(log_probs: Array, top_p: Array) -> Array:
    """Set log probabilities to minus infinity where the likelier tokens have a total of ``top_p`` already."""
    order = jnp.argsort(-log_probs, axis=-1)
    probs = jnp.exp(jnp.take_along_axis(log_probs, order, axis=-1))
    before = jnp.cumsum(probs, axis=-1) - probs
    inside = jnp.take_along_axis(before < top_p.astype(probs.dtype), jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(inside, log_probs, -jnp.inf)


def draw(key: PRNGKey, log_probs: Float[Array, "n v"]) -> Int[Array, " n"]:
    """Draw one token for every particle by inversion: first a block of tokens, then a token of the block.

    Each particle needs two uniforms, whatever V; a token of probability zero is never drawn. A row without mass gives
    0.

    Args:
        key: random key.
        log_probs: normalized log probabilities.
    """
    num, vocab_size = log_probs.shape
    # Blocks of about sqrt(V) tokens: two short cumulative sums instead of one over the vocabulary.
    width = max(1, round(vocab_size**0.5)) if vocab_size > 256 else vocab_size
    num_blocks = -(-vocab_size // width)
    padding = ((0, 0), (0, num_blocks * width - vocab_size))
    probs = jnp.pad(jnp.exp(log_probs), padding).reshape(num, num_blocks, width)
    uniforms = jax.random.uniform(key, (2, num), probs.dtype)
    block = _invert(uniforms[0], jnp.sum(probs, axis=2)) if num_blocks > 1 else jnp.zeros(num, jnp.int32)
    inside = _invert(uniforms[1], jnp.take_along_axis(probs, block[:, None, None], axis=1)[:, 0])
    return block * width + inside


def _invert(uniform: Array, masses: Array) -> Array:
    """Return the first index of positive mass whose cumulative sum exceeds the uniform share of the total."""
    sums = jnp.cumsum(masses, axis=1)
    # The rounding of a parallel cumulative sum may raise it at a zero mass, which must not be chosen.
    reached = (sums > uniform[:, None] * sums[:, -1:]) & (masses > 0)
    chosen = jnp.where(jnp.any(reached, axis=1), jnp.argmax(reached, axis=1), jnp.argmax(masses, axis=1))
    return chosen.astype(jnp.int32)
