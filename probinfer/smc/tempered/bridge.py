r"""Paths of densities from a base law, which can be sampled, to a target.

.. math:: \log \pi_t(u) = \log q(u) + t\,\Delta(u), \qquad 0 \le t \le 1,

in unconstrained coordinates, flattened to one vector in the default float type. The base q is normalised, so the
normaliser of :math:`\pi_1` is the evidence. It is the prior, and :math:`\Delta` the log likelihood, where the target
knows them; else a multivariate Student-t, and :math:`\Delta = \log\gamma - \log q`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.algorithms import as_partial
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey, Scalar, field, pytree
from probinfer.numerics.covariance_factor import push
from probinfer.targets import Target

__all__ = ["FREEDOM", "PriorPath", "StudentPath", "flatten_one", "from_prior", "unflatten"]

FREEDOM = 5  # degrees of freedom of the Student-t: heavier tails than most posteriors, with four moments


@pytree
class PriorPath:
    """From the prior to the posterior.

    Attributes:
        sample_fn: key -> position.
        log_base_fn: position -> log prior, normalised.
        ratio_fn: position -> log likelihood; or the log joint density, if ``is_joint``.
        like: a position: structure, shapes and dtypes.
        is_joint: whether the log prior is to be subtracted.
    """

    sample_fn: Callable
    log_base_fn: Callable
    ratio_fn: Callable
    like: Any
    is_joint: bool = field(static=True)

    def sample(self, key: PRNGKey) -> Float[Array, " d"]:
        """Draw from the base."""
        return flatten_one(self.sample_fn(key))

    def terms(self, flat: Float[Array, " d"]) -> tuple[Scalar, Scalar]:
        """Return log base and log ratio at a position."""
        position = unflatten(self.like, flat)
        log_base = self.log_base_fn(position).astype(flat.dtype)
        ratio = self.ratio_fn(position).astype(flat.dtype)
        return log_base, ratio - log_base if self.is_joint else ratio


@pytree
class StudentPath:
    """From a multivariate Student-t to a density.

    Attributes:
        logdensity_fn: position -> unnormalised log density.
        like: a position: structure, shapes and dtypes.
        loc: (d,).
        root: lower triangular (d, d), or (d,), of the scale matrix.
        inverse: of the root, in the same shape.
    """

    logdensity_fn: Callable
    like: Any
    loc: Any
    root: Any
    inverse: Any

    def sample(self, key: PRNGKey) -> Float[Array, " d"]:
        """Draw from the base."""
        # z sqrt(df / chi2_df), the chi-squared a sum of squared normals: no rejection loop to compile
        normal = jax.random.normal(key, (self.loc.shape[0] + FREEDOM,), self.loc.dtype)
        z, rest = normal[:-FREEDOM], normal[-FREEDOM:]
        z = z / jnp.sqrt(jnp.mean(rest**2))
        return self.loc + push(self.root, z)

    def terms(self, flat: Float[Array, " d"]) -> tuple[Scalar, Scalar]:
        """Return log base and log ratio at a position."""
        d, z = self.loc.shape[0], push(self.inverse, flat - self.loc)
        diagonal = self.root if self.root.ndim == 1 else jnp.diag(self.root)
        constant = (
            math.lgamma((FREEDOM + d) / 2) - math.lgamma(FREEDOM / 2) - d / 2 * math.log(FREEDOM * math.pi)
        )
        log_base = constant - jnp.sum(jnp.log(diagonal))
        log_base = log_base - (FREEDOM + d) / 2 * jnp.log1p(jnp.sum(z**2) / FREEDOM)
        return log_base, self.logdensity_fn(unflatten(self.like, flat)).astype(flat.dtype) - log_base


def from_prior(target: Target, like: ArrayTree) -> PriorPath:
    """Return the path from the prior of a target that knows it.

    Args:
        target: with a prior.
        like: a position.
    """
    assert target.prior is not None
    is_joint = target.log_likelihood_fn is None
    ratio_fn = target.logdensity_fn if is_joint else target.log_likelihood_fn
    assert ratio_fn is not None
    sample_fn, log_base_fn = as_partial(target.prior.sample), as_partial(target.prior.logdensity_fn)
    return PriorPath(sample_fn, log_base_fn, as_partial(ratio_fn), like, is_joint)


def flatten_one(position: ArrayTree) -> Float[Array, " d"]:
    """Return a position as one vector in the default float type."""
    dtype = jnp.result_type(float)
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(position)])


def unflatten(like: ArrayTree, flat: Float[Array, "*batch d"]) -> ArrayTree:
    """Return the positions of vectors, in the dtypes of ``like``.

    Args:
        like: one position.
        flat: vectors, with any leading axes.
    """
    leaves, structure = jax.tree.flatten(like)
    pieces, start = [], 0
    for leaf in leaves:
        piece = flat[..., start : start + leaf.size]
        pieces.append(piece.reshape(*flat.shape[:-1], *leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return jax.tree.unflatten(structure, pieces)
