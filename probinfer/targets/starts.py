"""Starting positions: drawn again until the log density and its gradient are finite, or explained."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from probinfer.core.binding import Bound, StochasticLogDensity
from probinfer.core.types import Array, ArrayTree, PRNGKey, PyTree
from probinfer.targets.transforms import leaf_names

__all__ = ["MAX_TRIES", "draw_candidates", "explain_failure", "starting_positions"]

MAX_TRIES = 100


def _value_and_grad(logdensity_fn: Bound, key: PRNGKey, position: ArrayTree) -> tuple:
    if isinstance(logdensity_fn, StochasticLogDensity):
        return jax.value_and_grad(lambda z: logdensity_fn(key, z))(position)
    return jax.value_and_grad(logdensity_fn)(position)


def _all_finite(tree: PyTree) -> Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()


def _find_start(
    logdensity_fn: Bound, draw_fn: Bound, start: ArrayTree | None, key: PRNGKey, index: Array
) -> tuple[ArrayTree, Array]:
    def unfinished(state: tuple) -> Array:
        attempt, _, valid = state
        return ~valid & (attempt < MAX_TRIES)

    def try_again(state: tuple) -> tuple:
        attempt, _, _ = state
        draw_key, density_key = jax.random.split(jax.random.fold_in(key, attempt))
        position = draw_fn(draw_key, attempt)
        if start is not None:
            preferred = (index == 0) & (attempt == 0)
            position = jax.tree.map(lambda s, z: jnp.where(preferred, s, z).astype(z.dtype), start, position)
        valid = _all_finite(_value_and_grad(logdensity_fn, density_key, position))
        return attempt + 1, position, valid

    first = jnp.zeros((), jnp.int32)
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(draw_fn, key, first))
    _, position, valid = jax.lax.while_loop(unfinished, try_again, (first, empty, jnp.zeros((), bool)))
    return position, valid


@partial(jax.jit, static_argnames="num")
def starting_positions(
    key: PRNGKey, logdensity_fn: Bound, draw_fn: Bound, start: ArrayTree | None, *, num: int
) -> tuple[ArrayTree, Array]:
    """Draw positions, each until its log density and gradient are finite, at most ``MAX_TRIES`` times.

    Args:
        key: a random key.
        logdensity_fn: unconstrained log density, stochastic or not.
        draw_fn: ``draw_fn(key, attempt) -> position``.
        start: a position to try first for the first one, or ``None``.
        num: how many positions.

    Returns:
        The positions with leading axis ``num``, and whether each is valid ``(num,)``.
    """
    find = partial(_find_start, logdensity_fn, draw_fn, start)
    keys, indices = jax.random.split(key, num), jnp.arange(num)
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda pair: find(*pair), (keys, indices))
    return jax.vmap(find)(keys, indices)


@jax.jit
def _evaluate(
    key: PRNGKey, logdensity_fn: Bound, terms_fn: Bound, position: ArrayTree
) -> tuple[dict, ArrayTree]:
    return terms_fn(position), _value_and_grad(logdensity_fn, key, position)[1]


@partial(jax.jit, static_argnames="num")
def draw_candidates(key: PRNGKey, draw_fn: Bound, start: ArrayTree | None, *, num: int) -> ArrayTree:
    """Draw positions once each; the first one is ``start`` where there is one.

    Args:
        key: a random key.
        draw_fn: ``draw_fn(key, attempt) -> position``.
        start: the first position, or ``None``.
        num: how many positions.

    Returns:
        The positions with leading axis ``num``.
    """
    # One after another: batched random bits take twice as long to compile, and few are drawn.
    drawn = jax.lax.map(lambda k: draw_fn(k, jnp.zeros((), jnp.int32)), jax.random.split(key, num))
    if start is None:
        return drawn
    return jax.tree.map(lambda first, rest: rest.at[0].set(jnp.asarray(first, rest.dtype)), start, drawn)


def explain_failure(key: PRNGKey, logdensity_fn: Bound, terms_fn: Bound, position: ArrayTree) -> str:
    """Say which summands of the log density and which parts of its gradient are not finite at a position."""
    terms, gradient = _evaluate(key, logdensity_fn, terms_fn, position)
    bad_terms = [name for name, value in terms.items() if not jnp.isfinite(value)]
    pairs = zip(leaf_names(gradient), jax.tree.leaves(gradient), strict=True)
    bad_gradient = [name for name, leaf in pairs if not jnp.all(jnp.isfinite(leaf))]
    said = [f"log density of {bad_terms}"] if bad_terms else []
    said += [f"gradient with respect to {bad_gradient}"] if bad_gradient else []
    return " and ".join(said) or "the sum of the terms"
