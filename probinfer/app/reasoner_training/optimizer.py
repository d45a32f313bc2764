"""Interruptible training by AdamW: the batch of step i depends on the seed and on i alone."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Shaped

from probinfer.core.types import Array, PyTree
from probinfer.running import checkpoint as checkpoints
from probinfer.running import interrupts
from probinfer.running import progress as bars

__all__ = ["TrainingPlan", "TrainingTrace", "json_settings", "minimize_loss"]


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """Optimizer settings and the stopping rule.

    Args:
        num_iterations: maximum number of steps.
        learning_rate: learning rate after ``warmup`` steps; it decays to a tenth at ``num_iterations`` by a cosine.
        warmup: number of steps in which the learning rate rises from zero.
        weight_decay: weight decay of AdamW.
        evaluate_from: first step after which the score is evaluated.
        evaluate_every: number of steps between evaluations.
        target: score at which training stops; None never stops early.
    """

    num_iterations: int
    learning_rate: float
    warmup: int = 20
    weight_decay: float = 0.01
    evaluate_from: int = 0
    evaluate_every: int = 10
    target: float | None = None

    def __post_init__(self):
        for name in ("num_iterations", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")

    def optimizer(self) -> optax.GradientTransformation:
        """Return AdamW with gradient clipping, linear warm-up and cosine decay of the learning rate."""
        warmup = min(self.warmup, self.num_iterations - 1)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup, self.num_iterations, 0.1 * self.learning_rate
        )
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=self.weight_decay))


class TrainingTrace(NamedTuple):
    """Records of each training step.

    Args:
        loss: loss of the batch.
        score: score of the weights; NaN if it was not evaluated.
        cpu: CPU seconds, including the evaluation of the score.
    """

    loss: Shaped[np.ndarray, "T"]
    score: Shaped[np.ndarray, "T"]
    cpu: Shaped[np.ndarray, "T"]


def json_settings(settings: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as they are after a round trip through JSON, without its ``TrainingPlan``."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value for name, value in vars(settings).items()
    }
    return {name: value for name, value in fields.items() if not isinstance(value, TrainingPlan)}


def minimize_loss(
    loss_fn: Callable[[PyTree, Any], Array],
    weights: PyTree,
    batch_fn: Callable[[int], Any],
    plan: TrainingPlan,
    *,
    about: dict[str, Any],
    score_fn: Callable[[PyTree], float] | None = None,
    checkpoint: checkpoints.Checkpoint | None = None,
    progress: bool | str | None = None,
) -> tuple[PyTree, TrainingTrace]:
    """Minimize the mean loss over new batches.

    Args:
        loss_fn: ``(weights, batch)`` -> scalar.
        weights: initial weights, a pytree of floating-point arrays.
        batch_fn: step i -> batch; it depends on i alone, so that a resumed run continues as if it had not stopped.
        plan: optimizer settings and stopping rule.
        about: identity of the run; a checkpoint of another run raises an error.
        score_fn: weights -> score, the larger the better.
        checkpoint: where and how often to store the state; a finished run is returned from there.
        progress: as in ``probinfer.progress``.

    Returns:
        The weights after the last step, and the trace of the steps made.

    Raises:
        KeyboardInterrupt: Ctrl-C; the checkpoint holds the state, and the same call resumes from it.
    """
    checkpoints.Checkpoint.check(checkpoint)
    optimizer = plan.optimizer()
    update = jax.jit(partial(_update, loss_fn, optimizer), donate_argnums=0)
    state = jax.tree.map(lambda leaf: leaf.copy(), (weights, optimizer.init(weights)))
    trace = TrainingTrace(*(np.full(plan.num_iterations, np.nan, np.float32) for _ in TrainingTrace._fields))
    num_done = num_stored = 0
    with contextlib.ExitStack() as stack:
        store = None
        if checkpoint is not None:
            about = {**about, "plan": dataclasses.asdict(plan)}
            store = stack.enter_context(checkpoints.claimed(checkpoint, about))
            state, trace, num_done = checkpoints.resume(store, state, trace, 1)
            trace, num_stored = TrainingTrace(*(np.array(leaf) for leaf in trace)), num_done
        finished = num_done > 0 and _reached_target(trace, num_done - 1, plan)
        progress_bar = stack.enter_context(bars.task("training", plan.num_iterations, progress))
        interrupt = stack.enter_context(interrupts.deferred())
        for i in range(plan.num_iterations if finished else num_done, plan.num_iterations):
            # Update
            start = time.process_time()
            state, loss = update(state, batch_fn(i))
            trace.loss[i] = loss  # the conversion waits for the device, so that the CPU time is complete
            # Evaluate
            if score_fn is not None and i + 1 >= plan.evaluate_from and (i + 1) % plan.evaluate_every == 0:
                trace.score[i] = score_fn(state[0])
            trace.cpu[i] = time.process_time() - start
            num_done = i + 1
            finished = _reached_target(trace, i, plan) or num_done == plan.num_iterations
            progress_bar.update(num_done, f"loss {trace.loss[i]:.3f}, {_last_score(trace)}")
            # Store
            is_due = checkpoint is not None and num_done - num_stored >= checkpoint.steps
            if store is not None and (finished or interrupt.requested or is_due):
                checkpoints.append(store, num_done, state, trace, (num_stored, num_done))
                num_stored = num_done
            if finished:
                break
            if interrupt.requested:
                raise interrupts.Interrupted(
                    f"training interrupted after {num_done} of {plan.num_iterations} steps"
                )
    return state[0], TrainingTrace(*(leaf[:num_done] for leaf in trace))


def _update(loss_fn: Any, optimizer: Any, state: tuple, batch: Any) -> tuple[tuple, Array]:
    weights, optimizer_state = state
    loss, gradient = jax.value_and_grad(loss_fn)(weights, batch)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, weights)
    return (optax.apply_updates(weights, updates), optimizer_state), loss


def _reached_target(trace: TrainingTrace, i: int, plan: TrainingPlan) -> bool:
    return plan.target is not None and bool(trace.score[i] >= plan.target)


def _last_score(trace: TrainingTrace) -> str:
    scores = trace.score[np.isfinite(trace.score)]
    return f"score {scores[-1]:.3f}" if len(scores) else "no score yet"
