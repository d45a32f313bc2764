"""What a sampler made for many data sets says of one chain."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from probinfer.core.status import Status
from probinfer.core.types import Array, Float
from probinfer.inference import diagnostics

__all__ = ["SamplerInfo", "sampler_info"]

_DIVERGENT_SHARE = 1e-3


class SamplerInfo(NamedTuple):
    """One data set's chain.

    Attributes:
        status: ``NON_FINITE`` where the start or the warm-up has no finite log density or step size;
            ``DIVERGENT_TRANSITIONS`` where one draw in a thousand or more came from a diverging trajectory.
        num_gradients: of warm-up and draws together.
        num_divergences: after warm-up.
        num_capped: trajectories after warm-up that were cut off by ``max_depth``; none with HMC. They are valid, but
            many of them mean that the chain moves more slowly than it could.
        acceptance_rate: mean, after warm-up.
        ess: smallest bulk effective sample size of an unconstrained coordinate.
        step_size: frozen.
    """

    status: Any
    num_gradients: Any
    num_divergences: Any
    num_capped: Any
    acceptance_rate: Any
    ess: Any
    step_size: Any


def sampler_info(
    draws: Float[Array, "L d"],
    finite: Array,
    num_transitions: int,
    *,
    num_gradients: Array | int,
    num_divergences: Array,
    num_capped: Array | int,
    acceptance_rate: Array,
    step_size: Array,
) -> SamplerInfo:
    """Judge a chain.

    Args:
        draws: unconstrained.
        finite: whether start and warm-up were.
        num_transitions: after warm-up.
        num_gradients: as in ``SamplerInfo``, like all that follow.
        num_divergences: of the transitions.
        num_capped: of the transitions.
        acceptance_rate: mean.
        step_size: frozen.
    """
    many = num_divergences >= _DIVERGENT_SHARE * num_transitions
    status = jnp.where(many, Status.DIVERGENT_TRANSITIONS, Status.OK)
    return SamplerInfo(
        jnp.where(finite, status, Status.NON_FINITE).astype(jnp.int32),
        jnp.asarray(num_gradients, jnp.int32),
        jnp.asarray(num_divergences, jnp.int32),
        jnp.asarray(num_capped, jnp.int32),
        acceptance_rate,
        jnp.min(diagnostics.ess(draws[None])),
        step_size,
    )
