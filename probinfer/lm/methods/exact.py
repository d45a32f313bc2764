"""Enumeration of all texts: exact evidence and posterior for small vocabularies and short texts, for tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.status import Status
from probinfer.core.types import Array, PRNGKey, field, pytree
from probinfer.lm.generation.step_rules import every
from probinfer.lm.generation.stepping import advance_detector, init_detector
from probinfer.lm.generation.texts import Record
from probinfer.lm.generation.token_model import TokenModel, init_particles, log_target
from probinfer.lm.methods.base import WeightedTexts, as_step_rule, check_count, log_scores
from probinfer.numerics import weights

__all__ = ["Exact"]


@pytree
class Exact:
    """Enumeration: all token sequences up to ``max_tokens``, each with its exact weight.

    Attributes:
        step: as for ``ParticleFilter``; static.
        max_texts: refuse to enumerate more sequences than this; static.
    """

    step: Any = field(static=True, default_factory=lambda: every(1))
    max_texts: int = field(static=True, default=200_000)

    def __post_init__(self):
        check_count(self, "max_texts")
        object.__setattr__(self, "step", as_step_rule(self.step))

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> WeightedTexts:
        """Enumerate the texts; the key is not used."""
        tokens, length = _all_sequences(model.setup.network.vocab_size, model.max_tokens, self.max_texts)
        records = _cut_into_steps(model, jnp.asarray(tokens), jnp.asarray(length))
        start = init_particles(model, tokens.shape[0])
        log_weights, after = log_target(model, start, records, jnp.int32(0))
        dead = jnp.all(log_weights == -jnp.inf)
        return WeightedTexts(
            tokens=jnp.asarray(tokens),
            length=jnp.asarray(length),
            ended=after.text.ended,
            log_weights=log_weights,
            log_prior=after.log_prior,
            log_potential=after.log_potential,
            log_score=log_scores(model, after),
            log_evidence=jax.nn.logsumexp(log_weights),
            ess=jnp.full(model.num_steps, weights.ess(log_weights)),
            ancestors=None,
            step_lengths=None,
            status=jnp.where(dead, int(Status.DEGENERATE_WEIGHTS), int(Status.OK)).astype(jnp.int32),
            num_steps=jnp.max(jnp.sum(records.length > 0, axis=0)).astype(jnp.int32),
            ledger=after.ledger,
        )

    description = "all texts of {target}, enumerated"

    @property
    def num_rows(self) -> int:
        """One: the limit of an enumeration is ``max_texts``."""
        return 1


def _all_sequences(vocab_size: int, max_tokens: int, max_texts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all sequences of 1 ... L tokens, padded to (M, L), and their lengths (M,).

    Raises:
        ValueError: there are too many.
    """
    count = sum(vocab_size**length for length in range(1, max_tokens + 1))
    if count > max_texts:
        raise ValueError(
            f"a vocabulary of {vocab_size} tokens and max_tokens={max_tokens} give {count} texts, more than "
            f"max_texts={max_texts}: lower max_tokens, or sample by lm.ParticleFilter"
        )
    tokens, lengths = [], []
    for length in range(1, max_tokens + 1):
        grid = np.indices((vocab_size,) * length).reshape(length, -1).T
        tokens.append(np.pad(grid, ((0, 0), (0, max_tokens - length))))
        lengths.append(np.full(len(grid), length))
    return np.concatenate(tokens).astype(np.int32), np.concatenate(lengths).astype(np.int32)


def _cut_into_steps(model: TokenModel, tokens: Array, length: Array) -> Record:
    """Cut N sequences into steps: tokens (T, N, K) and lengths (T, N)."""
    num, size = tokens.shape[0], model.setup.rules.step.size
    zeros, initial = jnp.zeros(num, jnp.int32), init_detector(model.setup, num)

    def locate(carry: tuple, token: Array) -> tuple:
        """Return the step of a token and its position in the step."""
        step, position, state = carry
        state, ends = advance_detector(model.setup, state, token, position + 1)
        following = (
            jnp.where(ends, step + 1, step),
            jnp.where(ends, 0, position + 1),
            jnp.where(ends, initial, state),
        )
        return following, (step, position)

    located: Any = jax.lax.scan(locate, (zeros, zeros, initial), tokens.T)[1]
    steps, positions = located
    is_token = jnp.arange(tokens.shape[1])[:, None] < length
    steps = jnp.where(is_token, steps, model.num_steps)  # padding is written to a step that is dropped
    rows = jnp.broadcast_to(jnp.arange(num), steps.shape)
    step_tokens = jnp.zeros((model.num_steps, num, size), jnp.int32)
    step_tokens = step_tokens.at[steps, rows, positions].set(tokens.T, mode="drop")
    lengths = jnp.zeros((model.num_steps, num), jnp.int32).at[steps, rows].add(1, mode="drop")
    # A sequence that needs more steps than there are is not a text: its first step gets an impossible length.
    fits = jnp.sum(lengths, axis=0) == length
    return Record(step_tokens, jnp.where(fits, lengths, size + 1))
