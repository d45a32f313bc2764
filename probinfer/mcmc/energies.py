"""What the energies and lengths of trajectories tell of a run: slow energies, cut trajectories, a chain that lies low.

R-hat says that chains disagree and not which one is lost. The Hamiltonian is minus the log density plus a kinetic
energy with mean d / 2 in every chain, so the mean energies of the chains differ by their mean log densities.
"""

from __future__ import annotations

import numpy as np

from probinfer.core.status import Status
from probinfer.core.types import Array, Float
from probinfer.inference import diagnostics
from probinfer.inference.findings import Finding

__all__ = ["cut_trajectories", "lagging_chain", "slow_energies"]

_LEAST_EBFMI = 0.3  # Betancourt (2016); as in Stan and PyMC
_FEW = 100  # draws of a chain that do not tell it
_CUT_SHARE = 0.05
_LOW = 4.0  # standard deviations of the energy


def slow_energies(energy: Float[Array, "chain draw"]) -> Finding | None:
    """Judge E-BFMI: whether new momenta move a chain through the energies of the target.

    Args:
        energy: Hamiltonian at each draw, nats.

    References:
        Betancourt (2016), "Diagnosing suboptimal cotangent disintegrations in Hamiltonian Monte Carlo".
    """
    if energy.shape[1] < _FEW:
        return None
    found = np.asarray(diagnostics.ebfmi(energy))
    if not np.any(found < _LEAST_EBFMI):
        return None
    worst = int(np.nanargmin(found))
    return Finding(
        Status.CHAINS_DISAGREE,
        f"E-BFMI is {found[worst]:.2f} in chain {worst + 1} (below {_LEAST_EBFMI}): the energy hardly changes from "
        "draw to draw, so that heavy tails and narrow necks are visited too rarely",
        "reparametrise (a non-centred form, lighter tails), or run more draws (num_draws)",
    )


def cut_trajectories(tree_depth: Array, diverging: Array, max_tree_depth: int) -> Finding | None:
    """Judge how many trajectories were cut off before they turned.

    Args:
        tree_depth: (chain, draw), doublings.
        diverging: (chain, draw).
        max_tree_depth: the most doublings.
    """
    cut = (np.asarray(tree_depth) >= max_tree_depth) & ~np.asarray(diverging)
    if np.mean(cut) < _CUT_SHARE:
        return None
    return Finding(
        Status.MAX_ITERATIONS,
        f"{int(np.sum(cut))} of {cut.size} trajectories were cut off at max_tree_depth={max_tree_depth} before they "
        "turned back: the draws are valid, but the chains move slowly",
        "reparametrise or rescale the parameters, or raise max_tree_depth",
    )


def lagging_chain(energy: Float[Array, "chain draw"]) -> str:
    """Name the chain whose log density lies furthest below the best, if that is more than its draws scatter.

    Args:
        energy: Hamiltonian at each draw, nats.
    """
    values = np.asarray(energy, float)
    levels, scatter = np.mean(values, axis=1), np.std(values, axis=1)
    below = levels - np.min(levels)
    worst, best = int(np.argmax(below)), int(np.argmin(levels))
    if not below[worst] > _LOW * max(scatter[worst], scatter[best]):
        return ""
    return (
        f"chain {worst + 1} lies {below[worst]:.3g} nats below chain {best + 1} in its mean log density (another "
        "mode, or it did not arrive)"
    )
