r"""A state-space model given by three distributions and data.

.. math:: x_0\sim\mu,\qquad x_t\mid x_{t-1}\sim f_t(\cdot\mid x_{t-1}),\qquad y_t\mid x_t\sim g_t(\cdot\mid x_t)

The Feynman-Kac model propagates by f and weighs by :math:`G_t(x_{t-1},x_t)=g_t(y_t\mid x_t)`, so that its evidence is
the likelihood of the data. States and observations are scalars, vectors or trees of them; a tree of distributions is a
product of independent ones, and so are the batch dimensions of one distribution.

Missing data contribute nothing: an observation that is NaN, or whose row ``observed`` leaves out, has potential one. If
only *some* coordinates of an event are NaN, they are integrated out under products (``to_event``), multivariate normals
and Student t; with other distributions such data are refused when the model is built.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from numpyro.distributions import Distribution

from probinfer.core.algorithms import as_partial
from probinfer.core.types import Array, ArrayTree, pytree, strong_array
from probinfer.smc.models.feynman_kac import FeynmanKac
from probinfer.smc.models.missing import can_marginalize, observed_log_prob, partly_missing
from probinfer.targets import transforms

__all__ = ["check_series", "observing", "state_space"]


@pytree
class _Distributions:
    initial: Any  # () -> distributions
    transition: Any  # (x_previous, t) -> distributions
    observation: Any  # (x, t) -> distributions


def state_space(
    initial: Any, transition: Any, observation: Any, y: ArrayTree, *, observed: Any = None
) -> FeynmanKac:
    r"""Return the model of hidden states :math:`x_{0:T-1}` given the data :math:`y_{0:T-1}`.

    Parameters are bound as arrays, ``jax.tree_util.Partial(transition, parameters)``: new parameters and new data of
    the same shape trace nothing. Particles take any number of steps up to T; a step beyond the data has potential NaN,
    so that a filter with ``num_steps`` too large stops there with ``NON_FINITE``.

    Args:
        initial: distribution of :math:`x_0`: a NumPyro distribution, a tree of them, or a function without arguments
            that returns one (with parameters bound).
        transition: ``transition(x_previous, t) -> `` distribution of :math:`x_t`, t = 1 ... T-1; it has the structure,
            shapes and dtypes of ``initial``.
        observation: ``observation(x, t) -> `` distribution of :math:`y_t`, with the structure and shape of a row of
            ``y``.
        y: leaves (T, ...); NaN marks missing values (see above).
        observed: booleans (T,), False for a missing row; for integer data, which cannot be NaN.

    Returns:
        The model, ``log_transition`` included: every algorithm of ``smc`` runs on it.

    Raises:
        TypeError: an argument is not a function, or does not return distributions; ``observed`` is not boolean.
        ValueError: there are no observations; leaves of ``y`` or ``observed`` differ in length; the distributions do
            not have the shapes of the states or of a row of ``y``; a row misses a part of an event that cannot be
            integrated out (if ``y`` is traced, the potential is NaN instead).

    References:
        Chopin and Papaspiliopoulos (2020), section 5.1.3 (the bootstrap Feynman-Kac model).

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from probinfer import smc
        >>> def walk(x, t): return dist.Normal(0.9 * x, 0.5)
        >>> def observe(x, t): return dist.Normal(x, 1.0)
        >>> y = jnp.array([0.3, jnp.nan, 0.4])
        >>> fk = smc.state_space(dist.Normal(0.0, 1.0), walk, observe, y)
        >>> smc.particle_filter(jax.random.key(0), fk, 3, 100).paths.shape
        (100, 3)
    """
    y, observed = check_series(y, observed)
    distributions = _distributions(initial, transition, observation)
    row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), y)
    _check_partly_missing(_check_distributions(distributions, row), y, observed)
    return _model(distributions, Partial(_log_potential_of_series, distributions, y, observed))


def observing(initial: Any, transition: Any, observation: Any) -> Partial:
    """Return ``observation -> model``, the state-space model for ``smc.online``, which takes one row at a time.

    Args:
        initial: as for ``state_space``.
        transition: as for ``state_space``.
        observation: as for ``state_space``.

    Raises:
        TypeError: an argument is not a function.
    """
    return Partial(_observe, _distributions(initial, transition, observation))


def _observe(distributions: _Distributions, y: ArrayTree) -> FeynmanKac:
    y = jax.tree.map(lambda leaf: strong_array(jnp.asarray(leaf)), y)
    _check_distributions(distributions, y)
    return _model(distributions, Partial(_log_potential_of_row, distributions, y))


def check_series(y: ArrayTree, observed: Any) -> tuple[ArrayTree, Array | None]:
    """Return data and mask as strong arrays.

    Args:
        y: leaves (T, ...).
        observed: booleans (T,), or None.

    Raises:
        TypeError: ``observed`` is not boolean.
        ValueError: there is no leaf or row; lengths differ.
    """
    y = jax.tree.map(lambda leaf: strong_array(jnp.asarray(leaf)), y)
    lengths = [leaf.shape[:1] for leaf in jax.tree.leaves(y)]
    if not lengths or lengths[0] in [(), (0,)] or any(length != lengths[0] for length in lengths):
        raise ValueError(
            f"y must have one row per step, at least one, in each of its leaves; got leaves of shapes "
            f"{[leaf.shape for leaf in jax.tree.leaves(y)]}"
        )
    if observed is None:
        return y, None
    observed = jnp.asarray(observed)
    if observed.dtype != bool:
        raise TypeError(f"observed must be booleans, True for a row that is observed; got {observed.dtype}")
    if observed.shape != lengths[0]:
        raise ValueError(
            f"observed must have one boolean for each row of y: expected {lengths[0]}, got {observed.shape}"
        )
    return y, observed


def _distributions(initial: Any, transition: Any, observation: Any) -> _Distributions:
    if any(isinstance(leaf, Distribution) for leaf in transforms.leaves(initial)):
        initial_fn = Partial(_constant, jax.tree.map(_strong, initial))
    else:
        initial_fn = _function("initial", initial)
    return _Distributions(
        initial_fn, _function("transition", transition), _function("observation", observation)
    )


def _function(name: str, fn: Any) -> Partial:
    if callable(fn) and not isinstance(fn, Distribution):
        return as_partial(fn)
    expected = "() -> distribution, or a distribution" if name == "initial" else "(x, t) -> distribution"
    raise TypeError(
        f"{name} must be a function {expected}, got {type(fn).__name__}; bind parameters with jax.tree_util.Partial"
    )


def _constant(distributions: Any) -> Any:
    return distributions


def _strong(parameter: Any) -> Any:
    """Turn a number into an array, so that a compiled program takes both."""
    return strong_array(parameter) if isinstance(parameter, (float, jax.Array)) else parameter


def _model(distributions: _Distributions, log_potential: Partial) -> FeynmanKac:
    return FeynmanKac(
        init_sample=Partial(_init_sample, distributions),
        propagate=Partial(_propagate, distributions),
        log_potential=log_potential,
        log_transition=Partial(_log_transition, distributions),
    )


def _init_sample(distributions: _Distributions, key: Array) -> ArrayTree:
    return _sample(distributions.initial(), key)


def _propagate(distributions: _Distributions, key: Array, x: ArrayTree, t: Any) -> ArrayTree:
    return _sample(distributions.transition(x, t), key)


def _log_transition(distributions: _Distributions, x_previous: ArrayTree, x: ArrayTree, t: Any) -> Array:
    return _sum_over_leaves(_log_prob, distributions.transition(x_previous, t), x)


def _log_potential_of_series(
    distributions: _Distributions, y: ArrayTree, observed: Any, x_previous: ArrayTree, x: ArrayTree, t: Any
) -> Array:
    row_observed = None if observed is None else observed[t]
    row = jax.tree.map(lambda leaf: leaf[t], y)
    value = _sum_over_leaves(
        lambda distribution, part: observed_log_prob(distribution, part, row_observed),
        distributions.observation(x, t),
        row,
    )
    return jnp.where(t < jax.tree.leaves(y)[0].shape[0], value, jnp.nan)


def _log_potential_of_row(
    distributions: _Distributions, y: ArrayTree, x_previous: ArrayTree, x: ArrayTree, t: Any
) -> Array:
    return _sum_over_leaves(observed_log_prob, distributions.observation(x, t), y)


def _sample(distributions: Any, key: Array) -> ArrayTree:
    leaves = transforms.leaves(distributions)
    keys = [key] if len(leaves) == 1 else list(jax.random.split(key, len(leaves)))
    samples = [distribution.sample(key) for distribution, key in zip(leaves, keys)]
    return transforms.structure(distributions).unflatten(samples)


def _log_prob(distribution: Distribution, value: Array) -> Array:
    return jnp.sum(distribution.log_prob(value))


def _sum_over_leaves(fn: Any, distributions: Any, values: ArrayTree) -> Array:
    terms = jax.tree.leaves(transforms.map_leaves(fn, distributions, values))
    return jnp.sum(jnp.stack(terms)) if len(terms) > 1 else terms[0]


class _EventInfo(NamedTuple):
    name: str
    num_event_dims: int
    can_marginalize: bool


def _check_distributions(distributions: _Distributions, row: ArrayTree) -> list[_EventInfo]:
    """Check the shapes of the three distributions against each other and the data, by abstract evaluation.

    Returns:
        One entry for each distribution of an observation.
    """
    event_infos: list[_EventInfo] = []

    def draw_and_check(key: Array, row: ArrayTree) -> None:
        initial = distributions.initial()
        _check_are_distributions("initial", initial)
        x = _sample(initial, key)
        transition = distributions.transition(x, jnp.int32(1))
        _check_are_distributions("transition", transition)
        _check_same_shapes("transition", "the state", _sample(transition, key), x, dtypes=True)
        observation = distributions.observation(x, jnp.int32(0))
        _check_are_distributions("observation", observation)
        _check_same_shapes("observation", "a row of y", _sample(observation, key), row, dtypes=False)
        event_infos[:] = [
            _EventInfo(type(leaf).__name__, len(leaf.event_shape), can_marginalize(leaf))
            for leaf in transforms.leaves(observation)
        ]

    jax.eval_shape(draw_and_check, jax.random.key(0), row)
    return event_infos


def _check_partly_missing(event_infos: list[_EventInfo], y: ArrayTree, observed: Any) -> None:
    """Refuse partly missing events whose missing coordinates cannot be integrated out."""
    for (name, num_event_dims, marginal_known), leaf in zip(event_infos, jax.tree.leaves(y), strict=True):
        traced = isinstance(leaf, jax.core.Tracer) or isinstance(observed, jax.core.Tracer)
        if marginal_known or traced or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        rows = partly_missing(np.asarray(leaf), num_event_dims)
        rows = rows if observed is None else rows & np.asarray(observed)
        if rows.any():
            raise ValueError(
                f"row {int(np.argmax(rows))} of y is NaN in some coordinates of an event and not in others, and the "
                f"missing ones of a {name} cannot be integrated out: leave the row out (observed=), make all its "
                "coordinates NaN, or give an observation distribution that is a product (to_event), a "
                "MultivariateNormal or a MultivariateStudentT"
            )


def _check_are_distributions(name: str, distributions: Any) -> None:
    leaves = transforms.leaves(distributions)
    others = [leaf for leaf in leaves if not isinstance(leaf, Distribution)]
    if others or not leaves:
        got = type(others[0]).__name__ if others else "an empty tree"
        raise TypeError(f"{name} must give a NumPyro distribution, or a tree of them; got {got}")


def _check_same_shapes(
    name: str, template_name: str, sample: ArrayTree, template: ArrayTree, dtypes: bool
) -> None:
    def describe(leaf: Any) -> Any:
        return (leaf.shape, str(leaf.dtype)) if dtypes else leaf.shape

    actual, expected = (jax.tree.map(describe, tree) for tree in (sample, template))
    if actual != expected:
        raise ValueError(
            f"the distribution that {name} gives must have the structure and shape of {template_name}: expected "
            f"{expected}, got {actual}"
        )
