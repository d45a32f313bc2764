"""Training of the process reward model: it predicts which prefixes of sampled solutions the checker calls correct.

The trunk is initialized with the language model; a layer and a value head are added on top. All are trained on rollouts
at temperature 1, while the trunk is also trained on correct solutions. The label of a token is whether the solution is
correct up to it, so that the model can score steps of any kind; the last tokens of steps have the largest weight. The
model is imperfect because it is small and trained on little data, not because of noise: training stops when its AUC on
validation problems reaches the target.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int, Shaped

from probinfer.app.reasoner_training.language_model import solution_loss
from probinfer.app.reasoner_training.optimizer import (
    TrainingPlan,
    TrainingTrace,
    json_settings,
    minimize_loss,
)
from probinfer.app.reasoner_training.sampled_solutions import Rollouts, draw_rollouts
from probinfer.core.types import Array, PRNGKey
from probinfer.lm.models.transformer import Transformer
from probinfer.lm.reasoner import encoding
from probinfer.lm.reasoner.task import Problems, draw
from probinfer.lm.rewards.model import RewardModel
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint

__all__ = [
    "Examples",
    "RewardModelSettings",
    "add_layers",
    "auc",
    "make_examples",
    "score_rollouts",
    "train_reward",
]

_PLAN = TrainingPlan(num_iterations=800, learning_rate=2e-3, evaluate_from=60, evaluate_every=10, target=0.94)


@dataclasses.dataclass(frozen=True)
class RewardModelSettings:
    """All settings that determine the weights of the reward model, apart from the language model.

    Args:
        seed: seed of the problems, the rollouts and the batches.
        num_problems: number of problems, with one rollout each.
        steps: minimum and maximum number of steps of a problem.
        batch: rollouts for each training step.
        inner: weight of a token inside a step; the last token of a step has weight 1.
        imitation: weight of the cross entropy of correct solutions, of half as many problems as there are rollouts.
        layers: number of layers on top of those of the language model. They can compare the text with the prediction
            of the language model, which is available only after its last layer.
        num_validation: number of validation problems; the AUC at the ends of steps of their rollouts chooses the
            checkpoint.
        plan: the training plan; its target is the AUC at which training stops.
    """

    seed: int = 0
    num_problems: int = 12000
    steps: tuple[int, int] = (3, 7)
    batch: int = 64
    inner: float = 0.25
    imitation: float = 1.0
    layers: int = 1
    num_validation: int = 300
    plan: TrainingPlan = _PLAN


class Examples:
    """Training examples, one row for each rollout.

    Attributes:
        tokens: (B, L) prompt and solution.
        labels: (B, L) whether the solution is correct up to the token.
        weights: (B, L) weights of the tokens; 0 in the prompt and after the end.
    """

    def __init__(self, tokens: Int[np.ndarray, "B L"], labels: Bool[np.ndarray, "B L"], weights: Any):
        self.tokens, self.labels, self.weights = tokens, labels, weights


def make_examples(problems: Problems, rollouts: Rollouts, inner: float) -> Examples:
    """Join prompts and rollouts into rows, with labels and weights.

    Args:
        problems: B problems.
        rollouts: one rollout of each.
        inner: weight of a token inside a step.
    """
    prompts, lengths = encoding.prompts(problems)
    tokens, inside = encoding.join(prompts, lengths, rollouts.tokens, rollouts.length)
    ends = encoding.step_ends(rollouts.tokens, rollouts.length)
    # One code for each token carries both flags through ``join``: 1 if correct, plus 2 at the end of a step.
    flags = rollouts.is_correct + 2 * ends.astype(np.int32)
    codes, _ = encoding.join(prompts, lengths, flags, rollouts.length)
    labels, ends = (codes % 2 == 1) & inside, (codes >= 2) & inside
    return Examples(tokens, labels, np.where(ends, 1.0, inner * inside).astype(np.float32))


def train_reward(
    model: Transformer,
    settings: RewardModelSettings,
    *,
    checkpoint: Checkpoint | None = None,
    progress: bool | str | None = None,
) -> tuple[RewardModel, TrainingTrace]:
    """Train the reward model of a language model.

    Args:
        model: the language model that generates the rollouts and initializes the trunk; it needs ``forward``.
        settings: data and training plan.
        checkpoint: where to store the state; an interrupted run resumes from there, bit for bit.
        progress: as in ``probinfer.progress``.

    Returns:
        The reward model and the trace.
    """
    problems = draw((settings.seed, 2), settings.num_problems, settings.steps, "reward")
    with bars.task("rollouts", progress=bars.label(progress, "rollouts")):
        rollouts = draw_rollouts(jax.random.key(settings.seed), model, problems)
    examples = make_examples(problems, rollouts, settings.inner)

    def batch(i: int) -> tuple[tuple, tuple]:
        chosen = np.random.default_rng((settings.seed, 3, i)).integers(
            0, len(examples.tokens), settings.batch
        )
        imitated = Problems(*(leaf[chosen[: settings.batch // 2]] for leaf in problems))
        solutions = encoding.join(*encoding.prompts(imitated), *encoding.solutions(imitated))
        return (examples.tokens[chosen], examples.labels[chosen], examples.weights[chosen]), solutions

    dtype = jnp.float32
    trunk = add_layers(jax.random.key(settings.seed), model, settings.layers)
    start = RewardModel(trunk, jnp.zeros(model.config.hidden_size, dtype), jnp.zeros((), dtype))
    about = {
        "what": "reward model of the reasoner",
        **json_settings(settings),
        "rollouts": int(rollouts.tokens.sum()),
    }
    validation = draw((settings.seed, 4), settings.num_validation, settings.steps, "validation")
    validation_rollouts = draw_rollouts(
        jax.random.fold_in(jax.random.key(settings.seed), 1), model, validation
    )

    def score(reward: RewardModel) -> float:
        logits, ends = score_rollouts(reward, validation, validation_rollouts)
        return auc(logits[ends], validation_rollouts.is_correct[ends])

    return minimize_loss(
        partial(_loss, settings.imitation),
        start,
        batch,
        settings.plan,
        about=about,
        score_fn=score,
        checkpoint=checkpoint,
        progress=progress,
    )


def add_layers(key: PRNGKey, model: Transformer, layers: int) -> Transformer:
    """Add layers on top of a model without changing its function: their outputs are initialized to zero.

    Args:
        key: random key of the new weights.
        model: the language model.
        layers: number of new layers.
    """
    config = dataclasses.replace(model.config, num_layers=model.config.num_layers + layers, windows=())
    new_blocks = Transformer.random(key, config).weights["blocks"][model.config.num_layers :]
    # A block adds the outputs of these two projections to the residual stream.
    zero_blocks = tuple(
        {**block, **{name: jnp.zeros_like(block[name]) for name in ("out", "down")}} for block in new_blocks
    )
    blocks = (*model.weights["blocks"], *zero_blocks)
    return Transformer.from_blocks(model.weights["ends"], blocks, config, scanned=False)


def score_rollouts(
    reward: RewardModel, problems: Problems, rollouts: Rollouts, batch: int = 256
) -> tuple[Float[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Return the logits of the reward model at each token of rollouts, and where steps end.

    Args:
        reward: the reward model.
        problems: B problems.
        rollouts: one rollout of each.
        batch: number of rows done together.
    """
    prompts, lengths = encoding.prompts(problems)
    tokens, _ = encoding.join(prompts, lengths, rollouts.tokens, rollouts.length)
    parts, batch = [], min(batch, len(tokens))
    for i in range(0, len(tokens), batch):
        rows = np.minimum(np.arange(i, i + batch), len(tokens) - 1)
        parts.append(np.asarray(_logits(reward, tokens[rows]))[: len(tokens) - i])
    positions = np.minimum(lengths[:, None] + np.arange(rollouts.tokens.shape[1]), tokens.shape[1] - 1)
    logits = np.take_along_axis(np.concatenate(parts), positions, axis=1).astype(float)
    return logits, encoding.step_ends(rollouts.tokens, rollouts.length)


def auc(logits: Shaped[np.ndarray, "n"], labels: Shaped[np.ndarray, "n"]) -> float:
    """Probability that a correct prefix scores higher than a wrong one, ties counted half; NaN if one is missing."""
    labels = np.asarray(labels, bool)
    _, group, counts = np.unique(logits, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]  # Mann and Whitney (1947), mid-ranks
    num_correct, num_wrong = int(labels.sum()), int((~labels).sum())
    if not num_correct or not num_wrong:
        return float("nan")
    return float((ranks[labels].sum() - num_correct * (num_correct + 1) / 2) / (num_correct * num_wrong))


@jax.jit
def _logits(reward: RewardModel, tokens: Array) -> Array:
    return reward.logits(tokens)


def _loss(imitation: float, reward: RewardModel, batch: tuple[tuple, tuple]) -> Array:
    """Weighted mean cross entropy of the labels, plus that of the tokens of correct solutions."""
    (tokens, labels, weights), solutions = batch
    losses = optax.sigmoid_binary_cross_entropy(reward.logits(tokens), labels)
    return jnp.sum(losses * weights) / jnp.sum(weights) + imitation * solution_loss(reward.trunk, solutions)
