"""R-hat for many short chains: chains that start at one point make a superchain, and superchains are compared."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from probinfer.core.algorithms import as_partial
from probinfer.core.types import Array, ArrayTree, Float, field, pytree
from probinfer.inference.diagnostics.quantity import normal_scores, per_quantity

__all__ = ["nested_rhat"]


def nested_rhat(draws: ArrayTree, num_superchains: int) -> ArrayTree:
    r"""Return the rank-normalized nested :math:`\hat R` of K superchains, the larger of the bulk and the folded one.

    :math:`\hat R^2 = 1 + \hat B/\hat W`, with :math:`\hat B` the variance of the K superchain means and
    :math:`\hat W` the mean over superchains of the variance between their M chain means plus the mean variance within
    a chain (each left out where there is one chain, or one draw, only), of the normal scores of x and of
    :math:`|x-\mathrm{median}|`. Chains may be as short as one draw: what is measured is whether the chains of
    a superchain have forgotten the point they started from. The least value is 1. With
    one independent draw a chain the square is about 1 + 1/M, so a threshold depends on M.

    Args:
        draws: pytree with leaves (chain, draw, ...); the first M chains are the first superchain, the next M the
            second, and so on.
        num_superchains: K, two or more.

    Returns:
        Tree with leaves (...). Infinite when every superchain is stuck at a place of its own; NaN where nothing
        varies or a draw is NaN.

    Raises:
        ValueError: a leaf lacks the two leading axes, fewer than two superchains, a number of chains that they do not
            divide, or superchains of a single draw.

    References:
        Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari and Gelman (2024), "Nested R-hat: assessing the
        convergence of Markov chain Monte Carlo when running many short chains", definition 2.1.
    """
    if num_superchains < 2:
        raise ValueError(f"num_superchains must be 2 or more to be compared, got {num_superchains}")
    for leaf in jax.tree.leaves(draws):
        if leaf.ndim >= 2 and leaf.shape[0] % num_superchains:
            raise ValueError(
                f"{leaf.shape[0]} chains cannot be cut into {num_superchains} superchains of one size"
            )
        if leaf.ndim >= 2 and leaf.shape[0] * leaf.shape[1] <= num_superchains:
            raise ValueError(
                f"each superchain has {leaf.shape[1]} draw of one chain, so nothing varies within; pass more chains "
                "that start at the same point, or more draws"
            )
    return per_quantity(as_partial(_Nested(num_superchains)), draws, least_draws=1)


@pytree
class _Nested:
    num_superchains: int = field(static=True)

    def __call__(self, draws: Float[Array, "chain draw"]) -> Array:
        folded = jnp.abs(draws - jnp.median(draws))
        bulk, spread = (_compare(normal_scores(x), self.num_superchains) for x in (draws, folded))
        flat = jnp.all(folded == folded[0, 0])  # a two-point quantity folds to a constant
        return jnp.where(flat, bulk, jnp.maximum(bulk, spread))


def _compare(chains: Float[Array, "chain draw"], num_superchains: int) -> Array:
    nested = chains.reshape(num_superchains, -1, chains.shape[1])
    chain_means = jnp.mean(nested, axis=2)
    within = jnp.zeros(num_superchains, chains.dtype)
    if nested.shape[1] > 1:
        within += jnp.var(chain_means - chain_means[:, :1], axis=1, ddof=1)
    if nested.shape[2] > 1:
        within += jnp.mean(jnp.var(nested - nested[:, :, :1], axis=2, ddof=1), axis=1)
    between = jnp.var(jnp.mean(chain_means, axis=1), ddof=1)
    value = jnp.sqrt(1 + between / jnp.mean(within))
    return jnp.where(jnp.all(chains == chains[0, 0]), jnp.nan, value)
