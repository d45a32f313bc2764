r"""Inequality constraints :math:`g(x) \le 0` for moving particles: the nearest move that does not leave them.

To first order a move m changes g by :math:`\nabla g \cdot m`. A dynamic barrier asks
:math:`\nabla g_k \cdot m \le -\kappa g_k` of every constraint k: a particle inside may use up the share kappa of its
distance to a wall, one outside must make up for that share of its violation. The nearest such move is a projection on
a polyhedron.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float

__all__ = ["nearest_move"]

_SWEEPS = 20


def nearest_move(
    move: Float[Array, " d"],
    slopes: Float[Array, "m d"],
    limits: Float[Array, " m"],
    num_sweeps: int = _SWEEPS,
) -> Float[Array, " d"]:
    r"""Return the nearest point to ``move`` in :math:`\{v : a_k \cdot v \le b_k\}`.

    Args:
        move: any.
        slopes: a, one half-space a row; a row of zeros is no constraint.
        limits: b.
        num_sweeps: visits of every half-space; one is exact for one constraint, or for orthogonal ones.

    Returns:
        The projection, by dual coordinate ascent.

    References:
        Hildreth (1957), "A quadratic programming procedure"; Gong and Liu (2021), "Automatic and harmless
        regularization with constrained and lexicographic optimization: a dynamic barrier approach", equation 3.
    """
    squares = jnp.sum(slopes**2, axis=1)
    some = squares > 0
    squares = jnp.where(some, squares, jnp.ones_like(squares))

    def visit(point, entry):
        slope, limit, square, used, dual = entry
        new = jnp.where(used, jnp.maximum(dual + (slope @ point - limit) / square, 0), 0)
        return point - (new - dual) * slope, new

    def sweep(_, carry):
        point, duals = carry
        return jax.lax.scan(visit, point, (slopes, limits, squares, some, duals))

    return jax.lax.fori_loop(0, num_sweeps, sweep, (move, jnp.zeros_like(limits)))[0]
