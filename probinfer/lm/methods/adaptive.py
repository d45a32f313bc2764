"""As many texts as the vote needs: batches of a method, until it is decided which answer leads."""

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
from probinfer.lm.methods.base import WeightedTexts, check_count, check_method, has_evidence
from probinfer.running import interrupts

__all__ = ["Adaptive", "run_adaptively"]


@pytree
class Adaptive:
    """Repeat a method with new keys until the vote is decided.

    Batches of a method that estimates the evidence are pooled in proportion to it, so the pool stays properly weighted;
    batches of other methods count the same.

    Attributes:
        method: the method that is repeated; static.
        confidence: stop when the present leader stays the leader with this probability; static.
        max_rounds: maximum number of batches; static.

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
            raise ValueError(f"confidence must be above 0.5 and below 1, got {self.confidence}")

    @property
    def step(self) -> Any:
        """The step rule of the method."""
        return self.method.step

    @property
    def num_rows(self) -> int:
        """Rows of one batch."""
        return self.method.num_rows

    @property
    def has_evidence(self) -> bool:
        """Whether the method of the batches estimates the evidence."""
        return has_evidence(self.method)

    @property
    def description(self) -> str:
        """What the weighted texts are."""
        return f"{self.method.description}, in batches until the vote was decided"


def run_adaptively(
    key: Any,
    model: TokenModel,
    adaptive: Adaptive,
    read: Callable[[Any], str | None],
    run: Any,
    bar: Any,
    stop: interrupts.Interruption,
) -> tuple[WeightedTexts, int]:
    """Repeat a method until the vote is decided.

    Args:
        key: random key.
        model: the token model.
        adaptive: the method, and when to stop.
        read: tokens -> answer.
        run: ``(key, model, method) -> WeightedTexts``, compiled.
        bar: a ``progress.Task``.
        stop: whether Ctrl-C was pressed.

    Returns:
        The pooled texts of all batches, and the number of batches; after Ctrl-C, of the batches so far.
    """
    rounds: list[WeightedTexts] = []
    answers: list[str | None] = []
    for i in range(adaptive.max_rounds):
        draws = interrupts.wait(run(jax.random.fold_in(key, i), model, adaptive.method))
        rounds.append(draws)
        tokens, length = np.asarray(draws.tokens), np.asarray(draws.length)
        answers += [read(row[:size]) for row, size in zip(tokens, length, strict=True)]
        bar.update(i + 1)
        if selectors.decided(answers, _log_weights(rounds), confidence=adaptive.confidence).stop:
            break
        if stop.requested and i + 1 < adaptive.max_rounds:
            pooled = _pool(rounds)
            status = jnp.maximum(pooled.status, jnp.int32(Status.INTERRUPTED))
            return pooled._replace(status=status), len(rounds)
    return _pool(rounds), len(rounds)


def _log_weights(rounds: list[WeightedTexts]) -> np.ndarray:
    """Return log weights of all batches: within a batch they sum to its evidence, or to one if it estimates none."""
    parts = []
    for draws in rounds:
        log_weights = np.asarray(draws.log_weights, float)
        total = np.logaddexp.reduce(log_weights)
        log_evidence = float(draws.log_evidence)
        log_share = 0.0 if np.isnan(log_evidence) else log_evidence  # minus infinity if the whole batch died
        parts.append(log_weights - (total if np.isfinite(total) else 0.0) + log_share)
    return np.concatenate(parts)


def _pool(rounds: list[WeightedTexts]) -> WeightedTexts:
    last = rounds[-1]
    names = ("tokens", "length", "ended", "log_prior", "log_potential", "log_score")
    flat = {name: jnp.concatenate([getattr(draws, name) for draws in rounds]) for name in names}
    costs: Any = {name: sum(getattr(draws.ledger, name) for draws in rounds) for name in Ledger._fields}
    log_evidences = jnp.stack([draws.log_evidence for draws in rounds])
    return last._replace(
        **flat,
        log_weights=jnp.asarray(_log_weights(rounds)),
        log_evidence=jax.nn.logsumexp(log_evidences) - jnp.log(len(rounds)),
        ancestors=None,
        step_lengths=None,
        status=jnp.max(jnp.stack([draws.status for draws in rounds])),
        ledger=Ledger(**costs),
    )
