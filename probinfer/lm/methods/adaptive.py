"""As many texts as the vote needs: batches of a method until the leading answer is decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.status import Status
from probinfer.core.types import field, pytree
from probinfer.lm.answers import selectors
from probinfer.lm.generation.token_model import Ledger, TokenModel
from probinfer.lm.methods.base import Draws, check_count, check_method, has_evidence
from probinfer.running import interrupts

__all__ = ["Adaptive", "run_adaptively"]


@pytree
class Adaptive:
    """Run a method again and again, with new keys, until the vote is decided.

    Batches of methods with an evidence are pooled in proportion to it, so the whole stays properly weighted; those of
    others count the same.

    Attributes:
        method: what is repeated; static.
        confidence: stop when the present leader stays the leader with this probability; static.
        max_rounds: most batches; static.

    References:
        Aggarwal et al. (2023), adaptive consistency.
    """

    method: Any = field(static=True)
    confidence: float = field(static=True, default=0.95)
    max_rounds: int = field(static=True, default=16)

    def __post_init__(self):
        check_method(self.method)
        check_count(self, "max_rounds")
        if not 0.5 < self.confidence < 1:
            raise ValueError(f"confidence is a probability above 0.5 and below 1, got {self.confidence}")

    @property
    def step(self) -> Any:
        """Of the method."""
        return self.method.step

    @property
    def num_rows(self) -> int:
        """Of one batch."""
        return self.method.num_rows

    @property
    def has_evidence(self) -> bool:
        """Whether the method of the batches estimates the evidence."""
        return has_evidence(self.method)

    @property
    def words(self) -> str:
        """In words."""
        return f"{self.method.words}, in batches until the vote was decided"


def run_adaptively(
    key: Any,
    model: TokenModel,
    adaptive: Adaptive,
    read: Callable[[Any], str | None],
    run: Any,
    line: Any,
    stop: interrupts.Interruption,
) -> tuple[Draws, int]:
    """Repeat until decided.

    Args:
        key: random key.
        model: the token model.
        adaptive: how.
        read: tokens -> answer.
        run: ``(key, model, method) -> Draws``, compiled.
        line: a ``progress.Task``.
        stop: whether Ctrl-C was pressed.

    Returns:
        All batches as one, and how many they were; after Ctrl-C those that there are.
    """
    rounds: list[Draws] = []
    answers: list[str | None] = []
    for i in range(adaptive.max_rounds):
        draws = interrupts.wait(run(jax.random.fold_in(key, i), model, adaptive.method))
        rounds.append(draws)
        tokens, length = np.asarray(draws.tokens), np.asarray(draws.length)
        answers += [read(row[:size]) for row, size in zip(tokens, length, strict=True)]
        line.update(i + 1)
        if selectors.decided(answers, _log_weights(rounds), confidence=adaptive.confidence).stop:
            break
        if stop.requested and i + 1 < adaptive.max_rounds:
            pooled = _pooled(rounds)
            worst = jnp.maximum(pooled.status, jnp.int32(Status.INTERRUPTED))
            return pooled._replace(status=worst), len(rounds)
    return _pooled(rounds), len(rounds)


def _log_weights(rounds: list[Draws]) -> np.ndarray:
    """Weights of all batches together: within a batch they sum to its evidence, where there is one."""
    parts = []
    for draws in rounds:
        log_weights = np.asarray(draws.log_weights, float)
        total = np.logaddexp.reduce(log_weights)
        evidence = float(draws.log_evidence)
        share = 0.0 if np.isnan(evidence) else evidence  # minus infinity: all of the batch died
        parts.append(log_weights - (total if np.isfinite(total) else 0.0) + share)
    return np.concatenate(parts)


def _pooled(rounds: list[Draws]) -> Draws:
    last = rounds[-1]
    names = ("tokens", "length", "ended", "log_prior", "log_potential", "log_score")
    flat = {name: jnp.concatenate([getattr(draws, name) for draws in rounds]) for name in names}
    costs = [sum(getattr(draws.ledger, name) for draws in rounds) for name in Ledger._fields]
    evidences = jnp.stack([draws.log_evidence for draws in rounds])
    return last._replace(
        **flat,
        log_weights=jnp.asarray(_log_weights(rounds)),
        log_evidence=jax.nn.logsumexp(evidences) - jnp.log(len(rounds)),
        ancestors=None,
        step_lengths=None,
        status=jnp.max(jnp.stack([draws.status for draws in rounds])),
        ledger=Ledger(*costs),
    )
