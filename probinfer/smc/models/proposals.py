r"""Better proposals and better intermediate targets: transformations of one Feynman-Kac model into another.

Both keep the final target :math:`\gamma_{T-1}` and its normaliser, so every algorithm runs on what they return, the
conditional ones included.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.tree_util import Partial

from probinfer.core.algorithms import as_partial
from probinfer.core.types import Array, ArrayTree
from probinfer.smc.models.feynman_kac import FeynmanKac

__all__ = ["auxiliary", "guided", "power"]


def guided(
    fk: FeynmanKac,
    propose: Any,
    log_proposal: Any,
    *,
    init_propose: Any = None,
    log_init_ratio: Any = None,
) -> FeynmanKac:
    r"""Move by :math:`q_t` instead of :math:`M_t`, and weigh by :math:`G_t M_t / q_t`.

    Args:
        fk: the model, with its ``log_transition``.
        propose: ``propose(key, x, t) -> x_t`` given :math:`x_{t-1}` = x; it may look at the data.
        log_proposal: ``log_proposal(x_previous, x, t) -> ()``, its log density; positive where the target is.
        init_propose: ``init_propose(key) -> x_0``; None: as the model.
        log_init_ratio: ``log_init_ratio(x) -> ()``: log of :math:`M_0(x)/q_0(x)`; goes with ``init_propose``.

    Raises:
        ValueError: the model has no ``log_transition``; one of the last two arguments comes alone.

    References:
        Doucet, Godsill and Andrieu (2000), section II; Chopin and Papaspiliopoulos (2020), section 10.3.2.
    """
    if fk.log_transition is None:
        raise ValueError("a guided proposal is corrected by the density of the model's: give log_transition")
    if (init_propose is None) != (log_init_ratio is None):
        raise ValueError("init_propose and log_init_ratio go together: give both or neither")
    log_proposal = as_partial(log_proposal)
    ratio = None if log_init_ratio is None else as_partial(log_init_ratio)
    return FeynmanKac(
        fk.init_sample if init_propose is None else init_propose,
        propose,
        Partial(_guided_potential, fk, log_proposal, ratio),
        log_proposal,
    )


def _guided_potential(
    fk: FeynmanKac, log_proposal: Any, log_init_ratio: Any, before: ArrayTree, x: ArrayTree, t: Array
) -> Array:
    log_potential = fk.log_potential(before, x, t)
    later = fk.log_transition(before, x, t) - log_proposal(before, x, t)
    first = jnp.zeros_like(later) if log_init_ratio is None else log_init_ratio(x)
    return log_potential + jnp.where(t == 0, first, later)


def auxiliary(fk: FeynmanKac, log_lookahead: Any, num_steps: int) -> FeynmanKac:
    r"""Resample by first-stage weights :math:`w_t\,\eta_t(x_t)`, and take them back at the next step.

    The potentials become :math:`G_t\,\eta_t(x_t)/\eta_{t-1}(x_{t-1})`, with :math:`\eta_{T-1}=1`. The best
    :math:`\eta_t` is the expected product of the potentials to come.

    Args:
        fk: the model.
        log_lookahead: ``log_lookahead(x, t) -> ()``, t = 0 ... T-2: the log of :math:`\eta_t`; minus infinity only
            where nothing can follow. It is called with t = T-1 too, and what it returns then is not used.
        num_steps: T; the result is a model of just so many steps.

    Returns:
        The model. Weights of steps before the last contain the lookahead; the last ones and the evidence do not.

    References:
        Pitt and Shephard (1999); Johansen and Doucet (2008), the auxiliary filter as a change of target.
    """
    potential = Partial(_auxiliary_potential, fk, as_partial(log_lookahead), jnp.int32(num_steps - 1))
    return FeynmanKac(fk.init_sample, fk.propagate, potential, fk.log_transition)


def _auxiliary_potential(
    fk: FeynmanKac, log_lookahead: Any, last: Array, before: ArrayTree, x: ArrayTree, t: Array
) -> Array:
    ahead, behind = log_lookahead(x, t), log_lookahead(before, jnp.maximum(t - 1, 0))
    ahead = jnp.where(t < last, ahead, jnp.zeros_like(ahead))
    # a particle without a future is dead already: nothing is taken back from it
    behind = jnp.where((t > 0) & (behind > -jnp.inf), behind, jnp.zeros_like(behind))
    return fk.log_potential(before, x, t) + ahead - behind


def power(fk: FeynmanKac, inverse_temperature: Any) -> FeynmanKac:
    r"""Return the model with potentials :math:`G_t^\beta`; zero potentials stay zero.

    Args:
        fk: the model.
        inverse_temperature: :math:`\beta\ge 0`, a scalar.
    """
    potential = Partial(_power_potential, fk.log_potential, jnp.asarray(inverse_temperature))
    return FeynmanKac(fk.init_sample, fk.propagate, potential, fk.log_transition)


def _power_potential(log_potential: Any, beta: Array, before: ArrayTree, x: ArrayTree, t: Array) -> Array:
    value = log_potential(before, x, t)
    dead = value == -jnp.inf
    return jnp.where(dead, value, beta.astype(value.dtype) * jnp.where(dead, jnp.zeros_like(value), value))
