"""Where a tempered run starts: the prior, or a Student-t fitted to a short run of NUTS."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

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
from probinfer.numerics.covariance_factor import root_of
from probinfer.running.checkpoint import Checkpoint
from probinfer.smc.tempered.bridge import FREEDOM, StudentPath, from_prior
from probinfer.targets import Target

__all__ = ["INFLATION", "STARTS", "Start", "find_start", "fit_student"]

STARTS = ("prior", "student-t")
_CHAINS, _DRAWS = 4, 250
INFLATION = 1.5  # of the covariance


class Start(NamedTuple):
    """The path, the index of its kind in ``STARTS``, and the gradients that finding it took."""

    path: Any
    kind: int
    num_gradients: int


def find_start(
    key: PRNGKey, target: Target, progress: bool | str | None, checkpoint: Checkpoint | None
) -> Start:
    """Choose the base law.

    Args:
        key: random key.
        target: exact.
        progress: for the run of NUTS.
        checkpoint: for the run of NUTS.

    Raises:
        NumericalError: the target has no prior and NUTS finds no start, or its draws do not vary.
    """
    if target.prior is not None:
        one = jax.eval_shape(target.prior.sample, key)
        return Start(from_prior(target, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)), 0, 0)
    advice = (
        "the target has no normalised prior, and no Student-t could be fitted to stand for it: {}. Give the target a "
        "prior (targets.from_prior, or from_numpyro with proper priors), or check that the density is proper"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a start need not have converged; what comes of it is judged
            pilot = NUTS(num_draws=_DRAWS, num_chains=_CHAINS).sample(
                key, target, progress=progress, checkpoint=checkpoint
            )
    except NumericalError as error:
        raise NumericalError(advice.format(error), error.status) from error
    last = jax.tree.map(lambda leaf: leaf[:, -1], to_default_dtype(pilot.unconstrained))
    logdensity_fn = exact_logdensity(target, pilot.unconstrained)
    status, found = tails.doubted(pilot.info.status, logdensity_fn, last, always=True)
    if found:
        raise NumericalError(advice.format(found), status)
    loc, root, inverse = fit_student(flat_position(to_default_dtype(pilot.unconstrained)))
    if not (np.all(np.isfinite(loc)) and np.all(np.isfinite(inverse))):
        raise NumericalError(advice.format("draws of NUTS do not vary in every direction"), Status.NON_FINITE)
    like = jax.tree.map(lambda x: jnp.zeros(x.shape[2:], x.dtype), pilot.unconstrained)
    spent = int(pilot.info.num_warmup_gradients) + int(np.sum(pilot.info.num_leapfrogs))
    return Start(StudentPath(as_partial(target.logdensity_fn), like, loc, root, inverse), 1, spent)


@jax.jit
def fit_student(draws: Float[Array, "chain draw d"]) -> tuple[Array, Array, Array]:
    """Return location (d,), root (d, d) or (d,) of the scale matrix, and inverse root of a Student-t around the draws.

    Args:
        draws: of a few chains, all pooled: chains in different modes widen it.
    """
    flat = draws.reshape(-1, draws.shape[-1])
    first, flat = flat[0], flat - flat[0]  # what does not vary is zero then, without rounding
    equal = jnp.zeros(flat.shape[0], flat.dtype)
    factor = (
        INFLATION * (FREEDOM - 2) / FREEDOM
    ) ** 0.5  # the covariance of the t is df / (df - 2) times its scale
    root = factor * root_of(equal, flat)
    if root.ndim == 1:
        return first + jnp.mean(flat, axis=0), root, 1 / root
    identity = jnp.eye(root.shape[0], dtype=root.dtype)
    return first + jnp.mean(flat, axis=0), root, jax.scipy.linalg.solve_triangular(root, identity, lower=True)
