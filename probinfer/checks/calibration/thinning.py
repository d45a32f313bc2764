"""How many of the draws of a chain may be ranked against as if they were independent."""

from __future__ import annotations

import jax
import numpy as np

from probinfer.core.types import Array, Float
from probinfer.inference import diagnostics

__all__ = ["LOOKED_AT", "effective_sizes", "needed_thinning"]

LOOKED_AT = 64  # simulations whose autocorrelation is looked at
_INDEPENDENT = 1.25  # draws per effective draw up to which nothing is thinned


@jax.jit
def effective_sizes(values: Float[Array, "S chain draw Q"]) -> Float[Array, "S Q"]:
    """Return the bulk effective sample size of each quantity in each simulation."""
    return jax.lax.map(diagnostics.ess, values)


def needed_thinning(values: Float[Array, "S chain draw Q"]) -> int:
    """Return k such that every k-th draw of a chain is as good as independent, for every quantity.

    Twice the autocorrelation time of the slowest quantity, in the median simulation: by then what is left of the
    correlation no longer bends the ranks. Draws worth at least 80 % of their number stay as they are, as do
    chains too short for a diagnosis.

    Args:
        values: test quantities of some simulations.

    References:
        Talts et al. (2018), section 5.1.
    """
    chains, length = values.shape[1:3]
    sizes = np.asarray(effective_sizes(values))
    known = np.isfinite(sizes).any(axis=0)
    if not known.any():
        return 1
    time = chains * length / np.nanmedian(sizes[:, known], axis=0).min()
    return 1 if time <= _INDEPENDENT else min(int(np.ceil(2 * time)), length)
