r"""Rewards degraded by an adjustable amount, for studies of what methods do when the reward is weak.

.. math:: \ell'(x_{1:t}) = \ell(x_{1:t}) + \sigma\,\epsilon_t, \qquad
    \epsilon_t = \rho\,\epsilon_{t-1} + \sqrt{1-\rho^2}\,\xi(c, x_{1:t})

The noise is frozen: :math:`\xi` is a standard normal number computed from a hash of the prompt and the prefix, so the
same prefix always has the same score, as with a real reward model, so that a second evaluation gives no new
information. With ``persistence`` :math:`\rho > 0` a prefix passes a part of its error on to what follows, so that
errors do not cancel along a text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from scipy.special import ndtr

from probinfer.core.errors import shortened
from probinfer.core.types import Array, pytree, strong_array
from probinfer.lm.models.base import Context
from probinfer.lm.rewards.base import View
from probinfer.lm.rewards.meanings import Score

__all__ = ["Degraded", "DegradedState", "degrade", "noise_for_auc"]


class DegradedState(NamedTuple):
    """What a degraded score remembers.

    Attributes:
        inner: state of the score.
        code: (N, 2) hash of prompt and prefix.
        length: (N,) tokens hashed.
        noise: (N,) the last standard normal error.
    """

    inner: Any
    code: Array
    length: Array
    noise: Array


@pytree
class Degraded(Score):
    """A score with frozen noise; made by ``degrade``.

    Attributes:
        score: the score, on the scale of logits.
        noise: standard deviation sigma of the noise.
        persistence: rho.
        seed: of the hash, (2,) uint32.
    """

    score: Any
    noise: Any
    persistence: Any
    seed: Any

    @property
    def source(self) -> str:
        """The description of the source."""
        return f"{self.score.source} (with noise)"

    def init(self, context: Context, num: int) -> DegradedState:
        """Initialize the score, and hash the prompt."""
        inner = self.score.init(context, num)
        code = _code(self.seed[:, None] ^ jnp.uint32(0x5BD1E995), context.tokens, 0, context.length)
        zeros = jnp.zeros(num, self.noise.dtype)
        return DegradedState(inner, jnp.broadcast_to(code, (num, 2)), jnp.zeros(num, jnp.int32), zeros)

    def step(self, state: DegradedState, view: View) -> tuple[DegradedState, Array]:
        """Compute the score, and add the noise of the new prefix."""
        inner, value = self.score.step(state.inner, view)
        codes = jax.vmap(_code, in_axes=(None, 0, 0, 0))(
            self.seed[:, None], view.step_tokens, state.length, view.step_length
        )
        code, length = state.code + codes, state.length + view.step_length.astype(jnp.int32)
        fresh = _normal(code).astype(self.noise.dtype)
        noise = self.persistence * state.noise + jnp.sqrt(1 - self.persistence**2) * fresh
        noise = jnp.where(
            length == view.step_length, fresh, noise
        )  # the first step has the same law as the others
        noise = jnp.where(view.step_length > 0, noise, state.noise)
        value = value + (self.noise * noise).astype(value.dtype)
        return DegradedState(inner, code, length, noise), value

    def gather(self, state: DegradedState, ancestors: Array) -> DegradedState:
        """Copy the states of the ancestors."""
        inner = self.score.gather(state.inner, ancestors)
        return DegradedState(inner, *(leaf[ancestors] for leaf in state[1:]))


def degrade(score: Any, noise: Any, seed: int = 0, persistence: Any = 0.0) -> Degraded:
    """Add frozen noise to the logit of a score.

    Args:
        score: on the scale of logits.
        noise: standard deviation of the noise in logits; ``noise_for_auc`` finds the one for a wanted AUC.
        seed: another seed is another reward model of the same quality.
        persistence: correlation of the errors of successive steps, in [0, 1].

    Raises:
        TypeError: ``score`` is no score.
        ValueError: its scale is "log", the noise is negative, or the persistence is outside [0, 1].
    """
    if not isinstance(score, Score):
        raise TypeError(f"degrade takes a score, such as a RewardModel; got {shortened(score)}")
    if score.scale != "logit":
        raise ValueError(f"noise is added to logits, but this score is on the scale {score.scale!r}")
    if not float(noise) >= 0 or not np.isfinite(float(noise)):
        raise ValueError(f"noise must be a standard deviation >= 0, got {noise}")
    if not 0 <= float(persistence) <= 1:
        raise ValueError(f"persistence must be within [0, 1], got {persistence}")
    seed_words = np.random.SeedSequence(int(seed)).generate_state(2, np.uint32)
    return Degraded(score, strong_array(noise), strong_array(persistence), jnp.asarray(seed_words))


def noise_for_auc(logits: Shaped[np.ndarray, "n"], labels: Shaped[np.ndarray, "n"], auc: Any) -> float:
    r"""The noise at which the AUC is expected to be ``auc``.

    That is the mean of :math:`\Phi((\ell_i - \ell_j) / \sigma\sqrt2)` over right prefixes i and wrong ones j.

    Args:
        logits: scores of held-out prefixes.
        labels: which of them are right.
        auc: wanted, above one half.

    Returns:
        sigma; 0 where the score is no better than that already.

    Raises:
        ValueError: labels of one kind only, or an AUC outside (0.5, 1].
    """
    right, wrong = (np.asarray(logits, float)[np.asarray(labels, bool) == kind] for kind in (True, False))
    if not len(right) or not len(wrong):
        raise ValueError("the AUC needs right and wrong prefixes, but all labels are equal")
    if not 0.5 < auc <= 1:
        raise ValueError(f"auc must be within (0.5, 1], got {auc}")
    rng = np.random.default_rng(0)
    pairs = [rng.choice(side, min(len(side), 1000), replace=False) for side in (right, wrong)]
    gaps = pairs[0][:, None] - pairs[1]
    low, high = 0.0, 64.0 * (float(np.std(gaps)) + 1.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ndtr(gaps / (middle * np.sqrt(2))).mean() > auc else (low, middle)
    return high if np.mean((gaps > 0) + 0.5 * (gaps == 0)) > auc else 0.0


def _code(seed: Array, tokens: Array, start: Any, length: Any) -> Array:
    """Sum over tokens of a hash of (token, position), so that it does not matter how a text is cut into steps."""
    positions = jnp.arange(tokens.shape[0], dtype=jnp.uint32) + jnp.asarray(start, jnp.uint32)
    codes = _mix(
        _mix(seed + positions * jnp.uint32(0x9E3779B9)) + tokens.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
    )
    inside = jnp.arange(tokens.shape[0]) < length
    return jnp.sum(jnp.where(inside, codes, jnp.uint32(0)), axis=-1, dtype=jnp.uint32)


def _mix(code: Array) -> Array:
    """Apply the finalizer of MurmurHash3 (Appleby 2011), a bijection of 32 bits."""
    code = (code ^ (code >> 16)) * jnp.uint32(0x85EBCA6B)
    code = (code ^ (code >> 13)) * jnp.uint32(0xC2B2AE35)
    return code ^ (code >> 16)


def _normal(code: Array) -> Array:
    """Return standard normal numbers (N,) from the 23 highest bits of (N, 2) codes."""
    bits = _mix(_mix(code[:, 0]) ^ code[:, 1]) >> 9
    uniform = (bits.astype(jnp.float32) + 0.5) / 2**23
    return jax.scipy.special.ndtri(uniform)
