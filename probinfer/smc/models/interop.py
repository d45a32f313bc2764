r"""Models of other libraries, as Feynman-Kac models of this one, and back.

Nothing is imported from those libraries: their models are functions, or objects with three methods. ``cuthbert``
counts a state before the first observation, without a potential, and hands each step its own ``model_inputs``;
``dynamax`` observes the first state too, and gives its laws as TensorFlow Probability distributions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from probinfer.core.algorithms import as_partial
from probinfer.core.binding import Bound
from probinfer.core.types import Array, ArrayTree, PRNGKey, pytree, strong_array
from probinfer.smc.models.feynman_kac import FeynmanKac
from probinfer.smc.models.state_space_model import check_series

__all__ = ["CuthbertModel", "from_cuthbert", "from_dynamax", "to_cuthbert"]


class CuthbertModel(NamedTuple):
    """What ``cuthbert.smc.particle_filter.build_filter`` and ``cuthbert.filter`` take.

    Attributes:
        init_sample: ``init_sample(key) -> x``.
        propagate_sample: ``propagate_sample(key, x, inputs) -> x``.
        log_potential: ``log_potential(x_previous, x, inputs) -> ()``.
        model_inputs: leaves with one row a step.
    """

    init_sample: Any
    propagate_sample: Any
    log_potential: Any
    model_inputs: ArrayTree


@pytree
class _Triple:
    propagate: Any
    log_potential: Any
    log_transition: Any
    inputs: Any


def from_cuthbert(
    init_sample: Any,
    propagate_sample: Any,
    log_potential: Any,
    model_inputs: ArrayTree,
    *,
    log_transition: Any = None,
) -> FeynmanKac:
    r"""Return the model whose step t >= 1 takes row t - 1 of the inputs; step 0 has potential one.

    With T rows of inputs there are T + 1 states: filter with ``num_steps=T + 1``, as ``cuthbert.filter`` returns T + 1
    states. A step beyond the inputs has potential NaN.

    Args:
        init_sample: ``init_sample(key) -> x_0``.
        propagate_sample: ``propagate_sample(key, x, inputs) -> x_t``.
        log_potential: ``log_potential(x_previous, x, inputs) -> ()``.
        model_inputs: leaves (T, ...).
        log_transition: ``log_transition(x_previous, x, inputs) -> ()``, the log density of ``propagate_sample``, for
            smoothing; cuthbert's smoother takes its sum with the potential, so this is the difference.

    Raises:
        TypeError: one of the functions is none.
        ValueError: leaves of the inputs differ in length, or there is no row.
    """
    functions = {
        "init_sample": init_sample,
        "propagate_sample": propagate_sample,
        "log_potential": log_potential,
        "log_transition": log_transition,
    }
    for name, fn in functions.items():
        if not callable(fn) and not (fn is None and name == "log_transition"):
            raise TypeError(f"{name} must be a function, got {type(fn).__name__}")
    inputs, _ = check_series(model_inputs, None)
    density = None if log_transition is None else as_partial(log_transition)
    triple = _Triple(as_partial(propagate_sample), as_partial(log_potential), density, inputs)
    return FeynmanKac(
        init_sample,
        Partial(_move_by_inputs, triple),
        Partial(_weigh_by_inputs, triple),
        None if density is None else Partial(_density_by_inputs, triple),
    )


def _row(inputs: ArrayTree, t: Any) -> ArrayTree:
    return jax.tree.map(lambda leaf: leaf[jnp.maximum(t - 1, 0)], inputs)


def _move_by_inputs(triple: _Triple, key: Array, x: ArrayTree, t: Any) -> ArrayTree:
    return triple.propagate(key, x, _row(triple.inputs, t))


def _weigh_by_inputs(triple: _Triple, before: ArrayTree, x: ArrayTree, t: Any) -> Array:
    value = jnp.asarray(triple.log_potential(before, x, _row(triple.inputs, t)))
    length = jax.tree.leaves(triple.inputs)[0].shape[0]
    return jnp.where(t > length, jnp.nan, jnp.where(t == 0, jnp.zeros_like(value), value))


def _density_by_inputs(triple: _Triple, before: ArrayTree, x: ArrayTree, t: Any) -> Array:
    return triple.log_transition(before, x, _row(triple.inputs, t))


def to_cuthbert(fk: Any, num_steps: int) -> CuthbertModel:
    """Return a model for cuthbert's particle filter with the same evidence.

    Its states are x_0 twice, then x_1 ... x_{T-1}: the first of cuthbert's steps moves nothing and brings the
    potential of step 0.

    Args:
        fk: the model.
        num_steps: T, at least 1.

    Raises:
        TypeError: ``fk`` is no ``FeynmanKac``.
        ValueError: ``num_steps`` is below 1.
    """
    if not isinstance(fk, FeynmanKac):
        raise TypeError(
            f"cuthbert moves one particle at a time: expected a smc.FeynmanKac, got {type(fk).__name__}"
        )
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    move = Partial(_stay_first, fk)
    return CuthbertModel(fk.init_sample, move, fk.log_potential, jnp.arange(num_steps, dtype=jnp.int32))


def _stay_first(fk: FeynmanKac, key: Array, x: ArrayTree, t: Any) -> ArrayTree:
    moved = fk.propagate(key, x, jnp.maximum(t, 1))
    return jax.tree.map(lambda new, old: jnp.where(t == 0, old, new), moved, x)


@pytree
class _Dynamax:
    laws: Any  # Bound: (which, state, row of the inputs) -> distribution
    y: Any
    inputs: Any
    observed: Any


def from_dynamax(
    ssm: Any, params: Any, emissions: Any, *, inputs: Any = None, observed: Any = None
) -> FeynmanKac:
    r"""Return the state-space model of a ``dynamax`` object: hidden Markov, linear or nonlinear Gaussian, or your own.

    Any object will do that has the methods ``initial_distribution(params, inputs)``,
    ``transition_distribution(params, state, inputs)`` and ``emission_distribution(params, state, inputs)``, whose
    results have ``sample(seed=key)`` and ``log_prob(value)``. The object is static and compared by equality, ``params``
    are data: new ones of the same shapes trace nothing, functions among them (of a nonlinear model) are static.

    Args:
        ssm: the object, such as ``LinearGaussianSSM(2, 1)``; its methods take no parameters that vary in time.
        params: its parameters.
        emissions: (T, ...). A row that is all NaN is missing; one that is NaN in part has potential NaN.
        inputs: (T, ...) or None.
        observed: booleans (T,), False where a row is missing.

    Raises:
        TypeError: the object has not these methods; ``observed`` is not boolean.
        ValueError: no emissions; inputs or ``observed`` of another length.
    """
    methods = ("initial_distribution", "transition_distribution", "emission_distribution")
    missing = [name for name in methods if not callable(getattr(ssm, name, None))]
    if missing:
        raise TypeError(
            f"{type(ssm).__name__} is no state-space model of dynamax: it has no {', '.join(missing)}; write the model "
            f"as smc.state_space(initial, transition, observation, y)"
        )
    y, observed = check_series(emissions, observed)
    if inputs is not None:
        inputs = strong_array(jnp.asarray(inputs))
        if inputs.shape[:1] != y.shape[:1]:
            raise ValueError(
                f"inputs must have a row for each of the {y.shape[0]} emissions, got {inputs.shape}"
            )
    model = _Dynamax(Bound(_law, ssm, params), y, inputs, observed)
    return FeynmanKac(
        Partial(_foreign_start, model),
        Partial(_foreign_move, model),
        Partial(_foreign_weigh, model),
        Partial(_foreign_density, model),
    )


def _law(ssm: Any, params: Any, which: str, *arguments: Any) -> Any:
    return getattr(ssm, f"{which}_distribution")(params, *arguments)


def _inputs_at(model: _Dynamax, t: Any) -> Any:
    return None if model.inputs is None else model.inputs[t]


def _foreign_start(model: _Dynamax, key: PRNGKey) -> ArrayTree:
    return model.laws("initial", _inputs_at(model, 0)).sample(seed=key)


def _foreign_move(model: _Dynamax, key: PRNGKey, x: ArrayTree, t: Any) -> ArrayTree:
    return model.laws("transition", x, _inputs_at(model, t)).sample(seed=key)


def _foreign_density(model: _Dynamax, before: ArrayTree, x: ArrayTree, t: Any) -> Array:
    return model.laws("transition", before, _inputs_at(model, t)).log_prob(x)


def _foreign_weigh(model: _Dynamax, before: ArrayTree, x: ArrayTree, t: Any) -> Array:
    row = model.y[t]
    absent = jnp.all(jnp.isnan(row)) if jnp.issubdtype(row.dtype, jnp.floating) else jnp.zeros((), bool)
    if model.observed is not None:
        absent = absent | ~model.observed[t]
    value = model.laws("emission", x, _inputs_at(model, t)).log_prob(
        jnp.where(absent, jnp.zeros_like(row), row)
    )
    value = jnp.where(absent, jnp.zeros_like(value), value)
    return jnp.where(t < model.y.shape[0], value, jnp.nan)
