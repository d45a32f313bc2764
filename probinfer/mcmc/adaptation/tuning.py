"""Step size and diagonal metric of one chain, learned transition by transition as Stan does, built from blackjax.

Warm-up and sampling are one loop over the same transition: two loops would be compiled twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.mass_matrix import MassMatrixAdaptationState, mass_matrix_adaptation
from blackjax.adaptation.step_size import DualAveragingAdaptationState, dual_averaging_adaptation
from blackjax.adaptation.window_adaptation import build_schedule

from probinfer.core.trees import select
from probinfer.core.types import Array, Bool, Float, Int

__all__ = ["Tuning", "draw_index", "first_tuning", "is_usable", "learn"]

_FIRST_STEP_SIZE = 1.0


class Tuning(NamedTuple):
    """Step size and metric of one chain, and the state of their adaptation.

    Attributes:
        step_size: of the leapfrog.
        inverse_mass: diagonal of the inverse mass matrix.
        dual: state of the dual averaging of the step size.
        mass: state of the variance estimate.
    """

    step_size: Float[Array, ""]
    inverse_mass: Float[Array, " d"]
    dual: DualAveragingAdaptationState
    mass: MassMatrixAdaptationState


def first_tuning(target_acceptance: Float[Array, ""], position: Float[Array, " d"]) -> Tuning:
    """Return the tuning at the start of the warm-up.

    Args:
        target_acceptance: mean acceptance rate that the step size aims at.
        position: any; only its shape and dtype are used.
    """
    dual_init, _, _ = dual_averaging_adaptation(target_acceptance)
    mass_init, _, _ = mass_matrix_adaptation(True)
    mass = mass_init(len(position))
    step_size = jnp.asarray(_FIRST_STEP_SIZE)
    tuning = Tuning(step_size, mass.inverse_mass_matrix, dual_init(_FIRST_STEP_SIZE), mass)
    return jax.tree.map(lambda leaf: _in_dtype(leaf, position.dtype), tuning)


def learn(
    target_acceptance: Float[Array, ""],
    num_warmup: int,
    tuning: Tuning,
    index: Int[Array, ""],
    position: Float[Array, " d"],
    acceptance: Float[Array, ""],
) -> Tuning:
    """Return the tuning after one transition of the warm-up.

    Args:
        target_acceptance: as in ``first_tuning``.
        num_warmup: transitions of the warm-up.
        tuning: before the transition.
        index: of the transition, from zero.
        position: at the end of the transition.
        acceptance: its acceptance rate.
    """
    dual_init, dual_update, dual_final = dual_averaging_adaptation(target_acceptance)
    _, mass_update, mass_final = mass_matrix_adaptation(True)
    slow, window_ends = jnp.asarray(build_schedule(num_warmup), bool)[index]
    dual = dual_update(tuning.dual, acceptance)
    mass = select(slow, mass_update(tuning.mass, position), tuning.mass)
    # A new metric at the end of a window asks for a new step size: dual averaging starts again.
    mass = select(window_ends, mass_final(mass), mass)
    dual = select(window_ends, dual_init(dual_final(dual)), dual)
    last = index == num_warmup - 1
    step_size = jnp.where(last, dual_final(dual), jnp.exp(dual.log_step_size))
    learned = Tuning(_coarse(step_size), _coarse(mass.inverse_mass_matrix), dual, mass)
    return jax.tree.map(lambda new, old: jnp.asarray(new).astype(old.dtype), learned, tuning)


def is_usable(logdensity: Float[Array, ""], tuning: Tuning) -> Bool[Array, ""]:
    """Return whether the log density is finite and the step size finite and positive."""
    return jnp.isfinite(logdensity) & jnp.isfinite(tuning.step_size) & (tuning.step_size > 0)


def draw_index(index: Int[Array, ""], num_warmup: int, num_draws: int, thin: int) -> Int[Array, ""]:
    """Return the row of the draws that a transition fills; ``num_draws``, beyond the end, if it fills none.

    Args:
        index: of the transition, from zero, warm-up included.
        num_warmup: transitions of the warm-up.
        num_draws: rows.
        thin: transitions per draw.
    """
    count = index - num_warmup + 1
    recorded = (count > 0) & (count % thin == 0)
    return jnp.where(recorded, count // thin - 1, num_draws)


def _coarse(value: Any) -> Array:
    """Round to 12 bits, a part in 4000, so that rounding errors of a trajectory are not fed back through its tuning."""
    value = jnp.asarray(value)
    return jax.lax.reduce_precision(value, jnp.finfo(value.dtype).nexp, 12)


def _in_dtype(leaf: Any, dtype: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.int32)
