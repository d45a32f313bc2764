"""Training of the bundled language model: next-token prediction on correct solutions, stopped before it is perfect.

Accuracy rises steeply once the model has learned the three operations, so the checkpoint is chosen by the greedy
accuracy on validation problems, not by the number of steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from probinfer.app.reasoner_training.optimizer import (
    TrainingPlan,
    TrainingTrace,
    json_settings,
    minimize_loss,
)
from probinfer.app.reasoner_training.sampled_solutions import accuracy
from probinfer.core.types import Array
from probinfer.lm.models.transformer import Config, Transformer
from probinfer.lm.reasoner import encoding
from probinfer.lm.reasoner.task import draw
from probinfer.running.checkpoint import Checkpoint

__all__ = ["MAX_CONTEXT", "LanguageModelSettings", "solution_loss", "train"]

MAX_CONTEXT = 128
_PLAN = TrainingPlan(num_iterations=500, learning_rate=2e-3, evaluate_from=120, evaluate_every=5, target=0.36)


@dataclasses.dataclass(frozen=True)
class LanguageModelSettings:
    """All settings that determine the weights of the language model.

    Args:
        seed: seed of the initial weights and of the problems.
        layers: number of blocks.
        width: width of the residual stream.
        heads: number of query heads.
        kv_heads: number of key and value heads.
        feed_forward: width of the gated layer.
        steps: minimum and maximum number of steps of a problem.
        batch: new problems for each training step.
        num_validation: number of validation problems, which choose the checkpoint.
        plan: the training plan; its target is the accuracy at which training stops.
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
    plan: TrainingPlan = _PLAN

    def config(self) -> Config:
        """Return the configuration of the transformer: a Qwen2 architecture, with the head tied to the embedding."""
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
    settings: LanguageModelSettings,
    *,
    checkpoint: Checkpoint | None = None,
    progress: bool | str | None = None,
) -> tuple[Transformer, TrainingTrace]:
    """Train the language model.

    Args:
        settings: architecture, data and training plan.
        checkpoint: where to store the state; an interrupted run resumes from there, bit for bit.
        progress: as in ``probinfer.progress``.

    Returns:
        The model at the first evaluation that reaches the target (or after the last step), and the trace.
    """
    model = Transformer.random(jax.random.key(settings.seed), settings.config())
    validation = draw((settings.seed, 1), settings.num_validation, settings.steps, "validation")
    return minimize_loss(
        solution_loss,
        model,
        lambda i: _batch(settings, i),
        settings.plan,
        about={"what": "language model of the reasoner", **json_settings(settings)},
        score_fn=lambda model: float(accuracy(model, validation).mean()),
        checkpoint=checkpoint,
        progress=progress,
    )


def _batch(settings: LanguageModelSettings, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of prompt and solution, and which tokens belong to the solution."""
    problems = draw((settings.seed, 0, i), settings.batch, settings.steps, "train")
    return encoding.join(*encoding.prompts(problems), *encoding.solutions(problems))


def solution_loss(model: Any, batch: tuple[Array, Array]) -> Array:
    """Mean cross entropy of the tokens of the solutions.

    Args:
        model: a model with ``forward`` and ``head``.
        batch: rows of prompt and solution ``(B, L)``, and which tokens belong to the solution ``(B, L)``.
    """
    tokens, in_solution = batch
    logits = model.head(model.forward(tokens[:, :-1]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    weights = in_solution[:, 1:].astype(losses.dtype)
    return jnp.sum(losses * weights) / jnp.sum(weights)
