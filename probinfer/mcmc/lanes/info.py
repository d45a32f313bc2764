"""The report on one chain of a sampler for many data sets."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from probinfer.core.status import Status
from probinfer.core.types import Array, Bool, Float, Int
from probinfer.inference import diagnostics

__all__ = ["SamplerInfo", "sampler_info"]

_DIVERGENT_SHARE = 1e-3


class SamplerInfo(NamedTuple):
    """Report on the chain of one data set.

    Attributes:
        status: ``NON_FINITE`` if the log density or the step size was not finite at the start or later;
            ``DIVERGENT_TRANSITIONS`` if one transition in a thousand or more diverged after warm-up.
        num_gradients: of warm-up and draws together.
        num_divergences: after warm-up.
        num_capped: trajectories after warm-up that were cut off at ``max_depth``; zero for HMC. Their draws are valid,
            but many of them mean that the chain moves more slowly than it could.
        acceptance_rate: mean, after warm-up.
        ess: smallest bulk effective sample size over unconstrained coordinates.
        step_size: frozen after warm-up.
    """

    status: Int[Array, ""]
    num_gradients: Int[Array, ""]
    num_divergences: Int[Array, ""]
    num_capped: Int[Array, ""]
    acceptance_rate: Float[Array, ""]
    ess: Float[Array, ""]
    step_size: Float[Array, ""]


def sampler_info(
    draws: Float[Array, "L d"],
    finite: Bool[Array, ""],
    num_transitions: int,
    *,
    num_gradients: Array | int,
    num_divergences: Array,
    num_capped: Array | int,
    acceptance_rate: Array,
    step_size: Array,
) -> SamplerInfo:
    """Build the report of a chain and judge it.

    Args:
        draws: unconstrained positions.
        finite: whether log density and step size were usable throughout.
        num_transitions: after warm-up.
        num_gradients: as in ``SamplerInfo``, like all that follow.
        num_divergences: after warm-up.
        num_capped: after warm-up.
        acceptance_rate: mean.
        step_size: frozen.
    """
    too_many = num_divergences >= _DIVERGENT_SHARE * num_transitions
    status = jnp.where(too_many, Status.DIVERGENT_TRANSITIONS, Status.OK)
    return SamplerInfo(
        status=jnp.where(finite, status, Status.NON_FINITE).astype(jnp.int32),
        num_gradients=jnp.asarray(num_gradients, jnp.int32),
        num_divergences=jnp.asarray(num_divergences, jnp.int32),
        num_capped=jnp.asarray(num_capped, jnp.int32),
        acceptance_rate=acceptance_rate,
        ess=jnp.min(diagnostics.ess(draws[None])),
        step_size=step_size,
    )
