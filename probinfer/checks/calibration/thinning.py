"""Thinning of chains, so that the draws can be ranked as if they were independent."""

from __future__ import annotations

import jax
import numpy as np

from probinfer.core.types import Array, Float
from probinfer.inference import diagnostics

__all__ = ["MAX_SIMULATIONS", "effective_sizes", "needed_thinning"]

MAX_SIMULATIONS = 64  # simulations whose autocorrelation is measured
_MAX_CORRELATION_TIME = 1.25  # draws per effective draw up to which nothing is thinned


@jax.jit
def effective_sizes(values: Float[Array, "S chain draw Q"]) -> Float[Array, "S Q"]:
    """Return the bulk effective sample size of each quantity in each simulation."""
    return jax.lax.map(diagnostics.ess, values)


def needed_thinning(values: Float[Array, "S chain draw Q"]) -> int:
    """Return k such that every k-th draw of a chain is nearly independent, for every quantity.

    k is twice the autocorrelation time of the slowest quantity, in the median simulation: the remaining correlation no
    longer distorts the ranks. It is 1 if the effective sample size is at least 80 % of the number of draws, or if the
    chains are too short to estimate it.

    Args:
        values: test quantities of some simulations.

    References:
        Talts et al. (2018), section 5.1.
    """
    chains, length = values.shape[1:3]
    sizes = np.asarray(effective_sizes(values))
    finite = np.isfinite(sizes).any(axis=0)
    if not finite.any():
        return 1
    time = chains * length / np.nanmedian(sizes[:, finite], axis=0).min()
    return 1 if time <= _MAX_CORRELATION_TIME else min(int(np.ceil(2 * time)), length)
