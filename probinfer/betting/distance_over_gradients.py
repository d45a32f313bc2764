"""Distance over gradients: one step size for all, the distance travelled over the root of the squared gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer.betting import groups, moves
from probinfer.betting.units import check_unit
from probinfer.core.types import Array, ArrayTree, field, pytree

__all__ = ["FuseState", "fuse"]

_START = 1e-6


class FuseState(NamedTuple):
    """What the rule remembers.

    ``start`` and ``displacement`` zeta from there are trees like the parameters (at least float32), ``distance`` is the
    largest root mean square displacement before the last step, at least the unit, ``root_sum`` the root of the sum of
    the mean squared gradients.
    ``num_nonfinite`` counts the iterates that were frozen, summed over the steps.
    """

    start: Any
    displacement: Any
    distance: Any
    root_sum: Any
    num_nonfinite: Any


@pytree
class _Fuse:
    unit: Any
    particles: bool = field(static=True)


def fuse(*, unit: Any | None = None, particles: bool = False) -> optax.GradientTransformation:
    r"""Step :math:`D_t / \sqrt{G_t}` along minus the gradient; one number for all parameters, no learning rate.

    .. math:: D_t = \max\big(w, \max_{s \le t} \mathrm{rms}_i |\zeta_{s,i}|\big), \quad
        G_t = \sum_{s \le t} \mathrm{mean}_i |\nabla f_{s,i}|^2

    over the particles i, zeta their displacements. Of one iterate it is the published rule; of a cloud D is its
    Wasserstein distance from the start, bounded by the coupling of each particle with itself. Rotations, scales of the
    gradients, and of the parameters together with the unit, leave the path as it is. Last link of a chain, as
    :func:`probinfer.betting.coin`.

    Args:
        unit: the distance w at the start in units of the parameters, the length of the first step: too small costs a
            few steps, too large is not forgiven. None: 1e-6 (1 + rms_i |x_i|) of the parameters given to ``init``.
        particles: the leading axis of every leaf counts particles; otherwise all leaves are one iterate.

    Returns:
        A transformation of gradients of a loss. A particle (or the one iterate) whose gradient is not finite does not
        move, is left out of D and G for that step and counted in ``state.num_nonfinite``.

    Raises:
        ValueError: a unit that is not positive; from ``init``: no parameters, or particles without a common leading
            axis.
        TypeError: from ``init``: parameters that are not floating point.

    References:
        Ivgi, Hinder and Carmon (2023), "DoG is SGD's best friend", equations 1 and 2; Sharrock and Nemeth (2025),
        "Tuning-free sampling via optimization on the space of probability measures", arXiv 2510.25315.
    """
    config = _Fuse(None if unit is None else check_unit(unit), bool(particles))
    return optax.GradientTransformation(
        jax.tree_util.Partial(_init, config), jax.tree_util.Partial(_update, config)
    )


def _stacked(config: _Fuse, tree: ArrayTree) -> ArrayTree:
    """One leading axis for particles: of length one for a single iterate."""
    return tree if config.particles else jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)


def _init(config: _Fuse, params: ArrayTree) -> FuseState:
    groups.check_params(params, particles=config.particles)
    sizes = groups.size("particle", groups.outcomes(_stacked(config, params)))
    if config.unit is None:
        distance = _START * (1 + _rms(sizes, jnp.ones_like(sizes)))
    else:
        distance = jnp.asarray(config.unit, sizes.dtype)
    none = jnp.zeros_like(distance)
    return FuseState(groups.wide(params), groups.zeros(params), distance, none, jnp.zeros((), jnp.int32))


def _rms(sizes: Array, held: Array) -> Array:
    """Root mean square over the held particles, scaled by the largest; zero if there is none."""
    top = jnp.max(sizes * held, initial=0.0)
    some = jnp.where(top > 0, top, jnp.ones_like(top))
    squares = jnp.sum(held * (sizes / some) ** 2) / jnp.maximum(jnp.sum(held), 1)
    return top * jnp.sqrt(squares)


def _update(config: _Fuse, updates: ArrayTree, state: FuseState, params: ArrayTree | None = None) -> Any:
    outcome = _stacked(config, groups.outcomes(updates))
    usable = groups.finite("particle", outcome)
    outcome = groups.select("particle", usable, outcome, groups.zeros(outcome))
    made, real = moves.displacements(state, updates, params)
    far = groups.size("particle", _stacked(config, made))
    held = usable.astype(far.dtype)
    distance = jnp.maximum(state.distance, _rms(far, held))
    root_sum = jnp.hypot(state.root_sum, _rms(groups.size("particle", outcome), held))
    some = root_sum > 0
    rate = jnp.where(some, distance / jnp.where(some, root_sum, jnp.ones_like(root_sum)), 0.0)
    step = jax.tree.map(lambda c: c * rate.astype(c.dtype), outcome)
    moved = groups.finite("particle", step)
    usable = usable & moved
    step = groups.select("particle", usable, step, groups.zeros(step))
    bet = jax.tree.map(jnp.add, _stacked(config, made), step)
    move = moves.emitted("particle", usable, bet, _stacked(config, real), updates)
    bet, move = (
        tree if config.particles else jax.tree.map(lambda leaf: leaf[0], tree) for tree in (bet, move)
    )
    new = FuseState(state.start, bet, distance, root_sum, state.num_nonfinite + groups.count_frozen(usable))
    return move, new
