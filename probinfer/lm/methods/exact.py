"""Every text there is: exact evidence and posterior of small vocabularies and short texts, the oracle of the others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.status import Status
from probinfer.core.types import Array, PRNGKey, field, pytree
from probinfer.lm.generation.steps import every
from probinfer.lm.generation.texts import Record
from probinfer.lm.generation.token_model import TokenModel, empty, log_target
from probinfer.lm.methods.base import Draws, check_count, check_step, log_scores
from probinfer.numerics import weights

__all__ = ["Exact"]


@pytree
class Exact:
    """Enumeration: all token sequences up to ``max_tokens``, each with its exact weight.

    Attributes:
        step: as for ``ParticleFilter``; static.
        most: refuse to enumerate more sequences than this; static.
    """

    step: Any = field(static=True, default_factory=lambda: every(1))
    most: int = field(static=True, default=200_000)

    def __post_init__(self):
        check_count(self, "most")
        object.__setattr__(self, "step", check_step(self.step))

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> Draws:
        """Enumerate; the key is not used."""
        tokens, length = _sequences(model.setting.network.vocab_size, model.max_tokens, self.most)
        records = _cut(model, jnp.asarray(tokens), jnp.asarray(length))
        num = tokens.shape[0]
        log_weights, after = log_target(model, empty(model, num), records, jnp.int32(0))
        dead = jnp.all(log_weights == -jnp.inf)
        status = jnp.where(dead, int(Status.DEGENERATE_WEIGHTS), int(Status.OK)).astype(jnp.int32)
        return Draws(
            jnp.asarray(tokens),
            jnp.asarray(length),
            after.text.ended,
            log_weights,
            after.log_prior,
            after.log_potential,
            log_scores(model, after),
            jax.nn.logsumexp(log_weights),
            jnp.full(model.num_steps, weights.ess(log_weights)),
            None,
            None,
            status,
            jnp.max(jnp.sum(records.length > 0, axis=0)).astype(jnp.int32),
            after.ledger,
        )

    words = "all texts of {target}, enumerated"

    @property
    def num_rows(self) -> int:
        """At most."""
        return 1


def _sequences(vocab: int, most_tokens: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """All sequences of 1 ... M tokens, padded, with their lengths.

    Raises:
        ValueError: there are too many.
    """
    count = sum(vocab**length for length in range(1, most_tokens + 1))
    if count > most:
        raise ValueError(
            f"a vocabulary of {vocab} and max_tokens={most_tokens} make {count} texts, more than most={most}: "
            f"lower max_tokens, or sample by lm.ParticleFilter"
        )
    tokens, lengths = [], []
    for length in range(1, most_tokens + 1):
        grid = np.indices((vocab,) * length).reshape(length, -1).T
        tokens.append(np.pad(grid, ((0, 0), (0, most_tokens - length))))
        lengths.append(np.full(len(grid), length))
    return np.concatenate(tokens).astype(np.int32), np.concatenate(lengths).astype(np.int32)


def _cut(model: TokenModel, tokens: Array, length: Array) -> Record:
    """Cut sequences into steps (T, N, K); what does not fit into T steps makes the last one too long for the rule."""
    rule, num = model.setting.rules.step, tokens.shape[0]
    begin = jnp.zeros(num, jnp.int32)
    first = (
        begin
        if rule.automaton is None
        else jnp.broadcast_to(rule.automaton.start().astype(jnp.int32), (num,))
    )

    def walk(carry: tuple, token: Array) -> tuple:
        step, inside, state = carry
        place = (step, inside)
        over = inside + 1 >= rule.size
        if rule.automaton is not None:
            state = rule.automaton.step(state, token).astype(jnp.int32)
            over |= rule.automaton.hit(state)
        following = (
            jnp.where(over, step + 1, step),
            jnp.where(over, 0, inside + 1),
            jnp.where(over, first, state),
        )
        return following, place

    places: Any = jax.lax.scan(walk, (begin, begin, first), tokens.T)[1]
    steps, insides = places
    here = jnp.arange(tokens.shape[1])[:, None] < length
    steps = jnp.where(here, steps, model.num_steps)
    rows = jnp.broadcast_to(jnp.arange(num), steps.shape)
    cut = (
        jnp.zeros((model.num_steps, num, rule.size), jnp.int32)
        .at[steps, rows, insides]
        .set(tokens.T, mode="drop")
    )
    lengths = jnp.zeros((model.num_steps, num), jnp.int32).at[steps, rows].add(1, mode="drop")
    # a sequence that needs more steps than there are is no text: its first step is made impossible
    fits = jnp.sum(lengths, axis=0) == length
    return Record(cut, jnp.where(fits, lengths, rule.size + 1))
