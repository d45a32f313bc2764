"""Training of the process reward model: which beginnings of its own solutions are right, told by the checker.

The trunk starts as the language model, a layer and a value head are added on top, and all learn from rollouts at
temperature 1, while the trunk goes on to learn right solutions. The label of a token is whether the solution is right
up to it, so the model is of use for steps of any kind; the ends of steps count most. It is imperfect as it is small
and has seen little, not because of noise: training stops when its AUC on validation problems reaches the target.
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
from probinfer.app.reasoner_training.optimizer import Plan, Trace, descend
from probinfer.app.reasoner_training.sampled_solutions import Rollouts, rollouts
from probinfer.core.types import Array, PRNGKey
from probinfer.lm.models.transformer import Transformer
from probinfer.lm.reasoner import encoding
from probinfer.lm.reasoner.task import Problems, draw
from probinfer.lm.rewards.model import RewardModel
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint

__all__ = ["Examples", "RewardSettings", "auc", "examples", "grown", "judge", "train_reward"]

_PLAN = Plan(num_iterations=800, learning_rate=2e-3, evaluate_from=60, evaluate_every=10, target=0.94)


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """Everything that the weights of the reward model depend on, apart from the language model.

    Args:
        seed: of the problems, the rollouts and the batches.
        num_problems: one rollout each.
        steps: fewest and most steps of a problem.
        batch: rollouts of a step of training.
        inner: weight of a token inside a step; the last of a step has weight 1.
        imitation: weight of the cross entropy of right solutions, which the trunk goes on to learn from half as many
            problems as there are rollouts.
        layers: of the trunk, on top of those of the language model: they compare what was written with what it
            expects, which its last layer knows too late.
        num_validation: problems of whose rollouts the AUC at the ends of steps chooses the checkpoint.
        plan: of the descent; its target is the AUC at which training stops.
    """

    seed: int = 0
    num_problems: int = 12000
    steps: tuple[int, int] = (3, 7)
    batch: int = 64
    inner: float = 0.25
    imitation: float = 1.0
    layers: int = 1
    num_validation: int = 300
    plan: Plan = _PLAN


class Examples:
    """Rows to learn from.

    Attributes:
        tokens: (B, L) prompt and solution.
        labels: (B, L) whether the solution is right up to the token.
        weights: (B, L) of the tokens; 0 in the prompt and behind the end.
    """

    def __init__(self, tokens: Int[np.ndarray, "B L"], labels: Bool[np.ndarray, "B L"], weights: Any):
        self.tokens, self.labels, self.weights = tokens, labels, weights


def examples(problems: Problems, found: Rollouts, inner: float) -> Examples:
    """Prompts and rollouts as rows, with labels and weights.

    Args:
        problems: B of them.
        found: one rollout of each.
        inner: weight of a token inside a step.
    """
    prompts, lengths = encoding.prompts(problems)
    tokens, inside = encoding.join(prompts, lengths, found.tokens, found.length)
    ends = encoding.step_ends(found.tokens, found.length)
    marks = encoding.join(prompts, lengths, found.right + 2 * ends.astype(np.int32), found.length)[0]
    labels, ends = (marks % 2 == 1) & inside, (marks >= 2) & inside
    return Examples(tokens, labels, np.where(ends, 1.0, inner * inside).astype(np.float32))


def train_reward(
    model: Transformer,
    settings: RewardSettings,
    *,
    checkpoint: Checkpoint | None = None,
    progress: bool | str | None = None,
) -> tuple[RewardModel, Trace]:
    """Train the reward model of a language model.

    Args:
        model: whose rollouts are judged, and whose weights the trunk starts from; it needs ``forward``.
        settings: what.
        checkpoint: where to keep the state; an interrupted run goes on from there, bit for bit.
        progress: the setting of ``probinfer.progress``.

    Returns:
        The reward model and the trace.
    """
    problems = draw((settings.seed, 2), settings.num_problems, settings.steps, "reward")
    with bars.task("rollouts", progress=bars.label(progress, "rollouts")):
        found = rollouts(jax.random.key(settings.seed), model, problems)
    rows = examples(problems, found, settings.inner)

    def batch(i: int) -> tuple[tuple, tuple]:
        chosen = np.random.default_rng((settings.seed, 3, i)).integers(0, len(rows.tokens), settings.batch)
        own = Problems(*(leaf[chosen[: settings.batch // 2]] for leaf in problems))
        lesson = encoding.join(*encoding.prompts(own), *encoding.solutions(own))
        return (rows.tokens[chosen], rows.labels[chosen], rows.weights[chosen]), lesson

    dtype = jnp.float32
    trunk = grown(jax.random.key(settings.seed), model, settings.layers)
    start = RewardModel(trunk, jnp.zeros(model.config.hidden_size, dtype), jnp.zeros((), dtype))
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(settings).items() if k != "plan"}
    about = {"what": "reward model of the reasoner", **fields, "rollouts": int(found.tokens.sum())}
    validation = draw((settings.seed, 4), settings.num_validation, settings.steps, "validation")
    judged = rollouts(jax.random.fold_in(jax.random.key(settings.seed), 1), model, validation)

    def score(reward: RewardModel) -> float:
        logits, ends = judge(reward, validation, judged)
        return auc(logits[ends], judged.right[ends])

    return descend(
        partial(_loss, settings.imitation),
        start,
        batch,
        settings.plan,
        about=about,
        score_fn=score,
        checkpoint=checkpoint,
        progress=progress,
    )


def grown(key: PRNGKey, model: Transformer, layers: int) -> Transformer:
    """The same function with more layers: what the new ones on top add to the stream is zero at first.

    Args:
        key: of the new weights.
        model: the language model.
        layers: new ones; 0 leaves it as it is.
    """
    config = dataclasses.replace(model.config, num_layers=model.config.num_layers + layers, windows=())
    fresh = Transformer.random(key, config).weights["blocks"][model.config.num_layers :]
    silent = tuple(
        {**block, **{name: jnp.zeros_like(block[name]) for name in ("out", "down")}} for block in fresh
    )
    blocks = (*model.weights["blocks"], *silent)
    return Transformer.from_blocks(model.weights["ends"], blocks, config, scanned=False)


def judge(
    reward: RewardModel, problems: Problems, found: Rollouts, batch: int = 256
) -> tuple[Float[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Logits of the reward model at every token of rollouts, and where steps end.

    Args:
        reward: the reward model.
        problems: B of them.
        found: one rollout of each.
        batch: rows at a time.
    """
    prompts, lengths = encoding.prompts(problems)
    tokens, _ = encoding.join(prompts, lengths, found.tokens, found.length)
    parts, batch = [], min(batch, len(tokens))
    for i in range(0, len(tokens), batch):
        rows = np.minimum(np.arange(i, i + batch), len(tokens) - 1)
        parts.append(np.asarray(_logits(reward, tokens[rows]))[: len(tokens) - i])
    places = np.minimum(lengths[:, None] + np.arange(found.tokens.shape[1]), tokens.shape[1] - 1)
    logits = np.take_along_axis(np.concatenate(parts), places, axis=1).astype(float)
    return logits, encoding.step_ends(found.tokens, found.length)


def auc(logits: Shaped[np.ndarray, "n"], labels: Shaped[np.ndarray, "n"]) -> float:
    """Probability that a right prefix has a higher score than a wrong one, ties counted half; NaN without both."""
    labels = np.asarray(labels, bool)
    _, place, counts = np.unique(logits, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # Mann and Whitney (1947), mid-ranks
    right, wrong = int(labels.sum()), int((~labels).sum())
    if not right or not wrong:
        return float("nan")
    return float((ranks[labels].sum() - right * (right + 1) / 2) / (right * wrong))


@jax.jit
def _logits(reward: RewardModel, tokens: Array) -> Array:
    return reward.logits(tokens)


def _loss(imitation: float, reward: RewardModel, batch: tuple[tuple, tuple]) -> Array:
    """Weighted mean of the cross entropy of the labels, and that of the tokens of right solutions."""
    (tokens, labels, weights), lesson = batch
    verdicts = optax.sigmoid_binary_cross_entropy(reward.logits(tokens), labels)
    return jnp.sum(verdicts * weights) / jnp.sum(weights) + imitation * solution_loss(reward.trunk, lesson)
