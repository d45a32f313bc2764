"""The engines for state-space models, as the suite of checks judges them: on a model whose posterior is known."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from probinfer import smc
from probinfer.app.pages.engines import STATE_SPACE_ENGINES, Entry
from probinfer.app.suite.known_states import StateSpace, noisy_autoregression
from probinfer.app.suite.suite import Subject
from probinfer.core.types import Array, ArrayTree, Scalar
from probinfer.inference.posterior import Posterior

__all__ = ["as_parameters", "state_space_subjects"]

_THIN = 8  # transitions a draw that is kept, for engines whose draws are slow to forget


def as_parameters(model: StateSpace) -> smc.Parameters:
    """Write a known model as the engines take it.

    Args:
        model: as in ``checks.known_states``.
    """
    model_fn = Partial(_model, model.initial, Partial(model.transition), Partial(model.observation), model.y)
    log_initial = Partial(_log_initial, model.initial)
    return smc.Parameters(model.priors, model_fn, len(model.y), log_initial)


def _model(initial: Any, transition: Any, observation: Any, y: Array, theta: ArrayTree) -> smc.FeynmanKac:
    return smc.state_space(initial, Partial(transition.func, theta), observation, y)


def _log_initial(initial: Any, theta: ArrayTree, x: Array) -> Scalar:
    del theta
    return initial.log_prob(x)


def state_space_subjects(draws: int, entries: Sequence[Entry] = STATE_SPACE_ENGINES) -> list[Subject]:
    """The engines of a table, each judged on the noisy autoregression.

    Args:
        draws: of a chain, after thinning.
        entries: as in ``report.engines``.
    """
    model = noisy_autoregression()
    parameters = as_parameters(model)
    return [
        Subject(
            entry.label,
            functools.partial(_sample, entry.make(_THIN * draws), parameters, draws),
            quick=False,
            target=model.known,
        )
        for entry in entries
    ]


def _sample(engine: Any, parameters: smc.Parameters, draws: int, key: Any, target: Any) -> Posterior:
    """Draw, keep so many draws of a chain, and write positions as one array."""
    del target  # the same model, with its states integrated out
    posterior = engine.sample(key, parameters, progress=False)
    leaves = jax.tree.leaves(posterior.unconstrained)
    every = max(1, leaves[0].shape[1] // draws) if posterior.log_weights is None else 1
    positions = jnp.stack([leaf[:, ::every] for leaf in leaves], axis=-1)
    return Posterior(positions, posterior.log_weights, unconstrained=positions)
