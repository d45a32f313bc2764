"""Step size and diagonal metric of one chain, learned transition by transition as Stan does, by blackjax's parts.

Warm-up and sampling are one loop over the same transition: compiled once, where two loops would be compiled twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.mass_matrix import mass_matrix_adaptation
from blackjax.adaptation.step_size import dual_averaging_adaptation
from blackjax.adaptation.window_adaptation import build_schedule

from probinfer.core.types import Array, Bool, Float, Int

__all__ = ["Tuning", "first_tuning", "learn", "row_of", "sound"]

_FIRST_STEP_SIZE = 1.0


class Tuning(NamedTuple):
    """Step size and inverse mass (d,), and what the warm-up keeps to improve them."""

    step_size: Any
    inverse_mass: Any
    dual: Any
    mass: Any


def first_tuning(target_acceptance: Float[Array, ""], position: Float[Array, " d"]) -> Tuning:
    """Return what the warm-up starts with.

    Args:
        target_acceptance: mean acceptance rate that the step size aims at.
        position: any; its shape and dtype are used.
    """
    dual_init, _, _ = dual_averaging_adaptation(target_acceptance)
    mass_init, _, _ = mass_matrix_adaptation(True)
    mass = mass_init(len(position))
    tuning = Tuning(_FIRST_STEP_SIZE, mass.inverse_mass_matrix, dual_init(_FIRST_STEP_SIZE), mass)
    return jax.tree.map(lambda leaf: _in_dtype(leaf, position.dtype), tuning)


def learn(
    target_acceptance: Float[Array, ""],
    num_warmup: int,
    tuning: Tuning,
    number: Int[Array, ""],
    position: Float[Array, " d"],
    acceptance: Float[Array, ""],
) -> Tuning:
    """Return the tuning after one transition of the warm-up.

    Args:
        target_acceptance: as in ``first_tuning``.
        num_warmup: transitions of the warm-up.
        tuning: before.
        number: of the transition, from zero.
        position: where it ended.
        acceptance: its acceptance rate.
    """
    dual_init, dual_update, dual_final = dual_averaging_adaptation(target_acceptance)
    _, mass_update, mass_final = mass_matrix_adaptation(True)
    slow, window_over = jnp.asarray(build_schedule(num_warmup), bool)[number]
    dual = dual_update(tuning.dual, acceptance)
    mass = _choose(slow, mass_update(tuning.mass, position), tuning.mass)
    mass = _choose(window_over, mass_final(mass), mass)
    dual = _choose(window_over, dual_init(dual_final(dual)), dual)
    last = number == num_warmup - 1
    step_size = jnp.where(last, dual_final(dual), jnp.exp(dual.log_step_size))
    learned = Tuning(_coarse(step_size), _coarse(mass.inverse_mass_matrix), dual, mass)
    return jax.tree.map(lambda new, old: jnp.asarray(new).astype(old.dtype), learned, tuning)


def sound(logdensity: Float[Array, ""], tuning: Tuning) -> Bool[Array, ""]:
    """Whether log density and step size are usable."""
    return jnp.isfinite(logdensity) & jnp.isfinite(tuning.step_size) & (tuning.step_size > 0)


def row_of(number: Int[Array, ""], num_warmup: int, num_draws: int, thin: int) -> Int[Array, ""]:
    """Where the draw of a transition, counted from zero, goes; ``num_draws``, beyond the end, if it is not kept."""
    number = number - num_warmup + 1
    kept = (number > 0) & (number % thin == 0)
    return jnp.where(kept, number // thin - 1, num_draws)


def _choose(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _coarse(value: Any) -> Array:
    """Rounded to a part in four thousand, so that the last bits of a trajectory do not come back through its tuning."""
    value = jnp.asarray(value)
    return jax.lax.reduce_precision(value, jnp.finfo(value.dtype).nexp, 12)


def _in_dtype(leaf: Any, dtype: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.int32)
