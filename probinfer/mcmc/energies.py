"""Diagnostics of energies and trajectory lengths: low E-BFMI, truncated trajectories, a chain of low log density.

R-hat says that chains disagree but not which one is lost. The Hamiltonian is minus the log density plus a kinetic
energy with mean d / 2 in every chain, so the mean energies of the chains differ by their mean log densities.
"""

from __future__ import annotations

import numpy as np

from probinfer.core.status import Status
from probinfer.core.types import Array, Float
from probinfer.inference import diagnostics
from probinfer.inference.findings import Finding

__all__ = ["low_density_chain", "low_ebfmi", "truncated_trajectories"]

_MIN_EBFMI = 0.3  # Betancourt (2016); as in Stan and PyMC
_MIN_DRAWS = 100  # of a chain, for an estimate of E-BFMI
_MAX_TRUNCATED_SHARE = 0.05
_MIN_SEPARATION = 4.0  # standard deviations of the energy


def low_ebfmi(energy: Float[Array, "chain draw"]) -> Finding | None:
    """Judge E-BFMI: whether new momenta move a chain through the energies of the target.

    Args:
        energy: Hamiltonian at each draw, nats.

    Returns:
        The finding; None if E-BFMI is high enough in every chain, or there are too few draws to tell.

    References:
        Betancourt (2016), "Diagnosing suboptimal cotangent disintegrations in Hamiltonian Monte Carlo".
    """
    if energy.shape[1] < _MIN_DRAWS:
        return None
    ebfmi = np.asarray(diagnostics.ebfmi(energy))
    if not np.any(ebfmi < _MIN_EBFMI):
        return None
    lowest = int(np.nanargmin(ebfmi))
    return Finding(
        Status.CHAINS_DISAGREE,
        f"E-BFMI is {ebfmi[lowest]:.2f} in chain {lowest + 1} (below {_MIN_EBFMI}): the energy hardly changes from "
        "draw to draw, so that heavy tails and narrow necks are visited too rarely",
        "reparametrize (a non-centered form, lighter tails), or run more draws (num_draws)",
    )


def truncated_trajectories(tree_depth: Array, diverging: Array, max_tree_depth: int) -> Finding | None:
    """Judge how many trajectories were cut off before they turned back.

    Args:
        tree_depth: (chain, draw), doublings.
        diverging: (chain, draw), whether the trajectory diverged.
        max_tree_depth: maximum number of doublings.

    Returns:
        The finding; None if few trajectories were cut off.
    """
    truncated = (np.asarray(tree_depth) >= max_tree_depth) & ~np.asarray(diverging)
    if np.mean(truncated) < _MAX_TRUNCATED_SHARE:
        return None
    return Finding(
        Status.MAX_ITERATIONS,
        f"{int(np.sum(truncated))} of {truncated.size} trajectories were cut off at max_tree_depth={max_tree_depth} "
        "before they turned back: the draws are valid, but the chains move slowly",
        "reparametrize or rescale the parameters, or raise max_tree_depth",
    )


def low_density_chain(energy: Float[Array, "chain draw"]) -> str:
    """Name the chain of the lowest mean log density, if it lies below the best by more than its draws scatter.

    Args:
        energy: Hamiltonian at each draw, nats.

    Returns:
        A clause of a message; empty if the chains are of similar log density.
    """
    values = np.asarray(energy, float)
    means, deviations = np.mean(values, axis=1), np.std(values, axis=1)
    deficits = means - np.min(means)
    lowest, best = int(np.argmax(deficits)), int(np.argmin(means))
    if not deficits[lowest] > _MIN_SEPARATION * max(deviations[lowest], deviations[best]):
        return ""
    return (
        f"chain {lowest + 1} lies {deficits[lowest]:.3g} nats below chain {best + 1} in its mean log density (it is "
        "in another mode, or has not reached the typical set)"
    )
