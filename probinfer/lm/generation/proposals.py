r"""How tokens are drawn: the law of the model, tempered and cut, and one draw from it for every particle.

.. math:: q(v) \propto p(v)^{1/\tau}\,1[v \text{ among the likeliest}]
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.errors import shortened
from probinfer.core.types import Array, Float, Int, PRNGKey, field, pytree, strong_array
from probinfer.lm.arguments import as_count, known_number
from probinfer.lm.models.base import log_softmax

__all__ = ["Proposal", "as_proposal", "draw"]


@pytree
class Proposal:
    r"""The law that tokens are drawn from.

    By default this law *is* the prior: what a method then samples is the tempered, cut model times the reward, as the
    papers of this field do. ``correct=True`` keeps the model itself as the prior and weighs every token by p / q.

    Attributes:
        temperature: tau > 0; 0 is top_k=1, the likeliest token.
        top_k: keep the k likeliest tokens, the first of equal ones; None: all; static.
        top_p: keep the smallest set of likeliest tokens with at least this probability; None: all.
        correct: weigh tokens so that the prior is the model at temperature one; static.

    Raises:
        TypeError: a setting is no number; a traced temperature is taken as it is, and must not be zero.
        ValueError: a setting is out of range, or a cut law is to be corrected.

    References:
        Holtzman et al. (2020), top-p.
    """

    temperature: Any = 1.0
    top_k: Any = field(static=True, default=None)
    top_p: Any = None
    correct: bool = field(static=True, default=False)

    def __post_init__(self):
        tau = known_number("temperature", self.temperature)
        share = None if self.top_p is None else known_number("top_p", self.top_p)
        most = None if self.top_k is None else as_count("top_k (tokens to keep)", self.top_k)
        if tau is not None and not 0 <= tau < float("inf"):
            raise ValueError(
                f"temperature must be finite and not negative, got {tau:g}; 1 is the model itself"
            )
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"top_p is a probability, above 0 and at most 1; got {share:g}")
        if self.correct and (most is not None or self.top_p is not None or tau == 0):
            raise ValueError(
                "correct=True needs a proposal that can draw every token: top_k, top_p and temperature 0 cannot. "
                "Leave them out, or take the cut law as the prior (correct=False)"
            )
        object.__setattr__(self, "temperature", strong_array(1.0 if tau == 0 else self.temperature))
        object.__setattr__(self, "top_k", 1 if tau == 0 else most)
        object.__setattr__(self, "top_p", strong_array(self.top_p))

    def log_law(self, logits: Float[Array, "n v"]) -> Float[Array, "n v"]:
        """Log probabilities of the proposal, normalised.

        Args:
            logits: of the model.
        """
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        tempered = logits / self.temperature.astype(logits.dtype)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            tempered = jnp.where(_largest(tempered, self.top_k), tempered, -jnp.inf)
        log_probs = log_softmax(tempered)
        return log_probs if self.top_p is None else log_softmax(_nucleus(log_probs, self.top_p))

    def log_prior(self, logits: Float[Array, "n v"], log_law: Float[Array, "n v"]) -> Float[Array, "n v"]:
        """Log probabilities of the prior: those of the law itself, or of the model where draws are corrected."""
        return log_softmax(logits) if self.correct else log_law

    @property
    def words(self) -> str:
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
    """A proposal; None: the model itself.

    Raises:
        TypeError: it is something else.
    """
    if value is None:
        return Proposal()
    if not isinstance(value, Proposal):
        what = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.7
        raise TypeError(
            f"proposal must be lm.Proposal(temperature={what:g}) or the like, got {shortened(value)}"
        )
    return value


def _largest(logits: Array, k: int) -> Array:
    """Whether a logit is among the k largest of its row; of equal ones the first count."""
    rows = jnp.arange(logits.shape[0])[:, None]
    chosen = jnp.argmax(logits, axis=-1)[:, None] if k == 1 else jax.lax.top_k(logits, k)[1]
    return jnp.zeros(logits.shape, bool).at[rows, chosen].set(True)


def _nucleus(log_probs: Array, share: Array) -> Array:
    """Minus infinity where the likelier tokens have the share already."""
    order = jnp.argsort(-log_probs, axis=-1)
    probs = jnp.exp(jnp.take_along_axis(log_probs, order, axis=-1))
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = jnp.take_along_axis(before < share.astype(probs.dtype), jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, log_probs, -jnp.inf)


def draw(key: PRNGKey, log_probs: Float[Array, "n v"]) -> Int[Array, " n"]:
    """Draw one token for every particle: inverse distribution functions, of blocks and then inside a block.

    Two uniforms a particle, whatever V; a token of probability zero is never drawn. A row without any mass gives 0.

    Args:
        key: random key.
        log_probs: normalised log probabilities.
    """
    num, vocab = log_probs.shape
    width = max(1, round(vocab**0.5)) if vocab > 256 else vocab
    blocks = -(-vocab // width)
    probs = jnp.pad(jnp.exp(log_probs), ((0, 0), (0, blocks * width - vocab))).reshape(num, blocks, width)
    uniforms = jax.random.uniform(key, (2, num), probs.dtype)
    block = _invert(uniforms[0], jnp.sum(probs, axis=2)) if blocks > 1 else jnp.zeros(num, jnp.int32)
    inside = _invert(uniforms[1], jnp.take_along_axis(probs, block[:, None, None], axis=1)[:, 0])
    return block * width + inside


def _invert(uniform: Array, masses: Array) -> Array:
    """The first index of positive mass whose cumulative sum exceeds the uniform share of the whole."""
    sums = jnp.cumsum(masses, axis=1)
    reached = (sums > uniform[:, None] * sums[:, -1:]) & (masses > 0)
    chosen = jnp.where(jnp.any(reached, axis=1), jnp.argmax(reached, axis=1), jnp.argmax(masses, axis=1))
    return chosen.astype(jnp.int32)
