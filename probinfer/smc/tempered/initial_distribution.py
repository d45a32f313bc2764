"""The distribution that a tempered run starts from: the prior, or a Student-t fitted to a short run of NUTS."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.algorithms import as_partial
from probinfer.core.errors import NumericalError
from probinfer.core.status import Status
from probinfer.core.types import Array, Float, PRNGKey
from probinfer.inference import tails
from probinfer.inference.engine import exact_logdensity, flat_position, to_default_dtype
from probinfer.mcmc import NUTS
from probinfer.numerics import covariance_factor
from probinfer.running.checkpoint import Checkpoint
from probinfer.smc.tempered.bridge import (
    DEGREES_OF_FREEDOM,
    PriorBridge,
    StudentBridge,
    bridge_from_prior,
)
from probinfer.targets import Target

__all__ = [
    "COVARIANCE_INFLATION",
    "INITIAL_DISTRIBUTIONS",
    "InitialDistribution",
    "find_initial_distribution",
    "fit_student",
]

INITIAL_DISTRIBUTIONS = ("prior", "student-t")
_NUM_CHAINS, _NUM_DRAWS = 4, 250
COVARIANCE_INFLATION = 1.5


class InitialDistribution(NamedTuple):
    """Where a tempered run starts.

    Attributes:
        bridge: from this distribution to the target.
        kind: index in ``INITIAL_DISTRIBUTIONS``.
        num_gradients: evaluations that were needed to find it.
    """

    bridge: PriorBridge | StudentBridge
    kind: int
    num_gradients: int

    @property
    def name(self) -> str:
        """One of ``INITIAL_DISTRIBUTIONS``."""
        return INITIAL_DISTRIBUTIONS[self.kind]


def find_initial_distribution(
    key: PRNGKey, target: Target, progress: bool | str | None, checkpoint: Checkpoint | None
) -> InitialDistribution:
    """Return the prior of the target, or fit a Student-t if it has none.

    Args:
        key: random key.
        target: exact.
        progress: for the run of NUTS.
        checkpoint: for the run of NUTS.

    Raises:
        NumericalError: the target has no prior, and NUTS finds no start or its draws do not vary.
    """
    # Take the prior
    if target.prior is not None:
        shapes = jax.eval_shape(target.prior.sample, key)
        template = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return InitialDistribution(bridge_from_prior(target, template), 0, 0)
    message = (
        "the target has no normalized prior, and no Student-t could be fitted to stand for it: {}. Give the target a "
        "prior (targets.from_prior, or from_numpyro with proper priors), or check that the density is proper"
    )
    # Sample by NUTS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # this run need not converge: the tempered run is judged by itself
            pilot = NUTS(num_draws=_NUM_DRAWS, num_chains=_NUM_CHAINS).sample(
                key, target, progress=progress, checkpoint=checkpoint
            )
    except NumericalError as error:
        raise NumericalError(message.format(error), error.status) from error
    # Refuse an improper density
    last = jax.tree.map(lambda leaf: leaf[:, -1], to_default_dtype(pilot.unconstrained))
    logdensity_fn = exact_logdensity(target, pilot.unconstrained)
    status, reason = tails.doubted(pilot.info.status, logdensity_fn, last, always=True)
    if reason:
        raise NumericalError(message.format(reason), status)
    # Fit the Student-t
    loc, factor, inverse_factor = fit_student(flat_position(to_default_dtype(pilot.unconstrained)))
    if not (np.all(np.isfinite(loc)) and np.all(np.isfinite(inverse_factor))):
        raise NumericalError(
            message.format("draws of NUTS do not vary in every direction"), Status.NON_FINITE
        )
    bridge = StudentBridge(
        logdensity_fn=as_partial(target.logdensity_fn),
        template=jax.tree.map(lambda x: jnp.zeros(x.shape[2:], x.dtype), pilot.unconstrained),
        loc=loc,
        factor=factor,
        inverse_factor=inverse_factor,
    )
    num_gradients = int(pilot.info.num_warmup_gradients) + int(np.sum(pilot.info.num_leapfrogs))
    return InitialDistribution(bridge, 1, num_gradients)


@jax.jit
def fit_student(draws: Float[Array, "chain draw d"]) -> tuple[Array, Array, Array]:
    """Fit a Student-t to draws.

    Args:
        draws: of a few chains, all pooled: chains in different modes widen it.

    Returns:
        Location (d,), factor (d, d) or (d,) of the scale matrix, and the inverse of the factor.
    """
    flat = draws.reshape(-1, draws.shape[-1])
    # Subtract the first draw: a coordinate that does not vary is then exactly zero, without rounding.
    first, flat = flat[0], flat - flat[0]
    log_weights = jnp.zeros(flat.shape[0], flat.dtype)
    # The covariance of a Student-t is df / (df - 2) times its scale matrix.
    scale = (COVARIANCE_INFLATION * (DEGREES_OF_FREEDOM - 2) / DEGREES_OF_FREEDOM) ** 0.5
    factor = scale * covariance_factor.estimate(log_weights, flat)
    loc = first + jnp.mean(flat, axis=0)
    if factor.ndim == 1:
        return loc, factor, 1 / factor
    identity = jnp.eye(factor.shape[0], dtype=factor.dtype)
    return loc, factor, jax.scipy.linalg.solve_triangular(factor, identity, lower=True)
