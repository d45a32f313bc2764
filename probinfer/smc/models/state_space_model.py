r"""A state-space model written as its users write it: three distributions and data.

.. math:: x_0\sim\mu,\qquad x_t\mid x_{t-1}\sim f_t(\cdot\mid x_{t-1}),\qquad y_t\mid x_t\sim g_t(\cdot\mid x_t)

The Feynman-Kac model moves by f and weighs by :math:`G_t(x_{t-1},x_t)=g_t(y_t\mid x_t)`, so its evidence is the
likelihood of the data. States and observations are scalars, vectors or trees of them; a tree of distributions is a
product of independent ones, and so are the batch dimensions of one distribution.

What is missing contributes nothing: an observation that is NaN, or whose row ``observed`` leaves out, has potential
one. Where *some* coordinates of an event are NaN they are integrated out: of products (``to_event``), of multivariate
normals and of Student t; other laws refuse such data when the model is made.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from numpyro.distributions import Distribution

from probinfer.core.algorithms import as_partial
from probinfer.core.types import Array, ArrayTree, pytree, strong_array
from probinfer.smc.models.feynman_kac import FeynmanKac
from probinfer.smc.models.missing import can_marginalize, log_seen, partly_missing
from probinfer.targets import transforms

__all__ = ["check_series", "observing", "state_space"]


@pytree
class _Laws:
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
        initial: law of :math:`x_0`: a NumPyro distribution, a tree of them, or a function ``() ->`` such (with
            parameters bound).
        transition: ``transition(x_previous, t) -> `` law of :math:`x_t`, t = 1 ... T-1; it has the structure, shapes
            and dtypes of ``initial``.
        observation: ``observation(x, t) -> `` law of :math:`y_t`, of the structure and shape of a row of ``y``.
        y: leaves (T, ...); NaN marks what is missing (see above).
        observed: booleans (T,), False where a row is missing; for integer data, which cannot be NaN.

    Returns:
        The model, ``log_transition`` included: every algorithm of ``smc`` runs on it.

    Raises:
        TypeError: a law is no distribution; a function is none; ``observed`` is not boolean.
        ValueError: there are no observations; leaves of ``y`` or ``observed`` differ in length; the laws do not have
            the shapes of the states or of a row of ``y``; a row misses a part of an event that cannot be integrated
            out (where ``y`` is traced the potential is NaN instead).

    References:
        Chopin and Papaspiliopoulos (2020), section 5.1.3 (the bootstrap Feynman-Kac model).

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from probinfer import smc
        >>> def walk(x, t): return dist.Normal(0.9 * x, 0.5)
        >>> def seen(x, t): return dist.Normal(x, 1.0)
        >>> y = jnp.array([0.3, jnp.nan, 0.4])
        >>> fk = smc.state_space(dist.Normal(0.0, 1.0), walk, seen, y)
        >>> smc.particle_filter(jax.random.key(0), fk, 3, 100).paths.shape
        (100, 3)
    """
    y, observed = check_series(y, observed)
    laws = _laws(initial, transition, observation)
    row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), y)
    _check_gaps(_check_laws(laws, row), y, observed)
    return _model(laws, Partial(_weigh_row, laws, y, observed))


def observing(initial: Any, transition: Any, observation: Any) -> Partial:
    """Return ``observation -> model``, the state-space model for ``smc.online``: data come one row at a time.

    Args:
        initial: as for ``state_space``.
        transition: as for ``state_space``.
        observation: as for ``state_space``.

    Raises:
        TypeError: a function is none.
    """
    return Partial(_observe, _laws(initial, transition, observation))


def _observe(laws: _Laws, y: ArrayTree) -> FeynmanKac:
    y = jax.tree.map(lambda leaf: strong_array(jnp.asarray(leaf)), y)
    _check_laws(laws, y)
    return _model(laws, Partial(_weigh_one, laws, y))


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
            f"y must hold one row a step, at least one, in each of its leaves; got leaves of shapes "
            f"{[leaf.shape for leaf in jax.tree.leaves(y)]}"
        )
    if observed is None:
        return y, None
    observed = jnp.asarray(observed)
    if observed.dtype != bool:
        raise TypeError(f"observed must be booleans, True where a row counts; got {observed.dtype}")
    if observed.shape != lengths[0]:
        raise ValueError(
            f"observed must have one boolean a row of y: expected {lengths[0]}, got {observed.shape}"
        )
    return y, observed


def _laws(initial: Any, transition: Any, observation: Any) -> _Laws:
    members = transforms.leaves(initial)
    if any(isinstance(member, Distribution) for member in members):
        start = Partial(_constant, jax.tree.map(_strong, initial))
    else:
        start = _function("initial", initial)
    return _Laws(start, _function("transition", transition), _function("observation", observation))


def _function(name: str, fn: Any) -> Partial:
    if callable(fn) and not isinstance(fn, Distribution):
        return as_partial(fn)
    what = "() -> distribution, or a distribution" if name == "initial" else "(x, t) -> distribution"
    raise TypeError(
        f"{name} must be a function {what}, got {type(fn).__name__}; bind parameters with jax.tree_util.Partial"
    )


