"""Distance over gradients: one step size for all parameters, the distance traveled over the norm of the gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer.betting import groups, moves
from probinfer.betting.units import check_unit
from probinfer.core.types import Array, ArrayTree, Float, Int, field, pytree

__all__ = ["FuseState", "fuse"]

_RELATIVE_UNIT = 1e-6  # default unit, relative to 1 + rms |x|


class FuseState(NamedTuple):
    r"""State of :func:`fuse`.

    Attributes:
        start: where the run started, a tree like the parameters (at least float32, as is the next).
        displacement: :math:`\zeta`, relative to ``start``.
        distance: :math:`D`, the largest root mean square displacement before the last step, at least the unit.
        root_sum: :math:`\sqrt G`, the root of the sum of the mean squared gradients.
        num_nonfinite: number of frozen iterates, summed over the steps.
    """

    start: ArrayTree
    displacement: ArrayTree
    distance: Float[Array, ""]
    root_sum: Float[Array, ""]
    num_nonfinite: Int[Array, ""]


@pytree
class _Fuse:
    unit: Any
    particles: bool = field(static=True)


def fuse(*, unit: Any | None = None, particles: bool = False) -> optax.GradientTransformation:
    r"""Step :math:`D_t / \sqrt{G_t}` along minus the gradient; one number for all parameters, no learning rate.

    .. math:: D_t = \max\big(w, \max_{s \le t} \mathrm{rms}_i |\zeta_{s,i}|\big), \quad
        G_t = \sum_{s \le t} \mathrm{mean}_i |\nabla f_{s,i}|^2

    with the displacements zeta of the particles i. For one iterate this is the published rule; for a cloud D is an
    upper bound of its Wasserstein distance from the start, by the coupling of each particle with itself. The path is
    invariant to rotations, to the scale of the gradients, and to the joint scale of parameters and unit. Use it as the
    last link of a chain, as :func:`probinfer.betting.coin`.

    Args:
        unit: the initial distance w in units of the parameters, which is the length of the first step: one that is too
            small costs a few steps, one that is too large is never corrected. None: 1e-6 (1 + rms_i |x_i|) of the
            parameters given to ``init``.
        particles: whether the leading axis of every leaf indexes particles; otherwise all leaves are one iterate.

    Returns:
        A transformation of gradients of a loss. A particle (or the one iterate) whose gradient is not finite does not
        move, is left out of D and G for that step and is counted in ``state.num_nonfinite``.

    Raises:
        ValueError: The unit is not positive; from ``init``: there are no parameters, or the particles have no common
            leading axis.
        TypeError: From ``init``: the parameters are not floating point.

    References:
        Ivgi, Hinder and Carmon (2023), "DoG is SGD's best friend", equations 1 and 2; Sharrock and Nemeth (2025),
        "Tuning-free sampling via optimization on the space of probability measures", arXiv 2510.25315.
    """
    config = _Fuse(None if unit is None else check_unit(unit), bool(particles))
    return optax.GradientTransformation(
        jax.tree_util.Partial(_init, config), jax.tree_util.Partial(_update, config)
    )


def _stacked(config: _Fuse, tree: ArrayTree) -> ArrayTree:
    """Return the tree with a leading axis for particles, of length one for a single iterate."""
    return tree if config.particles else jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)


def _init(config: _Fuse, params: ArrayTree) -> FuseState:
    groups.check_params(params, particles=config.particles)
    lengths = groups.lengths("particle", groups.outcomes(_stacked(config, params)))
    if config.unit is None:
        distance = _RELATIVE_UNIT * (1 + _rms(lengths, jnp.ones_like(lengths)))
    else:
        distance = jnp.asarray(config.unit, lengths.dtype)
    return FuseState(
        start=groups.widen(params),
        displacement=groups.zeros(params),
        distance=distance,
        root_sum=jnp.zeros_like(distance),
        num_nonfinite=jnp.zeros((), jnp.int32),
    )


def _rms(lengths: Array, weights: Array) -> Array:
    """Return the root mean square over particles of weight 1 (not 0), zero if there is none.

    Lengths are divided by the largest before they are squared, so that squares neither overflow nor vanish.
    """
    top = jnp.max(lengths * weights, initial=0.0)
    divisor = jnp.where(top > 0, top, jnp.ones_like(top))
    squares = jnp.sum(weights * (lengths / divisor) ** 2) / jnp.maximum(jnp.sum(weights), 1)
    return top * jnp.sqrt(squares)


def _update(config: _Fuse, updates: ArrayTree, state: FuseState, params: ArrayTree | None = None) -> Any:
    outcome = _stacked(config, groups.outcomes(updates))
    usable = groups.all_finite("particle", outcome)
    outcome = groups.select_leaves("particle", usable, outcome, groups.zeros(outcome))

    # Distance traveled and root of the squared gradients
    credited, actual = moves.displacements(state, updates, params)
    lengths = groups.lengths("particle", _stacked(config, credited))
    weights = usable.astype(lengths.dtype)
    distance = jnp.maximum(state.distance, _rms(lengths, weights))
    root_sum = jnp.hypot(state.root_sum, _rms(groups.lengths("particle", outcome), weights))

    # Step
    nonzero = root_sum > 0
    rate = jnp.where(nonzero, distance / jnp.where(nonzero, root_sum, jnp.ones_like(root_sum)), 0.0)
    step = jax.tree.map(lambda c: c * rate.astype(c.dtype), outcome)
    usable = usable & groups.all_finite("particle", step)
    step = groups.select_leaves("particle", usable, step, groups.zeros(step))
    displacement = jax.tree.map(jnp.add, _stacked(config, credited), step)
    move = moves.updates_to_bet("particle", usable, displacement, _stacked(config, actual), updates)
    displacement, move = (
        tree if config.particles else jax.tree.map(lambda leaf: leaf[0], tree)
        for tree in (displacement, move)
    )
    new = FuseState(
        start=state.start,
        displacement=displacement,
        distance=distance,
        root_sum=root_sum,
        num_nonfinite=state.num_nonfinite + groups.count_frozen(usable),
    )
    return move, new
