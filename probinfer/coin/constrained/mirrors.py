r"""Mirror maps: coordinates without walls for positions with walls.

A mirror is a convex function :math:`\psi` on a constrained set; :math:`\eta = \nabla\psi(\theta)` is free, and
:math:`\theta = \nabla\psi^*(\eta)` is inside whatever :math:`\eta`. A mirror object has, of one position:
``primal(eta (d,)) -> position``, ``dual(position) -> eta``, ``log_det(eta)`` the log determinant of
:math:`\nabla^2\psi^*`, ``hessian(eta, v)`` the product :math:`\nabla^2\psi(\theta) v`, and ``inside(position)``.
Any bijector serves as a mirror where no Hessian is needed (``mirror_from_bijector``).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from probinfer.core.types import Array, ArrayTree, Bool, Float, Scalar, pytree, strong_array
from probinfer.targets import transforms

__all__ = ["BijectorMirror", "Box", "Orthant", "Simplex", "mirror_from_bijector"]


@pytree
class Simplex:
    r"""Positions (D,) that are positive and sum to one, by the entropy; densities are of the first D - 1 of them.

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
        """Whether all are positive and they sum to one, to rounding."""
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
        """Whether all are positive."""
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
            ValueError: a lower bound that is not below its upper bound.
        """
        for name in ("low", "high"):
            object.__setattr__(self, name, strong_array(getattr(self, name)))
        bounds = (self.low, self.high)
        if not any(isinstance(bound, jax.core.Tracer) for bound in bounds) and not np.all(
            np.asarray(self.low) < np.asarray(self.high)
        ):
            raise ValueError(f"a box needs low < high everywhere, got low={self.low} and high={self.high}")

    def _bounds(self, template: Array) -> tuple[Array, Array]:
        return jnp.asarray(self.low, template.dtype), jnp.asarray(self.high, template.dtype)

    def primal(self, eta: Float[Array, " d"]) -> Float[Array, " d"]:
        """``low + (high - low) sigmoid(eta)``."""
        low, high = self._bounds(eta)
        return low + (high - low) * jax.nn.sigmoid(eta)

    def dual(self, position: Float[Array, " d"]) -> Float[Array, " d"]:
        """The logit of the share of the way."""
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
        """Whether all are strictly between the bounds."""
        low, high = self._bounds(position)
        return jnp.all((position > low) & (position < high))


@pytree
class BijectorMirror:
    """A tree of bijectors in the place of a mirror map; made by :func:`mirror_from_bijector`."""

    bijectors: Any
    example: Any

    def primal(self, eta: Float[Array, " d"]) -> ArrayTree:
        """The constrained position."""
        return transforms.forward(self.bijectors, self._unravel(eta))

    def dual(self, position: ArrayTree) -> Float[Array, " d"]:
        """The free coordinates of a position, side by side."""
        return ravel_pytree(transforms.inverse(self.bijectors, position))[0]

    def log_det(self, eta: Float[Array, " d"]) -> Scalar:
        """Log determinant of the bijectors."""
        return transforms.log_abs_det_jacobian(self.bijectors, self._unravel(eta))

    def inside(self, position: ArrayTree) -> Bool[Array, ""]:
        """Whether the free coordinates are finite."""
        return jnp.all(jnp.isfinite(self.dual(position)))

    def _unravel(self, eta: Array) -> ArrayTree:
        leaves, structure = jax.tree.flatten(self.example)
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
        parts = jnp.split(eta, ends)
        shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(structure, shaped)


def mirror_from_bijector(bijectors: Any, example: ArrayTree) -> BijectorMirror:
    """Return the mirror of any bijector, or tree of them: SVGD in the free coordinates, the kernel on the positions.

    Args:
        bijectors: a NumPyro ``Transform``, constraint or distribution, or a tree of them; None: a free leaf.
        example: one constrained position, a tree of that structure, floating point; for its shapes only.

    Returns:
        A mirror for :func:`probinfer.coin.mirrored_svgd`; it has no Hessian, so not for ``mirrored_svmd``.

    Raises:
        TypeError: a leaf that is none of these, or an example that is not floating point.
        ValueError: a discrete support, structures that differ, or an example outside the support.
    """
    made = jax.tree.map(
        transforms.bijector, bijectors, is_leaf=lambda node: node is None or transforms.is_leaf(node)
    )
    free = transforms.inverse(made, example)
    return BijectorMirror(made, jax.tree.map(jnp.zeros_like, free))
