"""Hand draws to ArviZ: the same content for its two data models.

ArviZ below 1.0 (the newest for Python 3.11) knows ``InferenceData`` and takes groups as keywords; 1.0 and
above makes an xarray ``DataTree`` from a dictionary of groups. ArviZ is imported only when this is called.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from probinfer.core.errors import import_extra
from probinfer.core.types import ArrayTree
from probinfer.targets.transforms import leaf_names

__all__ = ["export"]

# what the info of a bought sampler is called -> the name ArviZ's plots look for
_ARVIZ_NAMES = {
    "is_divergent": "diverging",
    "acceptance_rate": "acceptance_rate",
    "num_integration_steps": "n_steps",
    "num_leapfrogs": "n_steps",
    "num_trajectory_expansions": "tree_depth",
}


def export(
    draws: ArrayTree,
    log_weights: Any = None,
    info: Any = None,
    log_evidence: Any = None,
    *,
    offset: float = 0.5,
) -> Any:
    """Return ArviZ data with the groups ``posterior`` and, where there is something in it, ``sample_stats``.

    ArviZ knows no weights of draws, so weighted draws are resampled systematically: as many, of equal weights, in their
    order (copies stand side by side, so that its effective sample size sees what the weights cost). The attribute
    ``resampled`` of ``posterior`` says so.

    Args:
        draws: pytree with leaves (chain, draw, ...); the variables are named by their dotted paths.
        log_weights: (chain, draw), unnormalized over both axes together, or None.
        info: pytree; its leaves of shape (chain, draw, ...) are stored in ``sample_stats``, resampled with the draws.
        log_evidence: scalar or None; stored as an attribute of ``posterior``.
        offset: of the points of the systematic scheme, in [0, 1).

    Returns:
        ``arviz.InferenceData`` for ArviZ below 1.0, ``xarray.DataTree`` otherwise.

    Raises:
        MissingExtraError: ArviZ is not installed.
        ValueError: every weight is zero, or one is not a number: there is nothing to resample.
    """
    package = import_extra("arviz", "plots")
    posterior = _variables(draws)
    leading = next(iter(posterior.values())).shape[:2]
    stats = {_ARVIZ_NAMES.get(k, k): v for k, v in _variables(info).items() if v.shape[:2] == leading}
    if log_weights is not None:
        chosen, worth = _ancestors(np.asarray(log_weights, float), offset)
        posterior, stats = (
            {name: value.reshape(-1, *value.shape[2:])[chosen] for name, value in group.items()}
            for group in (posterior, stats)
        )
    groups = {"posterior": posterior} | ({"sample_stats": stats} if stats else {})
    modern = int(package.__version__.split(".")[0]) >= 1
    data = package.from_dict(groups) if modern else package.from_dict(**groups)
    if log_weights is not None:
        data["posterior"].attrs["resampled"] = (
            f"by importance weights that are worth {worth:.1f} of {chosen.size} draws"
        )
    if log_evidence is not None:
        data["posterior"].attrs["log_evidence"] = float(log_evidence)
    return data


def _ancestors(log_weights: np.ndarray, offset: float) -> tuple[np.ndarray, float]:
    """Which draw stands in each place (chain, draw), and how many equally weighted ones the weights are worth.

    Raises:
        ValueError: every weight is zero, or one is not a number.
    """
    largest = np.max(log_weights)
    if not np.isfinite(largest):
        raise ValueError(
            "weighted draws are resampled for ArviZ, but every weight is zero or one is not a number (the largest log "
            f"weight is {largest}); look at posterior.info"
        )
    shares = np.exp(np.ravel(log_weights) - largest)
    shares /= shares.sum()
    points = (np.arange(shares.size) + offset) / shares.size
    positive = np.flatnonzero(shares)
    chosen = positive[
        np.minimum(np.searchsorted(np.cumsum(shares[positive]), points, "right"), len(positive) - 1)
    ]
    return chosen.reshape(log_weights.shape), float(1 / np.sum(shares**2))


def _variables(tree: Any) -> dict[str, np.ndarray]:
    """Name the array leaves; a slash would be read as a path into a group."""
    named = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    return {name.replace("/", "."): np.asarray(leaf) for name, leaf in named if hasattr(leaf, "shape")}
