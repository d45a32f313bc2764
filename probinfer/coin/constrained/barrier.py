r"""A dynamic barrier for inequality constraints :math:`g(x) \le 0`: the nearest move that respects them.

To first order a move m changes g by :math:`\nabla g \cdot m`. A dynamic barrier requires
:math:`\nabla g_k \cdot m \le -\kappa g_k` for every constraint k: a particle inside may use up the share kappa of its
distance to the boundary, one outside must remove that share of its violation. The nearest such move is the projection
on a polyhedron.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float

__all__ = ["nearest_move"]

_NUM_SWEEPS = 20


def nearest_move(
    move: Float[Array, " d"],
    slopes: Float[Array, "m d"],
    limits: Float[Array, " m"],
    num_sweeps: int = _NUM_SWEEPS,
) -> Float[Array, " d"]:
    r"""Return the nearest point to ``move`` in :math:`\{v : a_k \cdot v \le b_k\}`.

    Args:
        move: the point to project.
        slopes: a, one half-space per row; a row of zeros is no constraint.
        limits: b.
        num_sweeps: number of visits of every half-space; one is exact for one constraint, or for orthogonal ones.

    Returns:
        The projection, by dual coordinate ascent.

    References:
        Hildreth (1957), "A quadratic programming procedure"; Gong and Liu (2021), "Automatic and harmless
        regularization with constrained and lexicographic optimization: a dynamic barrier approach", equation 3.
    """
    squares = jnp.sum(slopes**2, axis=1)
    nonzero = squares > 0
    squares = jnp.where(nonzero, squares, jnp.ones_like(squares))

    def visit(point, half_space):
        slope, limit, square, is_constraint, dual = half_space
        new = jnp.where(is_constraint, jnp.maximum(dual + (slope @ point - limit) / square, 0), 0)
        return point - (new - dual) * slope, new

    def sweep(_, carry):
        point, duals = carry
        return jax.lax.scan(visit, point, (slopes, limits, squares, nonzero, duals))

    return jax.lax.fori_loop(0, num_sweeps, sweep, (move, jnp.zeros_like(limits)))[0]
