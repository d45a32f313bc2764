"""Subjects of the suite for the state-space engines, tested on a model whose posterior is known."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from probinfer import smc
from probinfer.app.pages.engines import STATE_SPACE_ENGINES, EngineEntry
from probinfer.app.suite.known_states import StateSpace, noisy_autoregression
from probinfer.app.suite.suite import Subject
from probinfer.core.types import Array, ArrayTree, Scalar
from probinfer.inference.posterior import Posterior

__all__ = ["as_parameters", "state_space_subjects"]

_THINNING = 8  # transitions for each stored draw: the chains of these engines are strongly autocorrelated


def as_parameters(model: StateSpace) -> smc.Parameters:
    """Convert a known model to the input of the engines.

    Args:
        model: as in ``known_states``.
    """
    model_fn = Partial(_model, model.initial, Partial(model.transition), Partial(model.observation), model.y)
    log_initial = Partial(_log_initial, model.initial)
    return smc.Parameters(model.priors, model_fn, len(model.y), log_initial)


def _model(
    initial: Any, transition: Any, observation: Any, y: Array, parameters: ArrayTree
) -> smc.FeynmanKac:
    return smc.state_space(initial, Partial(transition.func, parameters), observation, y)


def _log_initial(initial: Any, parameters: ArrayTree, x: Array) -> Scalar:
    del parameters
    return initial.log_prob(x)


def state_space_subjects(draws: int, entries: Sequence[EngineEntry] = STATE_SPACE_ENGINES) -> list[Subject]:
    """Return the engines of a table, each to be tested on the noisy autoregression.

    Args:
        draws: number of draws per chain, after thinning.
        entries: as in ``pages.engines``.
    """
    model = noisy_autoregression()
    parameters = as_parameters(model)
    return [
        Subject(
            entry.label,
            functools.partial(_sample, entry.make(_THINNING * draws), parameters, draws),
            quick=False,
            target=model.known,
        )
        for entry in entries
    ]


def _sample(engine: Any, parameters: smc.Parameters, draws: int, key: Any, target: Any) -> Posterior:
    """Sample, thin each chain to ``draws`` draws, and stack the parameters into one array."""
    del target  # the posterior of ``parameters``, with the states integrated out
    posterior = engine.sample(key, parameters, progress=False)
    leaves = jax.tree.leaves(posterior.unconstrained)
    stride = max(1, leaves[0].shape[1] // draws) if posterior.log_weights is None else 1
    positions = jnp.stack([leaf[:, ::stride] for leaf in leaves], axis=-1)
    return Posterior(positions, posterior.log_weights, unconstrained=positions)
