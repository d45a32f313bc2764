"""A fixed number of lanes for many data sets: a lane that has finished takes the next data set.

A vectorized loop of unknown length waits for the longest of its lanes. Inference that is cut into small steps of equal
cost does not: all lanes step together, and a lane that is done stores its result and starts with the next data set. The
time is that of the mean data set, not of the most expensive one, until the last data sets run out.

References:
    Radul, Patton, Maclaurin, Hoffman and Saurous (2020), "Automatically batching control-intensive programs for modern
    accelerators", section 1 (what lockstep costs the no-U-turn sampler).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.types import Array, ArrayTree, PRNGKey

__all__ = ["Stepwise", "run_alone", "run_lanes"]


@runtime_checkable
class Stepwise(Protocol):
    """Inference that can be run in steps: an ``infer_fn`` for ``run_many`` with ``mode="queue"``.

    A registered class (``probinfer.core.types.pytree``) with these pure methods. The state is any tree of arrays of
    fixed shapes; it holds the key and the data if steps need them. Steps should be small and of equal cost, without
    loops of unknown length. A state that is done may be stepped once more; the result is not used.
    """

    def init(self, key: PRNGKey, x: ArrayTree) -> Any:
        """Return the first state of one data set."""

    def step(self, state: Any) -> Any:
        """Return the next state."""

    def done(self, state: Any) -> Array:
        """Return whether the inference is complete."""

    def finish(self, state: Any) -> Any:
        """Return draws, or (draws, info), of a state that is done."""

    def __call__(self, key: PRNGKey, x: ArrayTree) -> Any:
        """Infer from one data set from start to end: ``run_alone(self, key, x)``."""


def run_alone(steps: Stepwise, key: PRNGKey, x: ArrayTree) -> Any:
    """Run one data set to its end.

    Args:
        steps: inference in steps.
        key: random key.
        x: one data set.

    Returns:
        What ``steps.finish`` returns.
    """
    return steps.finish(lax.while_loop(lambda s: ~steps.done(s), steps.step, steps.init(key, x)))


@partial(jax.jit, static_argnums=(0, 5))
def run_lanes(
    finish_fn: Callable, steps: Stepwise, keys: Array, data: ArrayTree, num: Array, num_lanes: int
) -> Any:
    """Run the first ``num`` data sets of a batch, ``num_lanes`` at a time.

    First states and results are computed one lane at a time, by the same program for every lane and time, so that the
    result of a data set depends on the other lanes through the rounding of the vectorized step at most.

    Args:
        finish_fn: (steps, state) -> result, a tree of arrays.
        steps: inference in steps.
        keys: typed keys (S,).
        data: leaves (S, ...).
        num: number of data sets to run; the rest of the result is zero.
        num_lanes: number of data sets that are run at the same time.

    Returns:
        Results with leaves (S, ...).
    """
    first = steps.init(keys[0], jax.tree.map(lambda leaf: leaf[0], data))
    result_shapes = jax.eval_shape(finish_fn, steps, first)
    # A lane that holds no data set is waiting for one: at first all are, with placeholders for states.
    states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_lanes, *leaf.shape)), first)
    results = jax.tree.map(lambda leaf: jnp.zeros((len(keys), *leaf.shape), leaf.dtype), result_shapes)
    no_data_set = jnp.full(num_lanes, -1, jnp.int32)
    refill_one_lane = partial(_next_data_set, finish_fn, steps, keys, data, num)

    def refill(states, data_set_of_lane, next_data_set, results, waiting):
        carry = (states, data_set_of_lane, next_data_set, results, waiting)
        return lax.while_loop(lambda c: jnp.any(c[4]), refill_one_lane, carry)[:4]

    def advance(carry):
        states, data_set_of_lane, next_data_set, results = carry
        states = jax.vmap(steps.step)(states)
        waiting = jax.vmap(steps.done)(states) & (data_set_of_lane >= 0)
        return refill(states, data_set_of_lane, next_data_set, results, waiting)

    started = refill(states, no_data_set, jnp.int32(0), results, jnp.ones(num_lanes, bool))
    return lax.while_loop(lambda c: jnp.any(c[1] >= 0), advance, started)[3]


def _next_data_set(
    finish_fn: Callable, steps: Stepwise, keys: Array, data: Any, num: Array, carry: tuple
) -> tuple:
    """Let one waiting lane store its result, if it holds a data set, and take the next one, if there is one."""
    states, data_set_of_lane, next_data_set, results, waiting = carry
    lane = jnp.argmax(waiting)
    state = lax.optimization_barrier(jax.tree.map(lambda leaf: leaf[lane], states))
    results = _store_result(finish_fn, steps, state, data_set_of_lane[lane], results)
    row = jnp.minimum(next_data_set, len(keys) - 1)
    one = lax.optimization_barrier((keys[row], jax.tree.map(lambda leaf: leaf[row], data)))
    state = lax.optimization_barrier(steps.init(*one))
    states = jax.tree.map(lambda leaf, new: leaf.at[lane].set(new), states, state)
    has_next = next_data_set < num
    data_set_of_lane = data_set_of_lane.at[lane].set(jnp.where(has_next, next_data_set, -1))
    waiting = waiting.at[lane].set(has_next & steps.done(state))
    return states, data_set_of_lane, next_data_set + has_next, results, waiting


def _store_result(finish_fn: Callable, steps: Stepwise, state: Any, data_set: Array, results: Any) -> Any:
    result = lax.cond(
        data_set >= 0,
        lambda: finish_fn(steps, state),
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), results),
    )
    row = jnp.where(data_set >= 0, data_set, jax.tree.leaves(results)[0].shape[0])
    return jax.tree.map(lambda leaf, new: leaf.at[row].set(new, mode="drop"), results, result)
