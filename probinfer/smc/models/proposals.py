r"""Better proposals and better intermediate targets: transformations of one Feynman-Kac model into another.

Both keep the final target :math:`\gamma_{T-1}` and its normalizing constant. Every algorithm runs on the models that
they return, the conditional ones included.
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
    r"""Propagate by :math:`q_t` instead of :math:`M_t`, and weigh by :math:`G_t M_t / q_t`.

    Args:
        fk: the model, with its ``log_transition``.
        propose: ``propose(key, x, t) -> x_t`` given :math:`x_{t-1}` = x; it may depend on the data.
        log_proposal: ``log_proposal(x_previous, x, t) -> ()``, its log density; positive where the target is.
        init_propose: ``init_propose(key) -> x_0``; None: ``init_sample`` of the model.
        log_init_ratio: ``log_init_ratio(x) -> ()``: log of :math:`M_0(x)/q_0(x)`; required with ``init_propose``.

    Raises:
        ValueError: the model has no ``log_transition``; only one of the last two arguments is given.

    References:
        Doucet, Godsill and Andrieu (2000), section II; Chopin and Papaspiliopoulos (2020), section 10.3.2.
    """
    if fk.log_transition is None:
        raise ValueError(
            "a guided proposal is weighed by the transition density of the model: give log_transition"
        )
    if (init_propose is None) != (log_init_ratio is None):
        raise ValueError("init_propose and log_init_ratio go together: give both or neither")
    log_proposal = as_partial(log_proposal)
    log_init_ratio = None if log_init_ratio is None else as_partial(log_init_ratio)
    return FeynmanKac(
        init_sample=fk.init_sample if init_propose is None else init_propose,
        propagate=propose,
        log_potential=Partial(_guided_potential, fk, log_proposal, log_init_ratio),
        log_transition=log_proposal,
    )


def _guided_potential(
    fk: FeynmanKac, log_proposal: Any, log_init_ratio: Any, x_previous: ArrayTree, x: ArrayTree, t: Array
) -> Array:
    log_potential = fk.log_potential(x_previous, x, t)
    log_ratio = fk.log_transition(x_previous, x, t) - log_proposal(x_previous, x, t)
    log_ratio_at_0 = jnp.zeros_like(log_ratio) if log_init_ratio is None else log_init_ratio(x)
    return log_potential + jnp.where(t == 0, log_ratio_at_0, log_ratio)


def auxiliary(fk: FeynmanKac, log_lookahead: Any, num_steps: int) -> FeynmanKac:
    r"""Resample by first-stage weights :math:`w_t\,\eta_t(x_t)`, and divide by :math:`\eta_t` at the next step.

    The potentials become :math:`G_t\,\eta_t(x_t)/\eta_{t-1}(x_{t-1})`, with :math:`\eta_{T-1}=1`. The best
    :math:`\eta_t` is the expected product of the later potentials.

    Args:
        fk: the model.
        log_lookahead: ``log_lookahead(x, t) -> ()``, t = 0 ... T-2: the log of :math:`\eta_t`; minus infinity only
            for a state that nothing can follow. It is also called with t = T-1, and its value there is not used.
        num_steps: T; the result is a model of exactly T steps.

    Returns:
        The model. Weights of steps before the last contain the lookahead; the last ones and the evidence do not.

    References:
        Pitt and Shephard (1999); Johansen and Doucet (2008), the auxiliary filter as a change of target.
    """
    log_potential = Partial(_auxiliary_potential, fk, as_partial(log_lookahead), jnp.int32(num_steps - 1))
    return FeynmanKac(fk.init_sample, fk.propagate, log_potential, fk.log_transition)


def _auxiliary_potential(
    fk: FeynmanKac, log_lookahead: Any, last: Array, x_previous: ArrayTree, x: ArrayTree, t: Array
) -> Array:
    lookahead = log_lookahead(x, t)
    previous = log_lookahead(x_previous, jnp.maximum(t - 1, 0))
    lookahead = jnp.where(t < last, lookahead, jnp.zeros_like(lookahead))
    # a particle with lookahead zero is dead already: dividing by it would give NaN
    previous = jnp.where((t > 0) & (previous > -jnp.inf), previous, jnp.zeros_like(previous))
    return fk.log_potential(x_previous, x, t) + lookahead - previous


def power(fk: FeynmanKac, inverse_temperature: Any) -> FeynmanKac:
    r"""Return the model with potentials :math:`G_t^\beta`; zero potentials stay zero.

    Args:
        fk: the model.
        inverse_temperature: :math:`\beta\ge 0`, a scalar.
    """
    log_potential = Partial(_power_potential, fk.log_potential, jnp.asarray(inverse_temperature))
    return FeynmanKac(fk.init_sample, fk.propagate, log_potential, fk.log_transition)


def _power_potential(log_potential: Any, beta: Array, x_previous: ArrayTree, x: ArrayTree, t: Array) -> Array:
    value = log_potential(x_previous, x, t)
    dead = value == -jnp.inf  # 0 times minus infinity would be NaN
    return jnp.where(dead, value, beta.astype(value.dtype) * jnp.where(dead, jnp.zeros_like(value), value))
