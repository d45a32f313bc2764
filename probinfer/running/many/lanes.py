"""A fixed number of lanes for many data sets: a lane that has finished takes the next one.

Vectorised loops of unknown length wait for the longest of their lanes. Inference that is cut into small steps of equal
cost does not: all lanes step together, and whoever is done hands in its result and starts anew. The time is that of the
mean data set, not of the dearest, until the last ones are running out.

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
    fixed shapes, and holds the key and the data where steps need them. Steps should be small and of equal cost: no loop
    of unknown length. A state that is done may be stepped once more; what comes of it is not used.
    """

    def init(self, key: PRNGKey, x: ArrayTree) -> Any:
        """The first state of one data set."""

    def step(self, state: Any) -> Any:
        """The next state."""

    def done(self, state: Any) -> Array:
        """Whether the inference is complete."""

    def finish(self, state: Any) -> Any:
        """Draws, or (draws, info), of a state that is done."""

    def __call__(self, key: PRNGKey, x: ArrayTree) -> Any:
        """All of it for one data set: ``run_alone(self, key, x)``."""


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

    Starts and ends are computed one lane at a time, by the same program wherever and whenever a data set is run: what
    a data set yields depends on the other lanes at most through the rounding of the vectorised step.

    Args:
        finish_fn: (steps, state) -> result, a tree of arrays.
        steps: inference in steps.
        keys: typed keys (S,).
        data: leaves (S, ...).
        num: the number of data sets to run; the rest of the result is zero.
        num_lanes: data sets in work at the same time.

    Returns:
        Results with leaves (S, ...).
    """
    first = steps.init(keys[0], jax.tree.map(lambda leaf: leaf[0], data))
    like = jax.eval_shape(finish_fn, steps, first)
    # A lane that holds no data set is waiting for one: at first all are, with placeholders for states.
    states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_lanes, *leaf.shape)), first)
    results = jax.tree.map(lambda leaf: jnp.zeros((len(keys), *leaf.shape), leaf.dtype), like)
    nobody = jnp.full(num_lanes, -1, jnp.int32)
    turn = partial(_next_data_set, finish_fn, steps, keys, data, num)

    def serve(states, holders, following, results, waiting):
        carry = (states, holders, following, results, waiting)
        return lax.while_loop(lambda c: jnp.any(c[4]), turn, carry)[:4]

    def advance(carry):
        states, holders, following, results = carry
        states = jax.vmap(steps.step)(states)
        waiting = jax.vmap(steps.done)(states) & (holders >= 0)
        return serve(states, holders, following, results, waiting)

    started = serve(states, nobody, jnp.int32(0), results, jnp.ones(num_lanes, bool))
    return lax.while_loop(lambda c: jnp.any(c[1] >= 0), advance, started)[3]


def _next_data_set(
    finish_fn: Callable, steps: Stepwise, keys: Array, data: Any, num: Array, carry: tuple
) -> tuple:
    """One waiting lane hands in its result, if it holds a data set, and takes the next, if there is one."""
    states, holders, following, results, waiting = carry
    lane = jnp.argmax(waiting)
    state = lax.optimization_barrier(jax.tree.map(lambda leaf: leaf[lane], states))
    results = _hand_in(finish_fn, steps, state, holders[lane], results)
    row = jnp.minimum(following, len(keys) - 1)
    one = lax.optimization_barrier((keys[row], jax.tree.map(lambda leaf: leaf[row], data)))
    state = lax.optimization_barrier(steps.init(*one))
    states = jax.tree.map(lambda leaf, new: leaf.at[lane].set(new), states, state)
    taken = following < num
    holders = holders.at[lane].set(jnp.where(taken, following, -1))
    waiting = waiting.at[lane].set(taken & steps.done(state))
    return states, holders, following + taken, results, waiting


def _hand_in(finish_fn: Callable, steps: Stepwise, state: Any, holder: Array, results: Any) -> Any:
    result = lax.cond(
        holder >= 0,
        lambda: finish_fn(steps, state),
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), results),
    )
    row = jnp.where(holder >= 0, holder, jax.tree.leaves(results)[0].shape[0])
    return jax.tree.map(lambda leaf, new: leaf.at[row].set(new, mode="drop"), results, result)
