"""Searches that go on from where they were stopped by the sites that they started at.

A search evaluates the approximate evidence from fixed sites, those at the model's own hyperparameters, so that it is a
function of the hyperparameters alone. Far from there the approximation may not converge from these sites although it
has a fixed point, and the search ends at that edge. The sites at its end are a better start: from them it goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.status import Status
from probinfer.core.types import PRNGKey
from probinfer.gp.hyperparameters.verification import Verified

__all__ = ["continued"]

_ROUNDS = 4
_NEAR = 0.05  # standard deviation of the other starts about the end, unconstrained
_STOPPED = (Status.LINE_SEARCH_STALLED, Status.NON_FINITE)
_GAIN = 1e-6  # relative: what a round has to add


def continued(ended: Verified, search_from: Callable, key: PRNGKey) -> Verified:
    """Go on from the best end while it is none of the evidence but of the sites that the search started at.

    Args:
        ended: the best end of the search.
        search_from: sites, and starts with a leading axis, to the best end of a search with these.
        key: of the starts beside the end.

    Returns:
        The best end of all: the last one where a search converged.
    """
    for round_key in jax.random.split(key, _ROUNDS):
        if int(ended.info.status) not in _STOPPED or int(ended.settled.status[0]) != Status.OK:
            break
        best = int(ended.info.best)
        starts = _about(
            round_key,
            jax.tree.map(lambda leaf, i=best: leaf[i], ended.info.positions),
            len(ended.info.values),
        )
        found = search_from(jax.tree.map(lambda leaf: leaf[0], ended.settled.sites), starts)
        before, after = float(ended.info.log_density), float(found.info.log_density)
        if not after >= before - _GAIN * (1 + abs(before)):
            break
        spent = ended.info.num_evaluations + found.info.num_evaluations
        ended = found._replace(info=found.info._replace(num_evaluations=spent))
        if after <= before + _GAIN * (1 + abs(before)):
            break
    return ended


def _about(key: PRNGKey, end: Any, num: int) -> Any:
    """The end, and others near it."""
    leaves, structure = jax.tree.flatten(end)
    drawn = []
    for leaf, one in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
        noise = _NEAR * np.asarray(jax.random.normal(one, (num, *np.shape(leaf)), jnp.result_type(leaf)))
        noise[0] = 0
        drawn.append(jnp.asarray(np.asarray(leaf) + noise))
    return jax.tree.unflatten(structure, drawn)
