r"""Mirror maps: unconstrained coordinates for constrained positions.

A mirror is a convex function :math:`\psi` on a constrained set; :math:`\eta = \nabla\psi(\theta)` is unconstrained, and
:math:`\theta = \nabla\psi^*(\eta)` is inside for any :math:`\eta`. A mirror object has the methods, for one position:
``primal(eta (d,)) -> position``, ``dual(position) -> eta``, ``log_det(eta)`` the log determinant of
:math:`\nabla^2\psi^*`, ``hessian(eta, v)`` the product :math:`\nabla^2\psi(\theta) v`, and ``inside(position)``.
Any bijector can replace a mirror map if no Hessian is needed (``mirror_from_bijector``).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from probinfer.coin.cloud.particles import unravel_particles
from probinfer.core.types import Array, ArrayTree, Bool, Float, Scalar, pytree, strong_array
from probinfer.targets import transforms

__all__ = ["BijectorMirror", "Box", "Orthant", "Simplex", "mirror_from_bijector"]


@pytree
class Simplex:
    r"""Positive positions (D,) that sum to one, by the entropy; densities are those of the first D - 1 of them.

    :math:`\eta_k = \log \theta_k - \log \theta_D`, k < D.
    """

    takes_vectors = True

    def primal(self, eta: Float[Array, " d"]) -> Float[Array, " _"]:
        """``softmax`` of eta and a zero."""
        return jax.nn.softmax(jnp.concatenate([eta, jnp.zeros_like(eta[:1])]))

    def dual(self, position: Float[Array, " D"]) -> Float[Array, " _"]:
        """Log ratios to the last one."""
        return jnp.log(position[:-1]) - jnp.log(position[-1])

    def log_det(self, eta: Float[Array, " d"]) -> Scalar:
        """Sum of all D log positions."""
        return jnp.sum(jax.nn.log_softmax(jnp.concatenate([eta, jnp.zeros_like(eta[:1])])))

    def hessian(self, eta: Float[Array, " d"], vector: Float[Array, " d"]) -> Float[Array, " d"]:
        """``v / theta + sum(v) / theta_D``."""
        position = self.primal(eta)
        return vector / position[:-1] + jnp.sum(vector) / position[-1]

    def inside(self, position: Float[Array, " D"]) -> Bool[Array, ""]:
        """Whether all entries are positive, and they sum to one up to rounding."""
        slack = 100 * float(jnp.finfo(position.dtype).eps) * position.shape[0]
        return jnp.all(position > 0) & (jnp.abs(jnp.sum(position) - 1) <= slack)


@pytree
class Orthant:
    r"""Positive positions (d,), by the entropy: :math:`\eta = \log \theta`."""

    takes_vectors = True

    def primal(self, eta: Float[Array, " d"]) -> Float[Array, " d"]:
        """``exp(eta)``."""
        return jnp.exp(eta)

    def dual(self, position: Float[Array, " d"]) -> Float[Array, " d"]:
        """``log(theta)``."""
        return jnp.log(position)

    def log_det(self, eta: Float[Array, " d"]) -> Scalar:
        """``sum(eta)``."""
        return jnp.sum(eta)

    def hessian(self, eta: Float[Array, " d"], vector: Float[Array, " d"]) -> Float[Array, " d"]:
        """``v / theta``."""
        return vector * jnp.exp(-eta)

    def inside(self, position: Float[Array, " d"]) -> Bool[Array, ""]:
        """Whether all entries are positive and finite."""
        return jnp.all((position > 0) & jnp.isfinite(position))


@pytree
class Box:
    r"""Positions (d,) between two bounds, by the two entropies: :math:`\eta = \log \frac{\theta - l}{u - \theta}`.

    Args:
        low: lower bounds, () or (d,).
        high: upper bounds, above them.
    """

    takes_vectors = True
    low: Any
    high: Any

    def __post_init__(self):
        """Check the bounds.

        Raises:
            ValueError: A lower bound is not below its upper bound.
        """
        for name in ("low", "high"):
            object.__setattr__(self, name, strong_array(getattr(self, name)))
        bounds = (self.low, self.high)
        if not any(isinstance(bound, jax.core.Tracer) for bound in bounds) and not np.all(
            np.asarray(self.low) < np.asarray(self.high)
        ):
            raise ValueError(f"a box needs low < high everywhere, got low={self.low} and high={self.high}")

    def _bounds(self, values: Array) -> tuple[Array, Array]:
        """Return both bounds in the dtype of the values."""
        return jnp.asarray(self.low, values.dtype), jnp.asarray(self.high, values.dtype)

    def primal(self, eta: Float[Array, " d"]) -> Float[Array, " d"]:
        """``low + (high - low) sigmoid(eta)``."""
        low, high = self._bounds(eta)
        return low + (high - low) * jax.nn.sigmoid(eta)

    def dual(self, position: Float[Array, " d"]) -> Float[Array, " d"]:
        """``logit((theta - low) / (high - low))``."""
        low, high = self._bounds(position)
        return jnp.log(position - low) - jnp.log(high - position)

    def log_det(self, eta: Float[Array, " d"]) -> Scalar:
        """``sum(log(high - low) + log sigmoid(eta) + log sigmoid(-eta))``."""
        low, high = self._bounds(eta)
        return jnp.sum(jnp.log(high - low) + jax.nn.log_sigmoid(eta) + jax.nn.log_sigmoid(-eta))

    def hessian(self, eta: Float[Array, " d"], vector: Float[Array, " d"]) -> Float[Array, " d"]:
        """``v (1 / (theta - low) + 1 / (high - theta))``."""
        low, high = self._bounds(eta)
        return vector / ((high - low) * jax.nn.sigmoid(eta) * jax.nn.sigmoid(-eta))

    def inside(self, position: Float[Array, " d"]) -> Bool[Array, ""]:
        """Whether all entries are strictly between the bounds."""
        low, high = self._bounds(position)
        return jnp.all((position > low) & (position < high))


@pytree
class BijectorMirror:
    """A tree of bijectors in place of a mirror map, from :func:`mirror_from_bijector`."""

    bijectors: Any
    example: Any

    def primal(self, eta: Float[Array, " d"]) -> ArrayTree:
        """The constrained position."""
        return transforms.forward(self.bijectors, self._unravel(eta))

    def dual(self, position: ArrayTree) -> Float[Array, " d"]:
        """The unconstrained coordinates of a position, concatenated."""
        return ravel_pytree(transforms.inverse(self.bijectors, position))[0]

    def log_det(self, eta: Float[Array, " d"]) -> Scalar:
        """Log determinant of the bijectors."""
        return transforms.log_abs_det_jacobian(self.bijectors, self._unravel(eta))

    def inside(self, position: ArrayTree) -> Bool[Array, ""]:
        """Whether the unconstrained coordinates are finite."""
        return jnp.all(jnp.isfinite(self.dual(position)))

    def _unravel(self, eta: Array) -> ArrayTree:
        template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, eta.dtype), self.example)
        return unravel_particles(template, eta)


def mirror_from_bijector(bijectors: Any, example: ArrayTree) -> BijectorMirror:
    """Return the mirror of a bijector, or of a tree of them.

    With it SVGD moves particles in the unconstrained coordinates, while the kernel compares their positions.

    Args:
        bijectors: a NumPyro ``Transform``, constraint or distribution, or a tree of them; None: an unconstrained leaf.
        example: one constrained position, a tree of that structure, floating point; only its shapes are used.

    Returns:
        A mirror for :func:`probinfer.coin.mirrored_svgd`. It has no Hessian, so ``mirrored_svmd`` refuses it.

    Raises:
        TypeError: A leaf is none of these, or the example is not floating point.
        ValueError: A support is discrete, the structures differ, or the example is outside the support.
    """
    transforms_tree = jax.tree.map(
        transforms.bijector, bijectors, is_leaf=lambda node: node is None or transforms.is_leaf(node)
    )
    unconstrained = transforms.inverse(transforms_tree, example)
    return BijectorMirror(transforms_tree, jax.tree.map(jnp.zeros_like, unconstrained))
