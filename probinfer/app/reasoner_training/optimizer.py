"""Training by AdamW that can be interrupted: what step i learns from depends on the seed and on i alone."""

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

__all__ = ["Plan", "Trace", "descend"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to descend.

    Args:
        num_iterations: most steps.
        learning_rate: after ``warmup`` steps; falls on a cosine to a tenth at ``num_iterations``.
        warmup: steps on which the rate rises from zero.
        weight_decay: of AdamW.
        evaluate_from: first step after which the score is asked.
        evaluate_every: steps between scores.
        target: stop at the first score that is at least this; None: never.
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

    def optimiser(self) -> optax.GradientTransformation:
        """AdamW under a clipped gradient."""
        warmup = min(self.warmup, self.num_iterations - 1)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup, self.num_iterations, 0.1 * self.learning_rate
        )
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=self.weight_decay))


class Trace(NamedTuple):
    """What happened at each step.

    Args:
        loss: of the batch.
        score: NaN where it was not asked.
        cpu: seconds of the processor, scores included.
    """

    loss: Shaped[np.ndarray, "T"]
    score: Shaped[np.ndarray, "T"]
    cpu: Shaped[np.ndarray, "T"]


def descend(
    loss_fn: Callable[[PyTree, Any], Array],
    weights: PyTree,
    batch_fn: Callable[[int], Any],
    plan: Plan,
    *,
    about: dict[str, Any],
    score_fn: Callable[[PyTree], float] | None = None,
    checkpoint: checkpoints.Checkpoint | None = None,
    progress: bool | str | None = None,
) -> tuple[PyTree, Trace]:
    """Minimise the mean loss of fresh batches.

    Args:
        loss_fn: (weights, batch) -> scalar.
        weights: a pytree of floating arrays.
        batch_fn: the batch of step i; a function of i alone, so that a resumed run goes on as if it had not stopped.
        plan: how.
        about: what is trained; a checkpoint of something else is refused.
        score_fn: of the weights, the larger the better.
        checkpoint: where to keep the state and how often; a finished run is returned from there.
        progress: the setting of ``probinfer.progress``.

    Returns:
        The weights after the last step, and the trace up to it.

    Raises:
        KeyboardInterrupt: Ctrl-C; the state is in the checkpoint, from which the same call goes on.
    """
    checkpoints.Checkpoint.check(checkpoint)
    optimiser = plan.optimiser()
    update = jax.jit(partial(_update, loss_fn, optimiser), donate_argnums=0)
    state = jax.tree.map(lambda leaf: leaf.copy(), (weights, optimiser.init(weights)))
    trace = Trace(*(np.full(plan.num_iterations, np.nan, np.float32) for _ in Trace._fields))
    first = kept = 0
    with contextlib.ExitStack() as stack:
        store = None
        if checkpoint is not None:
            about = {**about, "plan": dataclasses.asdict(plan)}
            store = stack.enter_context(checkpoints.claimed(checkpoint, about))
            state, trace, first = checkpoints.resume(store, state, trace, 1)
            trace, kept = Trace(*(np.array(leaf) for leaf in trace)), first
        done = first > 0 and _reached(trace, first - 1, plan)
        line = stack.enter_context(bars.task("training", plan.num_iterations, progress))
        stop = stack.enter_context(interrupts.deferred())
        for i in range(plan.num_iterations if done else first, plan.num_iterations):
            begin = time.process_time()
            state, loss = update(state, batch_fn(i))
            trace.loss[i] = loss  # waits for it
            if score_fn is not None and i + 1 >= plan.evaluate_from and (i + 1) % plan.evaluate_every == 0:
                trace.score[i] = score_fn(state[0])
            trace.cpu[i] = time.process_time() - begin
            first = i + 1
            done = _reached(trace, i, plan) or first == plan.num_iterations
            line.update(first, f"loss {trace.loss[i]:.3f}, {_last_score(trace)}")
            if store is not None and (done or stop.requested or first - kept >= checkpoint.steps):  # type: ignore[union-attr]
                checkpoints.append(store, first, state, trace, (kept, first))
                kept = first
            if done:
                break
            if stop.requested:
                raise interrupts.Interrupted(f"training ended after {first} of {plan.num_iterations} steps")
    return state[0], Trace(*(leaf[:first] for leaf in trace))


def _update(loss_fn: Any, optimiser: Any, state: tuple, batch: Any) -> tuple[tuple, Array]:
    weights, moments = state
    loss, gradient = jax.value_and_grad(loss_fn)(weights, batch)
    change, moments = optimiser.update(gradient, moments, weights)
    return (optax.apply_updates(weights, change), moments), loss


def _reached(trace: Trace, i: int, plan: Plan) -> bool:
    return plan.target is not None and bool(trace.score[i] >= plan.target)


def _last_score(trace: Trace) -> str:
    asked = trace.score[np.isfinite(trace.score)]
    return f"score {asked[-1]:.3f}" if len(asked) else "no score yet"
