"""Training of the bundled language model: next-token prediction on right solutions, stopped while it still errs.

Accuracy rises steeply once the tables of the three operations are learned, so the checkpoint is not chosen by the
number of steps but by the greedy accuracy on validation problems.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from probinfer.app.reasoner_training.optimizer import Plan, Trace, descend
from probinfer.app.reasoner_training.sampled_solutions import accuracy
from probinfer.core.types import Array
from probinfer.lm.models.transformer import Config, Transformer
from probinfer.lm.reasoner import encoding
from probinfer.lm.reasoner.task import draw
from probinfer.running.checkpoint import Checkpoint

__all__ = ["MAX_CONTEXT", "Settings", "solution_loss", "train"]

MAX_CONTEXT = 128
_PLAN = Plan(num_iterations=500, learning_rate=2e-3, evaluate_from=120, evaluate_every=5, target=0.36)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that the weights of the language model depend on.

    Args:
        seed: of the first weights and of the problems.
        layers: number of blocks.
        width: of the residual stream.
        heads: of queries.
        kv_heads: of keys and values.
        feed_forward: width of the gated layer.
        steps: fewest and most steps of a problem.
        batch: problems of a step of training, never seen twice but by chance.
        num_validation: problems that choose the checkpoint.
        plan: of the descent; its target is the accuracy at which training stops.
    """

    seed: int = 0
    layers: int = 2
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 768
    steps: tuple[int, int] = (3, 7)
    batch: int = 48
    num_validation: int = 300
    plan: Plan = _PLAN

    def config(self) -> Config:
        """The transformer: of the Qwen2 family, head tied to the embedding."""
        return Config(
            vocab_size=len(encoding.TOKENS),
            hidden_size=self.width,
            intermediate_size=self.feed_forward,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            max_context=MAX_CONTEXT,
            qkv_bias=True,
            tied=True,
        )


def train(
    settings: Settings, *, checkpoint: Checkpoint | None = None, progress: bool | str | None = None
) -> tuple[Transformer, Trace]:
    """Train the language model.

    Args:
        settings: what.
        checkpoint: where to keep the state; an interrupted run goes on from there, bit for bit.
        progress: the setting of ``probinfer.progress``.

    Returns:
        The model at the first evaluation that reached the target (or after the last step), and the trace.
    """
    model = Transformer.random(jax.random.key(settings.seed), settings.config())
    validation = draw((settings.seed, 1), settings.num_validation, settings.steps, "validation")
    return descend(
        solution_loss,
        model,
        lambda i: _batch(settings, i),
        settings.plan,
        about={"what": "language model of the reasoner", **_plain(settings)},
        score_fn=lambda model: float(accuracy(model, validation).mean()),
        checkpoint=checkpoint,
        progress=progress,
    )


def _batch(settings: Settings, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of prompt and solution, and which tokens are of the solution."""
    problems = draw((settings.seed, 0, i), settings.batch, settings.steps, "train")
    return encoding.join(*encoding.prompts(problems), *encoding.solutions(problems))


def solution_loss(model: Any, batch: tuple[Array, Array]) -> Array:
    """Mean cross entropy of the tokens of the solutions.

    Args:
        model: with ``forward`` and ``head``.
        batch: rows of prompt and solution, and which tokens are of the solution.
    """
    tokens, inside = batch
    logits = model.head(model.forward(tokens[:, :-1]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    counts = inside[:, 1:].astype(losses.dtype)
    return jnp.sum(losses * counts) / jnp.sum(counts)


def _plain(settings: Any) -> dict[str, Any]:
    """Settings as they are after a round trip through JSON."""
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(settings).items()}
    return {k: v for k, v in fields.items() if not isinstance(v, Plan)}
