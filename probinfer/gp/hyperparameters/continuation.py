"""Continuation of searches that ended because of the sites from which they started.

A search evaluates the approximate evidence from fixed sites, those at the model's own hyperparameters, so that it is a
function of the hyperparameters alone. Far from there the approximation may not converge from these sites although it
has a fixed point, and the search ends at that edge. The sites at its end are a better start, from which it continues.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.status import Status
from probinfer.core.types import PRNGKey
from probinfer.gp.hyperparameters.verification import VerifiedEstimate

__all__ = ["continue_search"]

_MAX_ROUNDS = 4
_START_STDDEV = 0.05  # of the other starts around the end, unconstrained
_STOPPED = (Status.LINE_SEARCH_STALLED, Status.NON_FINITE)
_MIN_GAIN = 1e-6  # of a round, relative to 1 + |log density|


def continue_search(best: VerifiedEstimate, search_from: Callable, key: PRNGKey) -> VerifiedEstimate:
    """Continue from the best end as long as it is an edge of convergence and not a maximum of the evidence.

    Args:
        best: the best end of the search.
        search_from: maps sites, and starts with a leading axis, to the best end of a search from them.
        key: random key, for the starts around the end.

    Returns:
        The best end of all rounds.
    """
    for round_key in jax.random.split(key, _MAX_ROUNDS):
        if int(best.info.status) not in _STOPPED or int(best.solutions.status[0]) != Status.OK:
            break
        index = int(best.info.best)
        starts = _starts_around(
            round_key,
            jax.tree.map(lambda leaf, i=index: leaf[i], best.info.positions),
            len(best.info.values),
        )
        following = search_from(jax.tree.map(lambda leaf: leaf[0], best.solutions.sites), starts)
        before, after = float(best.info.log_density), float(following.info.log_density)
        if not after >= before - _MIN_GAIN * (1 + abs(before)):  # lower, or NaN
            break
        num_evaluations = best.info.num_evaluations + following.info.num_evaluations
        best = following._replace(info=following.info._replace(num_evaluations=num_evaluations))
        if after <= before + _MIN_GAIN * (1 + abs(before)):
            break
    return best


def _starts_around(key: PRNGKey, end: Any, num: int) -> Any:
    """``num`` starts: the end itself, and normal draws around it."""
    leaves, structure = jax.tree.flatten(end)
    starts = []
    for leaf, leaf_key in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
        normal = jax.random.normal(leaf_key, (num, *np.shape(leaf)), jnp.result_type(leaf))
        noise = _START_STDDEV * np.asarray(normal)
        noise[0] = 0
        starts.append(jnp.asarray(np.asarray(leaf) + noise))
    return jax.tree.unflatten(structure, starts)
