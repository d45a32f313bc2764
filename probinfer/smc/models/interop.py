r"""Conversion between models of other libraries and Feynman-Kac models.

Nothing is imported from those libraries: their models are functions, or objects with three methods. ``cuthbert``
has a state before the first observation, without a potential, and passes each step its own ``model_inputs``;
``dynamax`` also observes the first state, and gives TensorFlow Probability distributions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from probinfer.core.algorithms import as_partial
from probinfer.core.binding import Bound
from probinfer.core.trees import select
from probinfer.core.types import Array, ArrayTree, PRNGKey, pytree, strong_array
from probinfer.smc.models.feynman_kac import FeynmanKac
from probinfer.smc.models.state_space_model import check_series

__all__ = ["CuthbertModel", "from_cuthbert", "from_dynamax", "to_cuthbert"]


class CuthbertModel(NamedTuple):
    """The arguments of ``cuthbert.smc.particle_filter.build_filter`` and ``cuthbert.filter``.

    Attributes:
        init_sample: ``init_sample(key) -> x``.
        propagate_sample: ``propagate_sample(key, x, inputs) -> x``.
        log_potential: ``log_potential(x_previous, x, inputs) -> ()``.
        model_inputs: leaves with one row per step.
    """

    init_sample: Any
    propagate_sample: Any
    log_potential: Any
    model_inputs: ArrayTree


@pytree
class _CuthbertFunctions:
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

    With T rows of inputs there are T + 1 states, as in ``cuthbert.filter``: filter with ``num_steps=T + 1``. A step
    beyond the inputs has potential NaN.

    Args:
        init_sample: ``init_sample(key) -> x_0``.
        propagate_sample: ``propagate_sample(key, x, inputs) -> x_t``.
        log_potential: ``log_potential(x_previous, x, inputs) -> ()``.
        model_inputs: leaves (T, ...).
        log_transition: ``log_transition(x_previous, x, inputs) -> ()``, the log density of ``propagate_sample``, for
            smoothing. The smoother of cuthbert takes the sum of this and the log potential instead.

    Raises:
        TypeError: one of the functions is not callable.
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
    model = _CuthbertFunctions(
        propagate=as_partial(propagate_sample),
        log_potential=as_partial(log_potential),
        log_transition=None if log_transition is None else as_partial(log_transition),
        inputs=inputs,
    )
    return FeynmanKac(
        init_sample=init_sample,
        propagate=Partial(_cuthbert_propagate, model),
        log_potential=Partial(_cuthbert_log_potential, model),
        log_transition=None if log_transition is None else Partial(_cuthbert_log_transition, model),
    )


def _inputs_of_step(inputs: ArrayTree, t: Any) -> ArrayTree:
    return jax.tree.map(lambda leaf: leaf[jnp.maximum(t - 1, 0)], inputs)


def _cuthbert_propagate(model: _CuthbertFunctions, key: Array, x: ArrayTree, t: Any) -> ArrayTree:
    return model.propagate(key, x, _inputs_of_step(model.inputs, t))


def _cuthbert_log_potential(model: _CuthbertFunctions, x_previous: ArrayTree, x: ArrayTree, t: Any) -> Array:
    value = jnp.asarray(model.log_potential(x_previous, x, _inputs_of_step(model.inputs, t)))
    num_rows = jax.tree.leaves(model.inputs)[0].shape[0]
    return jnp.where(t > num_rows, jnp.nan, jnp.where(t == 0, jnp.zeros_like(value), value))


def _cuthbert_log_transition(model: _CuthbertFunctions, x_previous: ArrayTree, x: ArrayTree, t: Any) -> Array:
    return model.log_transition(x_previous, x, _inputs_of_step(model.inputs, t))


def to_cuthbert(fk: Any, num_steps: int) -> CuthbertModel:
    """Return a model for the particle filter of cuthbert with the same evidence.

    Its states are x_0 twice, then x_1 ... x_{T-1}: the first step of cuthbert does not move the state and applies the
    potential of step 0.

    Args:
        fk: the model.
        num_steps: T, at least 1.

    Raises:
        TypeError: ``fk`` is not a ``FeynmanKac``.
        ValueError: ``num_steps`` is below 1.
    """
    if not isinstance(fk, FeynmanKac):
        raise TypeError(
            f"cuthbert moves one particle at a time: expected a smc.FeynmanKac, got {type(fk).__name__}"
        )
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return CuthbertModel(
        init_sample=fk.init_sample,
        propagate_sample=Partial(_propagate_after_step_0, fk),
        log_potential=fk.log_potential,
        model_inputs=jnp.arange(num_steps, dtype=jnp.int32),
    )


def _propagate_after_step_0(fk: FeynmanKac, key: Array, x: ArrayTree, t: Any) -> ArrayTree:
    propagated = fk.propagate(key, x, jnp.maximum(t, 1))
    return select(t == 0, x, propagated)


@pytree
class _DynamaxModel:
    distribution_fn: Any  # Bound: (name, state, row of the inputs) -> distribution
    y: Any
    inputs: Any
    observed: Any


def from_dynamax(
    ssm: Any, params: Any, emissions: Any, *, inputs: Any = None, observed: Any = None
) -> FeynmanKac:
    r"""Return the state-space model of a ``dynamax`` object: hidden Markov, linear or nonlinear Gaussian, or your own.

    The object must have the methods ``initial_distribution(params, inputs)``,
    ``transition_distribution(params, state, inputs)`` and ``emission_distribution(params, state, inputs)``, whose
    results have ``sample(seed=key)`` and ``log_prob(value)``. It is static and compared by equality; ``params`` are
    data: new ones of the same shapes trace nothing, and functions among them (of a nonlinear model) are static.

    Args:
        ssm: the object, such as ``LinearGaussianSSM(2, 1)``; its parameters must not vary in time.
        params: its parameters.
        emissions: (T, ...). A row that is all NaN is missing; one that is NaN in part has potential NaN.
        inputs: (T, ...) or None.
        observed: booleans (T,), False for a missing row.

    Raises:
        TypeError: the object does not have these methods; ``observed`` is not boolean.
        ValueError: no emissions; inputs or ``observed`` of another length.
    """
    methods = ("initial_distribution", "transition_distribution", "emission_distribution")
    missing = [name for name in methods if not callable(getattr(ssm, name, None))]
    if missing:
        raise TypeError(
            f"{type(ssm).__name__} is not a state-space model of dynamax: it has no {', '.join(missing)}; write the "
            f"model as smc.state_space(initial, transition, observation, y)"
        )
    y, observed = check_series(emissions, observed)
    if inputs is not None:
        inputs = strong_array(jnp.asarray(inputs))
        if inputs.shape[:1] != y.shape[:1]:
            raise ValueError(
                f"inputs must have a row for each of the {y.shape[0]} emissions, got shape {inputs.shape}"
            )
    model = _DynamaxModel(Bound(_distribution, ssm, params), y, inputs, observed)
    return FeynmanKac(
        init_sample=Partial(_dynamax_init_sample, model),
        propagate=Partial(_dynamax_propagate, model),
        log_potential=Partial(_dynamax_log_potential, model),
        log_transition=Partial(_dynamax_log_transition, model),
    )


def _distribution(ssm: Any, params: Any, name: str, *args: Any) -> Any:
    return getattr(ssm, f"{name}_distribution")(params, *args)


def _inputs_at(model: _DynamaxModel, t: Any) -> Any:
    return None if model.inputs is None else model.inputs[t]


def _dynamax_init_sample(model: _DynamaxModel, key: PRNGKey) -> ArrayTree:
    return model.distribution_fn("initial", _inputs_at(model, 0)).sample(seed=key)


def _dynamax_propagate(model: _DynamaxModel, key: PRNGKey, x: ArrayTree, t: Any) -> ArrayTree:
    return model.distribution_fn("transition", x, _inputs_at(model, t)).sample(seed=key)


def _dynamax_log_transition(model: _DynamaxModel, x_previous: ArrayTree, x: ArrayTree, t: Any) -> Array:
    return model.distribution_fn("transition", x_previous, _inputs_at(model, t)).log_prob(x)


def _dynamax_log_potential(model: _DynamaxModel, x_previous: ArrayTree, x: ArrayTree, t: Any) -> Array:
    row = model.y[t]
    missing = jnp.all(jnp.isnan(row)) if jnp.issubdtype(row.dtype, jnp.floating) else jnp.zeros((), bool)
    if model.observed is not None:
        missing = missing | ~model.observed[t]
    # zeros replace a missing row, so that the derivative of the discarded value is not NaN
    emission = model.distribution_fn("emission", x, _inputs_at(model, t))
    value = emission.log_prob(jnp.where(missing, jnp.zeros_like(row), row))
    value = jnp.where(missing, jnp.zeros_like(value), value)
    return jnp.where(t < model.y.shape[0], value, jnp.nan)
