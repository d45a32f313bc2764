r"""Bridges of densities from an initial distribution, which can be sampled, to a target.

.. math:: \log \pi_t(u) = \log q(u) + t\,\Delta(u), \qquad 0 \le t \le 1,

in unconstrained coordinates, flattened to one vector in the default float type. The initial distribution q is
normalized, so the integral of :math:`\pi_1` is the evidence. If the target knows its prior, q is the prior and
:math:`\Delta` the log likelihood; else q is a multivariate Student-t and :math:`\Delta = \log\gamma - \log q`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.algorithms import as_partial
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey, Scalar, field, pytree
from probinfer.numerics import covariance_factor
from probinfer.targets import Target

__all__ = [
    "DEGREES_OF_FREEDOM",
    "PriorBridge",
    "StudentBridge",
    "bridge_from_prior",
    "flatten_position",
    "unflatten",
]

DEGREES_OF_FREEDOM = 5  # of the Student-t: heavier tails than most posteriors, with four moments


@pytree
class PriorBridge:
    """From the prior to the posterior.

    Attributes:
        sample_fn: key -> position.
        log_prior_fn: position -> log prior, normalized.
        ratio_fn: position -> log likelihood; or the log joint density, if ``is_joint``.
        template: a position: structure, shapes and dtypes.
        is_joint: whether the log prior is to be subtracted.
    """

    sample_fn: Callable
    log_prior_fn: Callable
    ratio_fn: Callable
    template: Any
    is_joint: bool = field(static=True)

    def sample(self, key: PRNGKey) -> Float[Array, " d"]:
        """Draw from the initial distribution."""
        return flatten_position(self.sample_fn(key))

    def terms(self, flat: Float[Array, " d"]) -> tuple[Scalar, Scalar]:
        """Return the initial log density and the log ratio at a position."""
        position = unflatten(self.template, flat)
        log_initial = self.log_prior_fn(position).astype(flat.dtype)
        ratio = self.ratio_fn(position).astype(flat.dtype)
        return log_initial, ratio - log_initial if self.is_joint else ratio


@pytree
class StudentBridge:
    """From a multivariate Student-t to a density.

    Attributes:
        logdensity_fn: position -> unnormalized log density.
        template: a position: structure, shapes and dtypes.
        loc: (d,).
        factor: of the scale matrix, lower triangular (d, d) or diagonal (d,).
        inverse_factor: its inverse, in the same shape.
    """

    logdensity_fn: Callable
    template: Any
    loc: Any
    factor: Any
    inverse_factor: Any

    def sample(self, key: PRNGKey) -> Float[Array, " d"]:
        """Draw from the initial distribution."""
        # z sqrt(df / chi2_df), with the chi-squared as a sum of squared normals: no rejection loop to compile
        normal = jax.random.normal(key, (self.loc.shape[0] + DEGREES_OF_FREEDOM,), self.loc.dtype)
        z, chi_normals = normal[:-DEGREES_OF_FREEDOM], normal[-DEGREES_OF_FREEDOM:]
        z = z / jnp.sqrt(jnp.mean(chi_normals**2))
        return self.loc + covariance_factor.apply(self.factor, z)

    def terms(self, flat: Float[Array, " d"]) -> tuple[Scalar, Scalar]:
        """Return the initial log density and the log ratio at a position."""
        d, z = self.loc.shape[0], covariance_factor.apply(self.inverse_factor, flat - self.loc)
        diagonal = self.factor if self.factor.ndim == 1 else jnp.diag(self.factor)
        constant = (
            math.lgamma((DEGREES_OF_FREEDOM + d) / 2)
            - math.lgamma(DEGREES_OF_FREEDOM / 2)
            - d / 2 * math.log(DEGREES_OF_FREEDOM * math.pi)
        )
        log_initial = constant - jnp.sum(jnp.log(diagonal))
        log_initial = log_initial - (DEGREES_OF_FREEDOM + d) / 2 * jnp.log1p(
            jnp.sum(z**2) / DEGREES_OF_FREEDOM
        )
        return log_initial, self.logdensity_fn(unflatten(self.template, flat)).astype(
            flat.dtype
        ) - log_initial


def bridge_from_prior(target: Target, template: ArrayTree) -> PriorBridge:
    """Return the bridge from the prior of a target to its posterior.

    Args:
        target: with a prior.
        template: a position.
    """
    assert target.prior is not None
    is_joint = target.log_likelihood_fn is None
    ratio_fn = target.logdensity_fn if is_joint else target.log_likelihood_fn
    assert ratio_fn is not None
    return PriorBridge(
        sample_fn=as_partial(target.prior.sample),
        log_prior_fn=as_partial(target.prior.logdensity_fn),
        ratio_fn=as_partial(ratio_fn),
        template=template,
        is_joint=is_joint,
    )


def flatten_position(position: ArrayTree) -> Float[Array, " d"]:
    """Return a position as one vector in the default float type."""
    dtype = jnp.result_type(float)
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(position)])


def unflatten(template: ArrayTree, flat: Float[Array, "*batch d"]) -> ArrayTree:
    """Return the positions of vectors, in the structure and dtypes of the template.

    Args:
        template: one position.
        flat: vectors, with any leading axes.
    """
    leaves, structure = jax.tree.flatten(template)
    pieces, start = [], 0
    for leaf in leaves:
        piece = flat[..., start : start + leaf.size]
        pieces.append(piece.reshape(*flat.shape[:-1], *leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return jax.tree.unflatten(structure, pieces)