def _constant(law: Any) -> Any:
    return law


def _strong(parameter: Any) -> Any:
    """A number typed in and an array are the same to a compiled program."""
    return strong_array(parameter) if isinstance(parameter, (float, jax.Array)) else parameter


def _model(laws: _Laws, log_potential: Partial) -> FeynmanKac:
    return FeynmanKac(Partial(_start, laws), Partial(_move, laws), log_potential, Partial(_log_move, laws))


def _start(laws: _Laws, key: Array) -> ArrayTree:
    return _sample(laws.initial(), key)


def _move(laws: _Laws, key: Array, x: ArrayTree, t: Any) -> ArrayTree:
    return _sample(laws.transition(x, t), key)


def _log_move(laws: _Laws, before: ArrayTree, x: ArrayTree, t: Any) -> Array:
    return _total(_log_density, laws.transition(before, t), x)


def _weigh_row(laws: _Laws, y: ArrayTree, observed: Any, before: ArrayTree, x: ArrayTree, t: Any) -> Array:
    seen = None if observed is None else observed[t]
    row = jax.tree.map(lambda leaf: leaf[t], y)
    value = _total(lambda law, part: log_seen(law, part, seen), laws.observation(x, t), row)
    return jnp.where(t < jax.tree.leaves(y)[0].shape[0], value, jnp.nan)


def _weigh_one(laws: _Laws, y: ArrayTree, before: ArrayTree, x: ArrayTree, t: Any) -> Array:
    return _total(log_seen, laws.observation(x, t), y)


def _sample(laws: Any, key: Array) -> ArrayTree:
    members = transforms.leaves(laws)
    keys = [key] if len(members) == 1 else list(jax.random.split(key, len(members)))
    return transforms.structure(laws).unflatten([law.sample(key) for law, key in zip(members, keys)])


def _log_density(law: Distribution, value: Array) -> Array:
    return jnp.sum(law.log_prob(value))


def _total(fn: Any, laws: Any, values: ArrayTree) -> Array:
    parts = jax.tree.leaves(transforms.map_leaves(fn, laws, values))
    return jnp.sum(jnp.stack(parts)) if len(parts) > 1 else parts[0]


def _check_laws(laws: _Laws, row: ArrayTree) -> list[tuple[str, int, bool]]:
    """Hold the shapes of the three laws against one another and against the data, without computing anything.

    Returns:
        Of the law of each observation: its name, its event dimensions, and whether parts of an event may be missing.
    """
    found: list[tuple[str, int, bool]] = []

    def trial(key: Array, row: ArrayTree) -> None:
        first = laws.initial()
        _check_members("initial", first)
        x = _sample(first, key)
        following = laws.transition(x, jnp.int32(1))
        _check_members("transition", following)
        _check_alike("transition", "the state", _sample(following, key), x, dtypes=True)
        seen = laws.observation(x, jnp.int32(0))
        _check_members("observation", seen)
        _check_alike("observation", "a row of y", _sample(seen, key), row, dtypes=False)
        found[:] = [
            (type(law).__name__, len(law.event_shape), can_marginalize(law))
            for law in transforms.leaves(seen)
        ]

    jax.eval_shape(trial, jax.random.key(0), row)
    return found


def _check_gaps(found: list[tuple[str, int, bool]], y: ArrayTree, observed: Any) -> None:
    """Refuse data of which a law would have to be integrated that cannot be."""
    for (name, num_event_dims, may_miss), leaf in zip(found, jax.tree.leaves(y), strict=True):
        traced = isinstance(leaf, jax.core.Tracer) or isinstance(observed, jax.core.Tracer)
        if may_miss or traced or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        rows = partly_missing(np.asarray(leaf), num_event_dims)
        rows = rows if observed is None else rows & np.asarray(observed)
        if rows.any():
            raise ValueError(
                f"row {int(np.argmax(rows))} of y is NaN in some coordinates of an event and not in others, and the "
                f"missing ones of a {name} cannot be integrated out: leave the row out (observed=), make all its "
                "coordinates NaN, or give an observation law that is a product (to_event), a MultivariateNormal or a "
                "MultivariateStudentT"
            )


def _check_members(name: str, laws: Any) -> None:
    strangers = [law for law in transforms.leaves(laws) if not isinstance(law, Distribution)]
    if strangers or not transforms.leaves(laws):
        got = type(strangers[0]).__name__ if strangers else "an empty tree"
        raise TypeError(f"{name} must give a NumPyro distribution, or a tree of them; got {got}")


def _check_alike(name: str, what: str, drawn: ArrayTree, given: ArrayTree, dtypes: bool) -> None:
    def describe(leaf: Any) -> Any:
        return (leaf.shape, str(leaf.dtype)) if dtypes else leaf.shape

    found, expected = (jax.tree.map(describe, tree) for tree in (drawn, given))
    if found != expected:
        raise ValueError(
            f"the law that {name} gives must have the structure and shape of {what}: expected {expected}, got "
            f"{found}"
        )
